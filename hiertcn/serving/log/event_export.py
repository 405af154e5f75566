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
    return written


def _export_segment(
    segment: SealedSegment, events: Path
) -> tuple[int, int | None, dict[bytes, int]]:
    rows: dict[tuple[str, str, int], tuple[int, str]] = {}
    deleted: dict[bytes, int] = {}
    items: dict[str, LoggedItem] = {}
    last_us: int | None = None
    for order, (_, entry) in enumerate(read_segment(segment.path)):
        if isinstance(entry, LoggedDeletion):
            deleted[entry.user_key] = order
            continue
        if isinstance(entry, LoggedItem):
            items[entry.item_id] = entry
            continue
        rows.setdefault(
            (entry.user_id, entry.item_id, entry.timestamp_us), (order, entry.event_type)
        )
        last_us = max(last_us, entry.timestamp_us) if last_us is not None else entry.timestamp_us
    if deleted:
        rows = {
            row: (order, kind)
            for row, (order, kind) in rows.items()
            if order > deleted.get(user_key(row[0]), -1)
        }
    by_day: dict[int, list[tuple[str, str, int, str]]] = {}
    for (user, item, timestamp_us), (_, kind) in rows.items():
        by_day.setdefault(timestamp_us // _US_PER_DAY, []).append((user, item, timestamp_us, kind))
    for day, found in sorted(by_day.items()):
        _write_day(events / f"{DATE}={_date(day)}" / f"part-{segment.number}.parquet", found)
    if items:
        export_items(list(items.values()), events.with_name(ITEMS_FOLDER), segment.number)
    if rows:
        _log.info("wrote %d recorded interactions to %s", len(rows), events)
    return len(rows), last_us, deleted


def _write_day(path: Path, found: list[tuple[str, str, int, str]]) -> None:
    # Stable, so interactions of one user and time keep the log's order, as ingest expects.
    found.sort(key=lambda row: (row[0], row[2]))
    users, items, times, kinds = zip(*found, strict=True)
    table = pa.table(
        [
            pa.array(users, pa.string()),
            pa.array(items, pa.string()),
            pa.array(times, pa.int64()).cast(SCHEMA.field(TIMESTAMP).type),
            pa.array([kind or None for kind in kinds], pa.string()),
        ],
        schema=SCHEMA,
    )
    with whole_file(path) as aside:
        pq.write_table(table, aside)


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
