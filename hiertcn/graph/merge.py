"""Merge a sliding window of edge partitions into the item graph.

The weight of an item pair is the sum over the window's days of ``count * 2^(-age / half_life)``,
the age in days before ``as_of``. Pairs are undirected; of each item's pairs the ``top_n`` heaviest
are kept, so an item may list a neighbor that does not list it back. Sums are taken in fixed point
(units of 2^-24), so the result is the same whatever order threads add in, and ties go to the
lower row.

Cost: one pass over the window's partitions, written to disk as numbers, from which each item adds
up its own pairs (``neighbor_sums``); that needs no query engine, so it is the same after either. A
co-interaction whose weight falls below 2^-24 (24 half-lives old) counts nothing.
"""

import datetime
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.files import whole_directory, write_json
from hiertcn.graph.csr import CSR, STATISTICS_FILE, write_csr
from hiertcn.graph.edges import partition_path, stored_dates
from hiertcn.graph.engine import spill_folder
from hiertcn.graph.neighbor_sums import DayPairs, PairCounts, strongest_neighbors
from hiertcn.graph.options import GraphOptions
from hiertcn.graph.pairs import COUNT, SOURCE, TARGET
from hiertcn.items.index import IdIndex

_UNIT: Final = 2.0**-24
_BATCH_ROWS: Final = 1 << 20
_QUANTILES: Final = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)

_log = logging.getLogger(__name__)


def merge_edges(
    store: Path,
    index: IdIndex,
    output: Path,
    options: GraphOptions = GraphOptions(),  # noqa: B008
) -> CSR:
    """Write the item graph of the window that ends at ``options.as_of``.

    Args:
        store: edge partitions, as ``build_edges`` leaves them.
        index: item rows; edges of ids it does not know are left out (and counted).
        output: folder to write, whole or not at all.
        options: ``window_days``, ``half_life_days``, ``top_n``, ``as_of``, ``threads`` and
            ``memory_limit``, half of which may hold pairs.

    ``statistics.json`` holds items, isolated_items, edges (directed, as stored), pairs (before the
    ``top_n`` cut), pairs_unknown_items, first_date, last_date, days, quantiles of degree and of
    weight, and ``overlap``: of the newest day's pairs, the share also seen on the day before it
    (``jaccard`` is over both days' pairs) or on any earlier day of the window.

    Raises:
        InputError: the store has no partition in the window, one cannot be read, or the disk is
            full.
    """
    dates = _window(store, options)
    with spill_folder(output.parent) as spill, whole_directory(output) as aside:
        days, rows = _days_in_rows(store, dates, index, options, spill)
        found = strongest_neighbors(
            days,
            len(index),
            rows,
            options.top_n,
            options.memory_bytes // 2,
            options.thread_count,
            spill,
        )
        pieces = ((neighbors, weights * _UNIT) for neighbors, weights in found.pieces())
        write_csr(aside, found.degrees, pieces)
        csr = CSR.open(aside)
        isolated = int((csr.degrees == 0).sum())
        statistics = {
            "items": csr.items,
            "isolated_items": isolated,
            "edges": len(csr.indices),
            "pairs": found.counts.pairs,
            "pairs_unknown_items": found.counts.unknown,
            "first_date": dates[0],
            "last_date": dates[-1],
            "days": len(dates),
            "degree_quantiles": _quantiles(csr.degrees),
            "weight_quantiles": _quantiles(csr.weights),
            "overlap": _overlap(found.counts, dates),
        }
        write_json(aside / STATISTICS_FILE, statistics)
    _log.info(
        "wrote the item graph to %s: %d items (%d isolated), %d edges from %d days",
        output,
        csr.items,
        isolated,
        len(csr.indices),
        len(dates),
    )
    return CSR.open(output)


def _window(store: Path, options: GraphOptions) -> list[str]:
    stored = stored_dates(store)
    if not stored:
        raise InputError(f"{store} holds no edge partition; run build_edges on the log first")
    newest = options.as_of or stored[-1]
    oldest = datetime.date.fromisoformat(newest) - datetime.timedelta(days=options.window_days - 1)
    dates = [date for date in stored if oldest.isoformat() <= date <= newest]
    if not dates:
        raise InputError(
            f"{store} has no edge partition from {oldest} to {newest} (it has {stored[0]} to "
            f"{stored[-1]}); change as_of or window_days"
        )
    return dates


def _decay(date: str, newest: str, half_life_days: float) -> float:
    age = (datetime.date.fromisoformat(newest) - datetime.date.fromisoformat(date)).days
    return 0.5 ** (age / half_life_days) if half_life_days else 1.0


def _days_in_rows(
    store: Path, dates: list[str], index: IdIndex, options: GraphOptions, folder: Path
) -> tuple[list[DayPairs], int]:
    """Write the partitions as rows; also return the number of rows with those of unknown ids."""
    unknown: dict[str, int] = {}
    lock = threading.Lock()

    def rows_of(ids: pa.DictionaryArray) -> NDArray[np.int32]:
        rows = index.rows(ids.dictionary).astype(np.int32)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            texts = ids.dictionary.take(pa.array(missing)).to_pylist()
            with lock:
                rows[missing] = [
                    unknown.setdefault(text, len(index) + len(unknown)) for text in texts
                ]
        found: NDArray[np.int32] = rows[np.asarray(ids.indices)]
        return found

    def write(date: str) -> DayPairs:
        path = partition_path(store, date)
        day = DayPairs(
            source=folder / f"{date}.{SOURCE}",
            target=folder / f"{date}.{TARGET}",
            count=folder / f"{date}.{COUNT}",
            units=round(_decay(date, options.as_of or dates[-1], options.half_life_days) / _UNIT),
            newest=date == dates[-1],
            previous=dates[-2:-1] == [date],
        )
        try:
            with (
                day.source.open("wb") as source,
                day.target.open("wb") as target,
                day.count.open("wb") as count,
                pq.ParquetFile(path, read_dictionary=[SOURCE, TARGET]) as file,
            ):
                for batch in file.iter_batches(_BATCH_ROWS, columns=[SOURCE, TARGET, COUNT]):
                    # Not ndarray.tofile, which does not say that the disk is full.
                    source.write(rows_of(batch.column(SOURCE)).data)
                    target.write(rows_of(batch.column(TARGET)).data)
                    count.write(np.asarray(batch.column(COUNT)).data)
        except (pa.ArrowException, KeyError) as error:
            raise InputError(
                f"{path} could not be read as an edge partition ({error}); delete it and run "
                "build_edges again"
            ) from error
        return day

    with ThreadPoolExecutor(options.thread_count) as pool:
        days = list(pool.map(write, dates))
    return days, len(index) + len(unknown)


def _overlap(counts: PairCounts, dates: list[str]) -> dict[str, Any] | None:
    if len(dates) < 2:
        return None
    return {
        "date": dates[-1],
        "previous_date": dates[-2],
        "jaccard": _share(counts.both, counts.newest + counts.previous - counts.both),
        "seen_before": _share(counts.seen_before, counts.newest),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.quantile(np.asarray(values, np.float64), _QUANTILES)
    return {
        f"p{round(q * 100)}": round(float(v), 6) for q, v in zip(_QUANTILES, found, strict=True)
    }
