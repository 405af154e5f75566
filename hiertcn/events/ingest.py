"""From any event log to the platform's own: validated, deduplicated, filtered, one folder per day.

The work is DuckDB's, out of core: memory stays under the given limit and the scratch files lie
beside the output. Measured on two shared cores: 3 million events in about 10 s. Sessions are not
cut here and ids get no row numbers here.
"""

import datetime
import errno
import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.events.catalogue import CatalogueSummary, write_catalogue
from hiertcn.events.columns import DATE, EVENT_TYPE, IMPRESSIONS, ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.events.judge import apply_limits, filter_items, reject_bad_rows
from hiertcn.events.options import IngestOptions
from hiertcn.events.scan import ROW, connect, quoted
from hiertcn.events.source import list_files
from hiertcn.events.staging import StagedLog, out_of_memory, stage_log
from hiertcn.events.statistics import LogStatistics, statistics_through
from hiertcn.files import sha256, whole_directory, write_json

__all__ = ["IngestOptions", "IngestSummary", "ingest"]

_log = logging.getLogger(__name__)

_DAY_US = 86_400_000_000
_ROWS_PER_GROUP = 131_072
_COLUMNS: dict[str, tuple[str, pa.DataType]] = {
    USER_ID: ("user_id", pa.string()),
    ITEM_ID: ("item_id", pa.string()),
    TIMESTAMP: ("time_us", pa.int64()),
}

ALL_EVENTS = "all_events"
"""Folder of the events before the limits on interactions; absent where they dropped nothing.

What users and items have enough interactions changes with every day, also on days long past. What
is built day by day (the item graph) therefore reads these: a day of them never changes again.
"""


@dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """What an ingest read, kept and dropped.

    Attributes:
        output: the folder written.
        hash: SHA-256 (hex) of what was written and of the options that shaped it.
        rows: rows read; equal to ``events`` plus all of ``rejected`` plus all of ``filtered``.
        events, users, items: what is left.
        first_us: time of the first event that is left.
        watermark_us: up to when the log was seen: the last valid event's time before any limit.
        rejected: reason -> rows.
        filtered: filter -> rows.
        catalogue: what became of the items file, if one was given.
        statistics: Table 1 of what is left.
    """

    output: Path
    hash: str
    rows: int
    events: int
    users: int
    items: int
    first_us: int
    watermark_us: int
    rejected: dict[str, int]
    filtered: dict[str, int]
    has_impressions: bool
    event_types: list[str]
    catalogue: CatalogueSummary | None
    statistics: LogStatistics


def ingest(
    events_url: str, output: Path, *, items_url: str | None = None, options: IngestOptions
) -> IngestSummary:
    """Read a log, check and filter it, and write the folder ``output``, whole or not at all.

    Layout::

        events/date=YYYY-MM-DD/part-0.parquet  user_id, item_id string, timestamp[us, UTC]
                                               and, if known, event_type, impressions list<string>;
                                               sorted by user, time, then the log's order
        all_events/date=YYYY-MM-DD/            user_id, item_id, timestamp before the limits on
                                               interactions, if these dropped anything
        items.parquet                          item_id and all given columns (with items_url)
        rejects.parquet                        file, row, reason, user_id, item_id, timestamp
        snapshot.json, statistics.json

    The log is a CSV or parquet file, a glob or a folder at any fsspec URL; its order is that of
    file names, then rows. Ids are text or whole numbers; timestamps are timestamps (without a
    zone: UTC), whole numbers in one unit, or ISO 8601 text; impressions are lists, or text as a
    JSON list or ``a|b|c``. Other columns are ignored. In rejects, ``row`` counts from 0 without
    the header; in a CSV with malformed rows it counts the well-formed ones, and for a malformed
    row it is its line.

    Raises:
        InputError: the log cannot be reached or read, lacks a column, has one of the wrong type,
            has ambiguous times or unknown event types, or a filter leaves nothing.
    """
    output = Path(output)
    files = list_files(events_url)
    item_files = list_files(items_url) if items_url else []
    if options.item_filter and not item_files:
        raise InputError(
            f"item_filter={options.item_filter!r} needs an items file, and none was given; give "
            "one or leave item_filter empty"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_directory(output) as aside,
        # Beside the output, because the system's temporary folder is often small.
        tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch_name,
    ):
        scratch = Path(scratch_name)
        connection = connect(scratch, options.memory_limit)
        try:
            catalogue = None
            if item_files:
                catalogue = write_catalogue(
                    connection, item_files, options, aside / "items.parquet", scratch
                )
            log = stage_log(connection, files, options, scratch)
            filtered = reject_bad_rows(connection, log, options)
            watermark_us = _scalar(connection, "SELECT max(time_us) FROM events")
            if options.item_filter:
                filtered |= filter_items(connection, options)
            _write_all_events(connection, aside / ALL_EVENTS, options)
            limited = apply_limits(connection, options)
            filtered |= limited
            if not any(limited.values()):
                shutil.rmtree(aside / ALL_EVENTS)
            _write_events(connection, log, aside / "events")
            rejected = _write_rejects(connection, aside / "rejects.parquet")
            first_us = _scalar(connection, "SELECT min(time_us) FROM events")
            event_types = _event_types(connection, log)
            statistics = statistics_through(
                connection, aside / "events", session_gap_s=options.session_gap_s
            )
            has_impressions = log.has_impressions and bool(
                _scalar(connection, "SELECT count(impressions) FROM events")
            )
        except duckdb.OutOfMemoryException as error:
            raise out_of_memory(options.memory_limit, error) from error
        except duckdb.IOException as error:
            if "No space left" not in str(error):
                raise
            raise OSError(errno.ENOSPC, str(error)) from error
        finally:
            connection.close()
        content = _content_hashes(aside)
        summary = IngestSummary(
            output=output,
            hash=_snapshot_hash(content, options),
            rows=log.rows,
            events=statistics.interactions,
            users=statistics.users,
            items=statistics.items,
            first_us=first_us,
            watermark_us=watermark_us,
            rejected=rejected,
            filtered={name: count for name, count in filtered.items() if count},
            has_impressions=has_impressions,
            event_types=event_types,
            catalogue=catalogue,
            statistics=statistics,
        )
        write_json(aside / "statistics.json", statistics.to_dict())
        write_json(aside / "snapshot.json", _snapshot(summary, content))
    _log.info(
        "ingested %d of %d rows (%d users, %d items) to %s; rejected %s; filtered %s",
        summary.events,
        summary.rows,
        summary.users,
        summary.items,
        output,
        summary.rejected or "none",
        summary.filtered or "none",
    )
    return summary


def _write_events(connection: duckdb.DuckDBPyConnection, log: StagedLog, directory: Path) -> None:
    columns = dict(_COLUMNS)
    if log.has_event_type:
        columns[EVENT_TYPE] = ("event_type", pa.string())
    if log.has_impressions:
        columns[IMPRESSIONS] = ("impressions", pa.list_(pa.string()))
    _write_days(connection, columns, directory)


def _write_all_events(
    connection: duckdb.DuckDBPyConnection, directory: Path, options: IngestOptions
) -> None:
    # The most that a user may have is applied day by day here, or the day on which somebody passes
    # it would change all days before.
    most = options.max_user_interactions
    _write_days(connection, _COLUMNS, directory, without_users_of_more_than=most)


def _write_days(
    connection: duckdb.DuckDBPyConnection,
    columns: dict[str, tuple[str, pa.DataType]],
    directory: Path,
    *,
    without_users_of_more_than: int | None = None,
) -> None:
    read = pa.schema([(name, kind) for name, (_, kind) in columns.items()])
    written = read.set(
        read.get_field_index(TIMESTAMP), pa.field(TIMESTAMP, pa.timestamp("us", tz="UTC"))
    )
    selected = ", ".join(f"{source} AS {name}" for name, (source, _) in columns.items())
    days = connection.execute(
        f"SELECT DISTINCT time_us // {_DAY_US} AS day FROM events ORDER BY day"
    ).fetchall()
    for (day,) in tqdm(days, desc=f"write {directory.name}", unit="day", mininterval=2):
        date = datetime.date(1970, 1, 1) + datetime.timedelta(days=int(day))
        folder = directory / f"{DATE}={date.isoformat()}"
        folder.mkdir(parents=True)
        chosen = f"time_us >= {day * _DAY_US} AND time_us < {(day + 1) * _DAY_US}"
        if without_users_of_more_than is not None:
            chosen += (
                f" AND user_id NOT IN (SELECT user_id FROM events WHERE {chosen} "
                f"GROUP BY user_id HAVING count(*) > {without_users_of_more_than})"
            )
        batches = connection.sql(
            f"SELECT {selected} FROM events WHERE {chosen} "
            f"ORDER BY user_id, time_us, file_id, {ROW}"
        ).to_arrow_reader(_ROWS_PER_GROUP)
        # Not DuckDB's COPY: that marks columns as never null by what each day happens to hold,
        # and days of different schemas do not read as one dataset everywhere.
        with pq.ParquetWriter(folder / "part-0.parquet", written, compression="zstd") as writer:
            for batch in batches:
                writer.write_table(pa.Table.from_batches([batch]).cast(read).cast(written))


def _write_rejects(connection: duckdb.DuckDBPyConnection, path: Path) -> dict[str, int]:
    connection.execute(
        f"COPY (SELECT name AS file, {ROW} AS row, reason, user_id, item_id, timestamp "
        f"FROM rejects JOIN files USING (file_id) ORDER BY file_id, {ROW}, reason) "
        f"TO {quoted(str(path))} (FORMAT parquet, COMPRESSION zstd)"
    )
    rows = connection.execute(
        "SELECT reason, count(*) FROM rejects GROUP BY reason ORDER BY reason"
    ).fetchall()
    return {str(reason): int(count) for reason, count in rows}


def _event_types(connection: duckdb.DuckDBPyConnection, log: StagedLog) -> list[str]:
    if not log.has_event_type:
        return []
    rows = connection.execute(
        "SELECT DISTINCT event_type FROM events WHERE event_type IS NOT NULL ORDER BY event_type"
    ).fetchall()
    return [str(name) for (name,) in rows]


def _content_hashes(directory: Path) -> dict[str, str]:
    paths = [
        *sorted((directory / "events").rglob("*.parquet")),
        *sorted((directory / ALL_EVENTS).rglob("*.parquet")),
        directory / "items.parquet",
    ]
    return {path.relative_to(directory).as_posix(): sha256(path) for path in paths if path.exists()}


def _snapshot_hash(content: dict[str, str], options: IngestOptions) -> str:
    shaping = {name: value for name, value in asdict(options).items() if name != "memory_limit"}
    return hashlib.sha256(json.dumps([content, shaping], sort_keys=True).encode()).hexdigest()


def _snapshot(summary: IngestSummary, content: dict[str, str]) -> dict[str, Any]:
    return {
        "hash": summary.hash,
        "first_us": summary.first_us,
        "watermark_us": summary.watermark_us,
        "rows": summary.rows,
        "events": summary.events,
        "users": summary.users,
        "items": summary.items,
        "rejected": summary.rejected,
        "filtered": summary.filtered,
        "has_impressions": summary.has_impressions,
        "event_types": summary.event_types,
        "files": content,
    }


def _scalar(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])
