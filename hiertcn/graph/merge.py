"""Merge a sliding window of edge partitions into the item graph.

The weight of an item pair is the sum over the window's days of ``count * 2^(-age / half_life)``,
the age in days before ``as_of``. Pairs are undirected; of each item's pairs the ``top_n`` heaviest
are kept, so an item may list a neighbor that does not list it back. Sums are taken in fixed point
(units of 2^-24), so the result is the same whatever order threads add in, and ties go to the
lower row.

Cost: one pass over the window's partitions in DuckDB, out of core; then 12 bytes per kept edge in
memory. A co-interaction whose weight falls below 2^-24 (24 half-lives old) counts nothing.
"""

import datetime
import logging
from pathlib import Path
from typing import Any, Final

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.events.columns import DATE
from hiertcn.files import whole_directory, write_json
from hiertcn.graph.csr import CSR, STATISTICS_FILE
from hiertcn.graph.edges import COUNT, SOURCE, TARGET, partition_path, stored_dates
from hiertcn.graph.engine import connect, ordered_batches
from hiertcn.graph.options import GraphOptions
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
        options: ``window_days``, ``half_life_days``, ``top_n``, ``as_of`` and engine limits.

    ``statistics.json`` holds items, isolated_items, edges (directed, as stored), pairs (before the
    ``top_n`` cut), pairs_unknown_items, first_date, last_date, days, quantiles of degree and of
    weight, and ``overlap``: of the newest day's pairs, the share also seen on the day before it
    (``jaccard`` is over both days' pairs) or on any earlier day of the window.

    Raises:
        InputError: the store has no partition in the window, or DuckDB ran out of memory or disk.
    """
    dates = _window(store, options)
    with connect(options, output) as backend:
        pair = _decayed_pairs(backend, store, index, dates, options)
        pair = backend.create_table("pair", pair, temp=True)
        known = pair.filter(pair.source_row >= 0, pair.target_row >= 0)
        csr = _to_csr(backend, _strongest(known, options.top_n), len(index))
        counts = pair.aggregate(
            pairs=pair.count(),
            pairs_unknown_items=((pair.source_row < 0) | (pair.target_row < 0)).sum(),
        )
        statistics = {
            "items": csr.items,
            "isolated_items": int((csr.degrees == 0).sum()),
            "edges": len(csr.indices),
            **{name: int(value or 0) for name, value in counts.to_pyarrow().to_pylist()[0].items()},
            "first_date": dates[0],
            "last_date": dates[-1],
            "days": len(dates),
            "degree_quantiles": _quantiles(csr.degrees),
            "weight_quantiles": _quantiles(csr.weights),
            "overlap": _overlap(backend, store, dates),
        }
    with whole_directory(output) as aside:
        csr.write(aside)
        write_json(aside / STATISTICS_FILE, statistics)
    _log.info(
        "wrote the item graph to %s: %d items (%d isolated), %d edges from %d days",
        output,
        csr.items,
        statistics["isolated_items"],
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


def _decayed_pairs(
    backend: Any, store: Path, index: IdIndex, dates: list[str], options: GraphOptions
) -> ibis.Table:
    """source_row, target_row int32 (-1 unknown), weight int64 in units of 2^-24."""
    newest = datetime.date.fromisoformat(options.as_of or dates[-1])
    ages = [(newest - datetime.date.fromisoformat(date)).days for date in dates]
    decay = [
        0.5 ** (age / options.half_life_days) if options.half_life_days else 1.0 for age in ages
    ]
    units = ibis.memtable(
        pa.table({"of_date": dates, "units": [round(factor / _UNIT) for factor in decay]})
    )
    edge = _partitions(backend, store, dates)
    edge = edge.inner_join(units, edge[DATE] == units.of_date)
    by_id = edge.group_by(SOURCE, TARGET).agg(weight=(edge[COUNT] * edge.units).sum().cast("int64"))
    by_id = by_id.filter(by_id.weight > 0)
    rows = pa.table({"id": index.id_array, "row": np.arange(len(index), dtype=np.int32)})
    source = ibis.memtable(rows.rename_columns(["source_id", "source_row"]))
    target = ibis.memtable(rows.rename_columns(["target_id", "target_row"]))
    joined = by_id.left_join(source, by_id[SOURCE] == source.source_id)
    joined = joined.left_join(target, joined[TARGET] == target.target_id)
    return joined.select(
        source_row=joined.source_row.fill_null(-1),
        target_row=joined.target_row.fill_null(-1),
        weight=joined.weight,
    )


def _partitions(backend: Any, store: Path, dates: list[str]) -> ibis.Table:
    paths = [str(partition_path(store, date)) for date in dates]
    table = backend.read_parquet(paths, hive_partitioning=True)
    return table.mutate(**{DATE: table[DATE].cast("string")})


def _strongest(pair: ibis.Table, top_n: int) -> ibis.Table:
    forth = pair.select(row=pair.source_row, neighbor=pair.target_row, weight=pair.weight)
    back = pair.select(row=pair.target_row, neighbor=pair.source_row, weight=pair.weight)
    both = ibis.union(forth, back)
    rank = ibis.row_number().over(
        ibis.window(group_by=both.row, order_by=[both.weight.desc(), both.neighbor])
    )
    ranked = both.mutate(rank=rank)
    return ranked.filter(ranked["rank"] < top_n).order_by("row", "rank")


def _to_csr(backend: Any, edges: ibis.Table, items: int) -> CSR:
    rows, neighbors, weights = [], [], []
    for batch in ordered_batches(backend, edges, _BATCH_ROWS):
        rows.append(np.asarray(batch.column("row")).astype(np.int32))
        neighbors.append(np.asarray(batch.column("neighbor")).astype(np.int32))
        weights.append((np.asarray(batch.column("weight")) * _UNIT).astype(np.float32))
    degrees = np.bincount(np.concatenate([np.empty(0, np.int32), *rows]), minlength=items)
    return CSR(
        indptr=np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64),
        indices=np.concatenate([np.empty(0, np.int32), *neighbors]),
        weights=np.concatenate([np.empty(0, np.float32), *weights]),
    )


def _overlap(backend: Any, store: Path, dates: list[str]) -> dict[str, Any] | None:
    if len(dates) < 2:
        return None
    newest, before = dates[-1], dates[-2]
    new, old = (pq.read_metadata(partition_path(store, day)).num_rows for day in (newest, before))
    day = _partitions(backend, store, [newest])
    shared, known = (
        int(day.semi_join(_partitions(backend, store, others), [SOURCE, TARGET]).count().execute())
        for others in ([before], dates[:-1])
    )
    return {
        "date": newest,
        "previous_date": before,
        "jaccard": _share(shared, new + old - shared),
        "seen_before": _share(known, new),
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
