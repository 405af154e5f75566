"""Co-interaction edges, one partition per day, out of core.

Two items are co-interacted when one user touches both within ``window_s`` seconds and the later
event is among the ``max_followers`` next ones after the earlier (HierTCN, section 3.6.1: "an edge
is built if two items are interacted by the same user within a short period of time"). Pairs are
counted by compiled code (``coded_pairs``) or by a query on DuckDB or Spark (``pairs``); the
partitions are the same.

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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.events.columns import DATE
from hiertcn.files import full_disk_as_input_error, whole_file
from hiertcn.graph.coded_log import CodedLog
from hiertcn.graph.coded_pairs import CodedPairs
from hiertcn.graph.edge_log import EdgeLog, previous
from hiertcn.graph.engine import GraphEngine, connect, spill_folder
from hiertcn.graph.log_fingerprints import RunningFingerprint, row_count, row_groups
from hiertcn.graph.options import GraphOptions
from hiertcn.graph.ordered_rows import OrderedRows
from hiertcn.graph.pairs import (
    COUNT,
    DAY,
    SOURCE,
    TARGET,
    US_PER_DAY,
    co_interactions,
    plain_events,
)

_FILE: Final = "edges.parquet"
_BATCH_ROWS: Final = 1 << 20
_EPOCH: Final = datetime.date(1970, 1, 1)
_ID: Final = pa.dictionary(pa.int32(), pa.string())
_SCHEMA: Final = pa.schema({SOURCE: _ID, TARGET: _ID, COUNT: pa.int64()})

_DayRows = Iterator[tuple[str, pa.RecordBatch]]
_Pairing = Callable[[list[str], EdgeLog], contextlib.AbstractContextManager[_DayRows]]

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
        InputError: no events there, a file that cannot be read, a missing column, a full disk, or
            the chosen engine is not installed, failed or ran out of memory.
    """
    files = event_files(events)
    dates = sorted(files)
    with _pairing(options, store) as paired:
        paths = {date: partition_path(store, date) for date in dates}
        log = EdgeLog(files, paths, options, codes=options.engine == "compiled")
        stale = [date for date in dates if not log.is_current(date)]
        progress = tqdm(total=len(stale), desc="edges", unit="day", mininterval=2)
        # One chunk is written while the next is read and paired.
        with progress, ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for run in _chunks(stale, dates, files, options.chunk_events):
                with contextlib.ExitStack() as until_written:
                    rows = until_written.enter_context(paired(run, log))
                    if written:
                        written.result()
                    kept = until_written.pop_all()
                    written = writer.submit(_write_days, rows, run, log, kept, progress)
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
def _pairing(options: GraphOptions, store: Path) -> Iterator[_Pairing]:
    """Yield what counts the pairs of neighboring days; a context within which they can be read."""
    if options.engine == "compiled":
        with spill_folder(store.parent) as spill:
            # Half for pairing one chunk, half for counting the one before meanwhile.
            yield partial(_paired_by_compiled_code, spill, options.memory_bytes // 2)
    else:
        with connect(options, store) as engine:
            yield partial(_paired_by_query, engine)


@contextlib.contextmanager
def _paired_by_query(engine: GraphEngine, run: list[str], log: EdgeLog) -> Iterator[_DayRows]:
    before, first_day, since_us = _before(run, log)
    read = [*before, *(file for date in run for file in log.files[date])]
    pairs = co_interactions(plain_events(engine.read_events(read), since_us), log.options)
    wanted = pairs.filter(pairs[DAY] >= first_day).order_by(DAY, SOURCE, TARGET)
    with engine.ordered(wanted) as rows:
        yield _by_day(rows)


@contextlib.contextmanager
def _paired_by_compiled_code(
    spill: Path, memory: int, run: list[str], log: EdgeLog
) -> Iterator[_DayRows]:
    before, first_day, since_us = _before(run, log)
    with (
        full_disk_as_input_error(spill),
        tempfile.TemporaryDirectory(prefix="pairs-", dir=spill) as folder,
    ):
        with tempfile.TemporaryDirectory(prefix="coded-", dir=spill) as coded:
            events = _coded(run, before, since_us, log, Path(coded))
            pairs = CodedPairs(events, first_day, log.options, memory, Path(folder))
        yield (
            (date, _named(columns, pairs.ids))
            for date in run
            for columns in pairs.of_day(_day(date), memory)
        )


def _before(run: list[str], log: EdgeLog) -> tuple[list[Path], int, int]:
    """Return the files of the day before the run, its first day, and since when events matter."""
    first_day = _day(run[0])
    since_us = first_day * US_PER_DAY - round(log.options.window_s * 1e6)
    return log.files.get(previous(run[0]), []), first_day, since_us


def _coded(
    run: list[str], before: list[Path], since_us: int, log: EdgeLog, folder: Path
) -> CodedLog:
    coded = CodedLog(folder)
    running = {date: RunningFingerprint(log.options.window_s) for date in run}
    with ThreadPoolExecutor(log.options.thread_count) as pool:
        read = [
            pool.submit(coded.add, file, group, None, since_us)
            for file in before
            for group in row_groups(file)
        ]
        read += [
            pool.submit(coded.add, file, group, running[date])
            for date in run
            for file in log.files[date]
            for group in row_groups(file)
        ]
        for piece in read:
            piece.result()
    log.fingerprints |= {date: fingerprint.value() for date, fingerprint in running.items()}
    return coded


def _write_days(
    rows: _DayRows,
    run: list[str],
    log: EdgeLog,
    until_written: contextlib.ExitStack,
    progress: Any,
) -> None:
    with until_written:
        held = next(rows, None)
        for date in run:
            with whole_file(log.partitions[date]) as aside, _writer(aside) as out:
                out.add_key_value_metadata(log.of_day(date).metadata)
                while held is not None and held[0] == date:
                    out.write_batch(held[1])
                    held = next(rows, None)
            progress.update()


def _writer(path: Path) -> pq.ParquetWriter:
    # Ids are written as dictionaries of any size: faster to write and to read, and as small. The
    # file's schema does not say so, or readers that ask for text would get dictionaries. Statistics
    # would take as long as all else, and whoever reads a partition reads all of it.
    return pq.ParquetWriter(
        path,
        _SCHEMA,
        compression="zstd",
        dictionary_pagesize_limit=1 << 30,
        write_statistics=False,
        store_schema=False,
    )


def _named(columns: Sequence[NDArray[Any]], ids: pa.Array) -> pa.RecordBatch:
    """Return a partition's rows from codes and counts."""
    *codes, counts = columns
    ends = [_dictionary(end, ids).cast(_ID) for end in codes]
    return pa.record_batch([*ends, pa.array(counts)], schema=_SCHEMA)


def _dictionary(codes: NDArray[Any], ids: pa.Array) -> pa.DictionaryArray:
    """Name the codes by a dictionary of those that occur."""
    place = np.zeros(len(ids), np.int32)
    place[codes] = 1
    used = np.flatnonzero(place)
    place[used] = np.arange(len(used), dtype=np.int32)
    return pa.DictionaryArray.from_arrays(place[codes], ids.take(pa.array(used)))


def _by_day(rows: OrderedRows) -> _DayRows:
    """Cut an engine's rows into pieces of one day."""
    for batch in rows.batches(_BATCH_ROWS):
        days = np.asarray(batch.column(DAY))
        starts = [0, *(np.flatnonzero(np.diff(days)) + 1).tolist(), len(days)]
        for start, stop in itertools.pairwise(starts):
            if stop > start:
                day = _EPOCH + datetime.timedelta(days=int(days[start]))
                piece = batch.slice(start, stop - start)
                ends = [piece.column(name).dictionary_encode() for name in (SOURCE, TARGET)]
                ends = [end.cast(_ID) for end in ends]
                columns = [*ends, piece.column(COUNT)]
                yield day.isoformat(), pa.record_batch(columns, schema=_SCHEMA)


def _day(date: str) -> int:
    return (datetime.date.fromisoformat(date) - _EPOCH).days


def _remove_vanished(store: Path, dates: list[str]) -> int:
    vanished = [
        date for date in stored_dates(store) if dates[0] <= date <= dates[-1] and date not in dates
    ]
    for date in vanished:
        partition_path(store, date).unlink()
        partition_path(store, date).parent.rmdir()
    return len(vanished)
