"""Co-interaction edges, one partition per day, out of core.

Two items are co-interacted when one user touches both within ``window_s`` seconds and the later
event is among the ``max_followers`` next ones after the earlier (HierTCN, section 3.6.1: "an edge
is built if two items are interacted by the same user within a short period of time"). The query is
in ``pairs``; it runs on DuckDB or Spark (``engine``), with the same partitions.

A pair belongs to the UTC day of its later event. A day therefore depends on its own events and on
the last ``window_s`` seconds before it, so a new day never changes an old partition, and the
partitions of all days together are one build. A partition stores a fingerprint of exactly those
events and is kept while the fingerprint holds; otherwise the day is computed again.

Cost: a day's rows are read once, or twice if it had a partition before; while its files keep their
bytes only those are. A new day's query reads that day and the end of the one before.

Not done here: weighting by age, choosing neighbors (``merge``), removing partitions older or newer
than the given log.
"""

import contextlib
import datetime
import itertools
import logging
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.events.columns import DATE
from hiertcn.files import full_disk_as_input_error, whole_file
from hiertcn.graph.coded_log import CodedLog
from hiertcn.graph.edge_log import EdgeLog, previous
from hiertcn.graph.engine import GraphEngine, connect
from hiertcn.graph.log_fingerprints import row_count
from hiertcn.graph.options import GraphOptions
from hiertcn.graph.ordered_rows import OrderedRows
from hiertcn.graph.pairs import (
    COUNT,
    DAY,
    SOURCE,
    TARGET,
    US_PER_DAY,
    co_interactions,
    coded_events,
    plain_events,
)

_FILE: Final = "edges.parquet"
_BATCH_ROWS: Final = 1 << 20
_EPOCH: Final = datetime.date(1970, 1, 1)
_ID: Final = pa.dictionary(pa.int32(), pa.string())
_SCHEMA: Final = pa.schema({SOURCE: _ID, TARGET: _ID, COUNT: pa.int64()})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EdgeSummary:
    """What :func:`build_edges` did.

    Attributes:
        days: days in the log; ``rebuilt`` of them were computed, ``kept`` were unchanged.
        removed: partitions inside the log's span whose day has no events any more.
        edges: rows in the log's partitions (an item pair counts once a day).
        first_date, last_date: the log's span, ``YYYY-MM-DD``.
    """

    days: int
    rebuilt: int
    kept: int
    removed: int
    edges: int
    first_date: str
    last_date: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)


def build_edges(
    events: Path,
    store: Path,
    options: GraphOptions = GraphOptions(),  # noqa: B008
) -> EdgeSummary:
    """Bring the store's partitions up to date with the log.

    Args:
        events: folder of ``date=YYYY-MM-DD/*.parquet`` with user, item and timestamp.
        store: folder of ``date=YYYY-MM-DD/edges.parquet``; ``source`` and ``target`` are item ids
            (string, ``source < target``), ``count`` int64, sorted by both. Created if missing.
        options: window, cap and engine limits; the merge's options are not read.

    A run that was killed leaves whole partitions only, and the next run continues after them. The
    fingerprint covers window and cap, so changing them rebuilds.

    Raises:
        InputError: no events there, a file that cannot be read, a missing column, the engine is
            not installed, or its memory or disk is exhausted.
    """
    files = event_files(events)
    dates = sorted(files)
    with connect(options, store) as engine:
        paths = {date: partition_path(store, date) for date in dates}
        log = EdgeLog(files, paths, options, codes=engine.reads_codes)
        stale = [date for date in dates if not log.is_current(date)]
        progress = tqdm(total=len(stale), desc="edges", unit="day", mininterval=2)
        # One chunk is written while the next is read and paired.
        with progress, ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for run in _chunks(stale, dates, files, options.chunk_events):
                with contextlib.ExitStack() as until_written:
                    rows, ids = until_written.enter_context(_paired(engine, run, log))
                    if written:
                        written.result()
                    kept = until_written.pop_all()
                    written = writer.submit(_write_days, rows, ids, run, log, kept, progress)
            if written:
                written.result()
    removed = _remove_vanished(store, dates)
    summary = EdgeSummary(
        days=len(dates),
        rebuilt=len(stale),
        kept=len(dates) - len(stale),
        removed=removed,
        edges=sum(pq.read_metadata(partition_path(store, date)).num_rows for date in dates),
        first_date=dates[0],
        last_date=dates[-1],
    )
    _log.info(
        "wrote %d of %d edge partitions (%d edges) to %s",
        summary.rebuilt,
        summary.days,
        summary.edges,
        store,
    )
    return summary


def event_files(events: Path) -> dict[str, list[Path]]:
    """Return the log's parquet files by date (``YYYY-MM-DD``).

    Raises:
        InputError: there is no ``date=YYYY-MM-DD`` folder with a parquet file.
    """
    files: dict[str, list[Path]] = {}
    for folder in sorted(events.glob(f"{DATE}=*")):
        parts = sorted(folder.glob("*.parquet"))
        if parts:
            files[folder.name.partition("=")[2]] = parts
    if not files:
        raise InputError(
            f"{events} holds no {DATE}=YYYY-MM-DD/*.parquet; expected the events folder that "
            "ingest writes, so run ingest first"
        )
    return files


def partition_path(store: Path, date: str) -> Path:
    """Return where the partition of ``date`` lies in the store."""
    return store / f"{DATE}={date}" / _FILE


def stored_dates(store: Path) -> list[str]:
    """Return the dates that have a partition, ascending."""
    return sorted(path.parent.name.partition("=")[2] for path in store.glob(f"{DATE}=*/{_FILE}"))


def _chunks(
    stale: list[str], dates: list[str], files: dict[str, list[Path]], chunk_events: int
) -> Iterator[list[str]]:
    """Yield runs of neighboring stale dates of about ``chunk_events`` events."""
    position = {date: place for place, date in enumerate(dates)}
    run: list[str] = []
    events = 0
    for date in stale:
        count = sum(row_count(file) for file in files[date])
        broken = run and position[date] != position[run[-1]] + 1
        if run and (broken or events + count > chunk_events):
            yield run
            run, events = [], 0
        run.append(date)
        events += count
    if run:
        yield run


@contextlib.contextmanager
def _paired(
    engine: GraphEngine, run: list[str], log: EdgeLog
) -> Iterator[tuple[OrderedRows, pa.Array | None]]:
    """Yield the pairs of neighboring days, and the items' ids if items are numbers."""
    first_day = (datetime.date.fromisoformat(run[0]) - _EPOCH).days
    since_us = first_day * US_PER_DAY - round(log.options.window_s * 1e6)
    before = log.files.get(previous(run[0]), [])
    with contextlib.ExitStack() as until_read, contextlib.ExitStack() as until_paired:
        ids = None
        if engine.reads_codes:
            folder = tempfile.TemporaryDirectory(prefix="coded-", dir=engine.spill)
            coded = _coded(run, before, since_us, log, Path(until_paired.enter_context(folder)))
            event, ids = coded_events(engine, coded, since_us)
        else:
            read = [*before, *(file for date in run for file in log.files[date])]
            event = plain_events(engine.read_events(read), since_us)
        pairs = co_interactions(event, log.options)
        wanted = pairs.filter(pairs[DAY] >= first_day).order_by(DAY, SOURCE, TARGET)
        rows = until_read.enter_context(engine.ordered(wanted))
        until_paired.close()
        yield rows, ids


def _coded(
    run: list[str], before: list[Path], since_us: int, log: EdgeLog, folder: Path
) -> CodedLog:
    coded = CodedLog(folder)
    tail_s = log.options.window_s
    threads = log.options.threads or os.cpu_count()
    with full_disk_as_input_error(folder), ThreadPoolExecutor(threads) as pool:
        earlier = pool.submit(coded.add_day, before, tail_s, since_us)
        read = {date: pool.submit(coded.add_day, log.files[date], tail_s) for date in run}
        earlier.result()
        for date, fingerprint in read.items():
            log.fingerprints[date] = fingerprint.result()
    return coded


def _write_days(
    rows: OrderedRows,
    ids: pa.Array | None,
    run: list[str],
    log: EdgeLog,
    until_written: contextlib.ExitStack,
    progress: Any,
) -> None:
    with until_written:
        pieces = _by_day(rows)
        held = next(pieces, None)
        for date in run:
            with whole_file(log.partitions[date]) as aside, _writer(aside) as out:
                out.add_key_value_metadata(log.of_day(date).metadata)
                while held is not None and held[0] == date:
                    out.write_batch(_named(held[1], ids))
                    held = next(pieces, None)
            progress.update()


def _writer(path: Path) -> pq.ParquetWriter:
    # Ids are written as dictionaries of any size: faster to write and to read, and as small. The
    # file's schema does not say so, or readers that ask for text would get dictionaries.
    return pq.ParquetWriter(
        path, _SCHEMA, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False
    )


def _named(piece: pa.RecordBatch, ids: pa.Array | None) -> pa.RecordBatch:
    ends = [piece.column(name) for name in (SOURCE, TARGET)]
    ends = [end.dictionary_encode() if ids is None else _dictionary(end, ids) for end in ends]
    columns = [*ends, piece.column(COUNT)]
    return pa.record_batch(
        [column.cast(type_) for column, type_ in zip(columns, _SCHEMA.types, strict=True)],
        schema=_SCHEMA,
    )


def _dictionary(codes: pa.Array, ids: pa.Array) -> pa.DictionaryArray:
    """Name the codes by a dictionary of those that occur."""
    row = np.asarray(codes)
    place = np.zeros(len(ids), np.int32)
    place[row] = 1
    used = np.flatnonzero(place)
    place[used] = np.arange(len(used), dtype=np.int32)
    return pa.DictionaryArray.from_arrays(place[row], ids.take(pa.array(used)))


def _by_day(rows: OrderedRows) -> Iterator[tuple[str, pa.RecordBatch]]:
    for batch in rows.batches(_BATCH_ROWS):
        days = np.asarray(batch.column(DAY))
        starts = [0, *(np.flatnonzero(np.diff(days)) + 1).tolist(), len(days)]
        for start, stop in itertools.pairwise(starts):
            if stop > start:
                day = _EPOCH + datetime.timedelta(days=int(days[start]))
                yield day.isoformat(), batch.slice(start, stop - start)


def _remove_vanished(store: Path, dates: list[str]) -> int:
    vanished = [
        date for date in stored_dates(store) if dates[0] <= date <= dates[-1] and date not in dates
    ]
    for date in vanished:
        partition_path(store, date).unlink()
        partition_path(store, date).parent.rmdir()
    return len(vanished)
