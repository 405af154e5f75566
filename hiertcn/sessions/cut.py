"""Cuts ingested events into sessions and writes the session store.

A session is a maximal run of one user's interactions in which no pause exceeds ``gap_s`` (the
paper's 30 minutes, section 4.1). Interactions with items outside the item index are dropped and
counted first, so a pause is measured between interactions that models will see, as it is when
serving. Users are ordered by the bytes of their id, interactions by time; equal times keep the
order of the log.

DuckDB sorts out of core within ``memory_limit``; the sorted rows are then streamed into the columns
in batches, so memory does not grow with the log, except for the users' ids (their text plus some
60 bytes each, for the id index). Events must have been ingested (hiertcn/events/ingest.py): types
and nulls are not checked again here.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.events.columns import EVENT_TYPE, IMPRESSIONS, ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.files import whole_directory, write_json
from hiertcn.items.index import IdIndex
from hiertcn.sessions.columns import ColumnWriter
from hiertcn.sessions.store import (
    EVENT_TYPES,
    HEADER_FILE,
    IMPRESSION_OFFSETS,
    IMPRESSION_ROWS,
    ITEM_ROWS,
    SESSION_OFFSETS,
    TIMESTAMPS_US,
    USER_OFFSETS,
    USERS_FOLDER,
    StoreMeta,
)

_BATCH_ROWS = 200_000
_MOST_EVENT_TYPES = 255

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SessionSummary:
    """What :func:`build_sessions` wrote and dropped.

    ``unknown_items`` counts interactions, ``unknown_impressions`` shown items, that the item index
    does not know.
    """

    users: int
    sessions: int
    interactions: int
    impressions: int | None
    unknown_items: int
    unknown_impressions: int
    watermark_us: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def build_sessions(
    events: Path,
    items: IdIndex,
    output: Path,
    *,
    gap_s: float = 1800.0,
    memory_limit: str = "4GB",
) -> SessionSummary:
    """Write the session store of ingested events to the folder ``output``, whole or not at all.

    Args:
        events: folder of ``date=YYYY-MM-DD/*.parquet`` as ingest writes it.
        items: index of the items; interactions with others are dropped.
        output: folder to write, see hiertcn/sessions/store.py.
        gap_s: a pause longer than this many seconds ends a session.
        memory_limit: DuckDB's memory, e.g. ``"4GB"``; what exceeds it is sorted on disk, beside
            ``output``.

    Raises:
        InputError: the gap is not positive, the events cannot be read, or none of their items is
            in the index.
    """
    if not gap_s > 0:
        raise InputError(f"session gap is {gap_s} s; expected a positive number of seconds")
    events, output = Path(events), Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".sort.", dir=output.parent) as spill,
        duckdb.connect(config={"memory_limit": memory_limit, "temp_directory": spill}) as database,
        whole_directory(output) as aside,
    ):
        log = _SortedLog(database, events)
        cutter = _Cutter(
            aside,
            items,
            gap_us=round(gap_s * 1e6),
            has_impressions=log.impressions,
            event_types=log.event_types,
        )
        with tqdm(total=log.rows, desc="sessions", unit=" events", mininterval=2) as progress:
            for batch in log.batches():
                cutter.add(batch)
                progress.update(batch.num_rows)
        summary = cutter.close()
        if summary.interactions == 0:
            raise InputError(
                f"none of the {log.rows} events in {events} has an item of the index at "
                f"{items.directory} ({len(items)} items); build the index from the same log"
            )
    _log.info(
        "wrote %d sessions of %d users (%d interactions, %d with unknown items dropped) to %s",
        summary.sessions,
        summary.users,
        summary.interactions,
        summary.unknown_items,
        output,
    )
    return summary


class _SortedLog:
    """The events in order of user, time, and the log, as Arrow batches."""

    def __init__(self, database: duckdb.DuckDBPyConnection, events: Path) -> None:
        self._database = database
        files = sorted(str(path) for path in events.rglob("*.parquet"))
        if not files:
            raise InputError(f"{events} holds no parquet file; expected the events ingest wrote")
        # The files' numbers make the order of equal times independent of DuckDB's threads.
        self._source = "read_parquet($files, filename = true, file_row_number = true)"
        self._parameters = {"files": files}
        try:
            columns = database.execute(
                f"DESCRIBE SELECT * FROM {self._source}", self._parameters
            ).fetchall()
            # fetchall, as DuckDB refuses further work beside an unfinished result.
            self.rows: int = database.execute(
                f"SELECT count(*) FROM {self._source}", self._parameters
            ).fetchall()[0][0]
        except duckdb.Error as error:
            raise InputError(f"cannot read the events in {events}: {error}") from error
        names = {name for name, *_ in columns}
        missing = {USER_ID, ITEM_ID, TIMESTAMP} - names
        if missing:
            raise InputError(
                f"the events in {events} have no column {', '.join(sorted(missing))}; expected the "
                "columns that ingest writes"
            )
        self.impressions = IMPRESSIONS in names
        self.event_types = self._event_types() if EVENT_TYPE in names else ()

    def batches(self) -> Iterator[pa.RecordBatch]:
        shown = f", {IMPRESSIONS}" if self.impressions else ""
        shown += f", {EVENT_TYPE}" if self.event_types else ""
        ordered = self._database.sql(
            f"SELECT {USER_ID}, {ITEM_ID}, epoch_us({TIMESTAMP}) AS {TIMESTAMP}{shown} "
            f"FROM {self._source} ORDER BY {USER_ID}, {TIMESTAMP}, filename, file_row_number",
            params=self._parameters,
        )
        yield from ordered.to_arrow_reader(_BATCH_ROWS)

    def _event_types(self) -> tuple[str, ...]:
        """Return the types, the most frequent first; what a byte cannot number counts as none."""
        found = self._database.execute(
            f"SELECT {EVENT_TYPE} FROM {self._source} WHERE {EVENT_TYPE} IS NOT NULL "
            f"GROUP BY {EVENT_TYPE} ORDER BY count(*) DESC, {EVENT_TYPE}",
            self._parameters,
        ).fetchall()
        if len(found) > _MOST_EVENT_TYPES:
            _log.warning(
                "the log has %d event types; the %d most frequent are kept apart",
                len(found),
                _MOST_EVENT_TYPES,
            )
        return tuple(name for (name,) in found[:_MOST_EVENT_TYPES])


class _Cutter:
    """Appends sorted batches to the store's columns, carrying the last user and time over."""

    def __init__(
        self,
        directory: Path,
        items: IdIndex,
        *,
        gap_us: int,
        has_impressions: bool,
        event_types: tuple[str, ...],
    ) -> None:
        self._directory, self._items, self._gap_us = directory, items, gap_us
        self._item_rows = ColumnWriter(directory, ITEM_ROWS, np.int32)
        self._timestamps_us = ColumnWriter(directory, TIMESTAMPS_US, np.int64)
        self._session_offsets = ColumnWriter(directory, SESSION_OFFSETS, np.int64)
        self._user_offsets = ColumnWriter(directory, USER_OFFSETS, np.int64)
        self._impressions: tuple[ColumnWriter, ColumnWriter] | None = None
        if has_impressions:
            self._impressions = (
                ColumnWriter(directory, IMPRESSION_ROWS, np.int32),
                ColumnWriter(directory, IMPRESSION_OFFSETS, np.int64),
            )
        self._event_types = event_types
        self._event_type_codes: ColumnWriter | None = None
        if event_types:
            self._event_type_codes = ColumnWriter(directory, EVENT_TYPES, np.uint8)
        self._user_ids: list[pa.Array] = []
        self._last_user: str | None = None
        self._last_us = 0
        self._watermark_us = 0
        self._unknown_items = 0
        self._unknown_impressions = 0

    def add(self, batch: pa.RecordBatch) -> None:
        rows = self._items.rows(batch.column(ITEM_ID))
        known = rows >= 0
        self._unknown_items += int((~known).sum())
        if not known.any():
            return
        if not known.all():
            batch = batch.filter(pa.array(known))
            rows = rows[known]

        users = batch.column(USER_ID).cast(pa.large_string())
        times = batch.column(TIMESTAMP).to_numpy(zero_copy_only=False).astype(np.int64)
        starts_user = np.empty(len(rows), np.bool_)
        starts_user[0] = users[0].as_py() != self._last_user
        starts_user[1:] = pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
        pauses = np.diff(times, prepend=self._last_us)
        starts_session = starts_user | (pauses > self._gap_us)

        before = self._item_rows.length
        sessions_before = self._session_offsets.length
        session_number = sessions_before + np.cumsum(starts_session) - 1
        self._user_offsets.append(session_number[starts_user])
        self._session_offsets.append(before + np.flatnonzero(starts_session))
        self._user_ids.append(users.filter(pa.array(starts_user)))
        self._add_impressions(batch)
        if self._event_type_codes is not None:
            codes = pc.index_in(batch.column(EVENT_TYPE), pa.array(self._event_types))
            self._event_type_codes.append(
                pc.fill_null(pc.add(codes, 1), 0).to_numpy(zero_copy_only=False)
            )
        self._item_rows.append(rows)
        self._timestamps_us.append(times)
        self._last_user, self._last_us = users[-1].as_py(), int(times[-1])
        self._watermark_us = max(self._watermark_us, int(times.max()))

    def close(self) -> SessionSummary:
        interactions, sessions = self._item_rows.length, self._session_offsets.length
        users = self._user_offsets.length
        self._session_offsets.append(np.array([interactions]))
        self._user_offsets.append(np.array([sessions]))
        impressions = None
        if self._impressions is not None:
            shown, offsets = self._impressions
            impressions = shown.length
            offsets.append(np.array([impressions]))
        for column in (
            self._item_rows,
            self._timestamps_us,
            self._session_offsets,
            self._user_offsets,
            *(self._impressions or ()),
            *((self._event_type_codes,) if self._event_type_codes is not None else ()),
        ):
            column.close()
        if users:
            IdIndex.build(pa.chunked_array(self._user_ids), self._directory / USERS_FOLDER)
        meta = StoreMeta(
            users=users,
            sessions=sessions,
            interactions=interactions,
            items=len(self._items),
            impressions=impressions,
            gap_us=self._gap_us,
            watermark_us=self._watermark_us,
            event_types=self._event_types,
        )
        write_json(self._directory / HEADER_FILE, meta.to_dict())
        return SessionSummary(
            users=users,
            sessions=sessions,
            interactions=interactions,
            impressions=impressions,
            unknown_items=self._unknown_items,
            unknown_impressions=self._unknown_impressions,
            watermark_us=self._watermark_us,
        )

    def _add_impressions(self, batch: pa.RecordBatch) -> None:
        if self._impressions is None:
            return
        shown, offsets = self._impressions
        lists = batch.column(IMPRESSIONS)
        counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        rows = self._items.rows(pc.list_flatten(lists))
        known = rows >= 0
        self._unknown_impressions += int((~known).sum())
        ends = np.concatenate([[0], np.cumsum(known)])[np.cumsum(counts)]
        kept = np.diff(ends, prepend=0)
        offsets.append(shown.length + ends - kept)
        shown.append(rows[known])
