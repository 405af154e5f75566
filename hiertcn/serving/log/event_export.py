"""Rolls sealed log segments into parquet that the next daily run ingests: serving feeds training.

One file per segment and UTC date, ``events/date=YYYY-MM-DD/part-<segment>.parquet``, with the
columns of the ingest contract. The names follow from the segment, so doing it again after a crash
replaces files and repeats nothing. What a deleted user did before the deletion is left out, and
erased from the files and sealed segments written earlier. Upserted items go to ``items/`` beside
``events`` (``item_export.py``). An interaction that is in two segments
(a retry whose first attempt was already rotated away) appears twice; ingest keeps it once.
"""

import datetime
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hiertcn.events.columns import DATE, EVENT_TYPE, ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.files import whole_file
from hiertcn.serving.log.event_log import EventLog, LoggedDeletion, read_segment
from hiertcn.serving.log.item_export import ITEMS_FOLDER, export_items
from hiertcn.serving.log.logged_items import LoggedItem
from hiertcn.serving.log.segments import SealedSegment, erase
from hiertcn.serving.records.record import user_key

_log = logging.getLogger(__name__)

SCHEMA: Final = pa.schema(
    [
        (USER_ID, pa.string()),
        (ITEM_ID, pa.string()),
        (TIMESTAMP, pa.timestamp("us", tz="UTC")),
        (EVENT_TYPE, pa.string()),
    ]
)
_ORDER: Final = "order"
_LOGGED: Final = pa.schema(
    [
        (USER_ID, pa.string()),
        (ITEM_ID, pa.string()),
        (TIMESTAMP, pa.int64()),
        (EVENT_TYPE, pa.string()),
        (_ORDER, pa.int64()),
    ]
)
_ROWS_TOGETHER: Final = 4096
_US_PER_DAY: Final = 86_400_000_000


def export_parquet(log: EventLog, events: Path) -> int:
    """Write every sealed, not yet exported segment below ``events``; return how many events.

    Raises:
        InputError: the disk is full, or a segment is damaged; nothing half-written is left.
    """
    written = 0
    for segment in log.sealed():
        if segment.exported:
            continue
        count, last_us, deleted = _export_segment(segment, events)
        if deleted:
            _erase_from_parquet(events, segment.number, deleted)
            for other in log.sealed():
                if other.number <= segment.number:
                    erase(other, deleted, whole=other.number < segment.number)
        log.mark_exported(segment.number, events=count, last_us=last_us)
        written += count
    if written:
        # Arrow would keep it for the next segment, an hour later.
        pa.default_memory_pool().release_unused()
    return written


def _export_segment(
    segment: SealedSegment, events: Path
) -> tuple[int, int | None, dict[bytes, int]]:
    interactions, deleted, items = _read(segment.path)
    last_us: int | None = pc.max(interactions.column(TIMESTAMP)).as_py()
    if deleted:
        interactions = _without(interactions, deleted)
    interactions = _each_once(interactions)
    days = interactions.column(TIMESTAMP).to_numpy() // _US_PER_DAY
    for day in np.unique(days).tolist():
        path = events / f"{DATE}={_date(day)}" / f"part-{segment.number}.parquet"
        with whole_file(path) as aside:
            pq.write_table(_as_ingested(interactions.filter(pa.array(days == day))), aside)
    if items:
        export_items(list(items.values()), events.with_name(ITEMS_FOLDER), segment.number)
    if len(interactions):
        _log.info("wrote %d recorded interactions to %s", len(interactions), events)
    return len(interactions), last_us, deleted


def _read(path: Path) -> tuple[pa.Table, dict[bytes, int], dict[str, LoggedItem]]:
    """Return a segment's interactions, where each user was deleted, and the newest items."""
    deleted: dict[bytes, int] = {}
    items: dict[str, LoggedItem] = {}
    pieces: list[pa.RecordBatch] = []
    # Few rows at a time as Python objects, which take twenty times the memory.
    rows: list[tuple[str, str, int, str, int]] = []

    def keep() -> None:
        columns = zip(*rows, strict=True) if rows else ([] for _ in _LOGGED)
        arrays = [
            pa.array(column, field.type) for column, field in zip(columns, _LOGGED, strict=True)
        ]
        pieces.append(pa.record_batch(arrays, schema=_LOGGED))
        rows.clear()

    for order, (_, entry) in enumerate(read_segment(path)):
        if isinstance(entry, LoggedDeletion):
            deleted[entry.user_key] = order
        elif isinstance(entry, LoggedItem):
            items[entry.item_id] = entry
        else:
            rows.append((entry.user_id, entry.item_id, entry.timestamp_us, entry.event_type, order))
            if len(rows) == _ROWS_TOGETHER:
                keep()
    keep()
    return pa.Table.from_batches(pieces), deleted, items


def _without(interactions: pa.Table, deleted: Mapping[bytes, int]) -> pa.Table:
    """Leave out what users did before they were deleted."""
    for user in pc.unique(interactions.column(USER_ID)).to_pylist():
        before = deleted.get(user_key(user))
        if before is not None:
            is_gone = pc.and_(
                pc.equal(interactions.column(USER_ID), user),
                pc.less(interactions.column(_ORDER), before),
            )
            interactions = interactions.filter(pc.invert(is_gone))
    return interactions


def _each_once(interactions: pa.Table) -> pa.Table:
    """Keep the first of equal ones; by user and time, and as in the log where those are equal."""
    same = interactions.group_by([USER_ID, ITEM_ID, TIMESTAMP], use_threads=False)
    first = same.aggregate([(EVENT_TYPE, "first"), (_ORDER, "min")]).rename_columns(_LOGGED.names)
    return first.sort_by([(name, "ascending") for name in (USER_ID, TIMESTAMP, _ORDER)])


def _as_ingested(interactions: pa.Table) -> pa.Table:
    kind = interactions.column(EVENT_TYPE)
    kind = pc.if_else(pc.equal(kind, ""), pa.scalar(None, pa.string()), kind)
    columns = [interactions.column(name) for name in (USER_ID, ITEM_ID, TIMESTAMP)]
    return pa.table([*columns, kind], names=SCHEMA.names).cast(SCHEMA)


def _erase_from_parquet(events: Path, before: int, deleted: Mapping[bytes, int]) -> None:
    for path in sorted(events.glob(f"{DATE}=*/part-*.parquet")):
        if int(path.stem.removeprefix("part-")) >= before:
            continue
        table = pq.ParquetFile(path).read()
        users = table.column(USER_ID)
        gone = [user for user in pc.unique(users).to_pylist() if user_key(user) in deleted]
        if not gone:
            continue
        kept = table.filter(pc.invert(pc.is_in(users, value_set=pa.array(gone, pa.string()))))
        if kept.num_rows:
            with whole_file(path) as aside:
                pq.write_table(kept, aside)
        else:
            path.unlink()


def _date(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()
