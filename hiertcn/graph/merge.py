"""Merge a sliding window of edge partitions into the item graph.

The weight of an item pair is the sum over the window's days of ``count * 2^(-age / half_life)``,
the age in days before ``as_of``. Pairs are undirected; of each item's pairs the ``top_n`` heaviest
are kept, so an item may list a neighbor that does not list it back. Sums are taken in fixed point
(units of 2^-24), so the result is the same whatever order threads add in, and ties go to the
lower row.

Cost: one pass over the window's partitions, out of core; the graph streams to disk. A
co-interaction whose weight falls below 2^-24 (24 half-lives old) counts nothing.
"""

import datetime
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import ibis
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.events.columns import DATE
from hiertcn.files import whole_directory, write_json
from hiertcn.graph.csr import CSR, STATISTICS_FILE, write_csr
from hiertcn.graph.edges import partition_path, stored_dates
from hiertcn.graph.engine import GraphEngine, connect
from hiertcn.graph.options import GraphOptions
from hiertcn.graph.ordered_rows import OrderedRows
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
        options: ``window_days``, ``half_life_days``, ``top_n``, ``as_of`` and engine limits.

    ``statistics.json`` holds items, isolated_items, edges (directed, as stored), pairs (before the
    ``top_n`` cut), pairs_unknown_items, first_date, last_date, days, quantiles of degree and of
    weight, and ``overlap``: of the newest day's pairs, the share also seen on the day before it
    (``jaccard`` is over both days' pairs) or on any earlier day of the window.

    Raises:
        InputError: the store has no partition in the window, or the engine is not installed or ran
            out of memory or disk.
    """
    dates = _window(store, options)
    with connect(options, output) as engine, whole_directory(output) as aside:
        pair = engine.keep("pair", _decayed_pairs(engine, store, index, dates, options))
        counted = _counts(pair)
        weighty = pair.filter(pair.weight > 0, pair.source_row >= 0, pair.target_row >= 0)
        with engine.ordered(_strongest(weighty, options.top_n)) as rows:
            write_csr(aside, _columns(rows), len(index), rows.count)
        csr = CSR.open(aside)
        isolated = int((csr.degrees == 0).sum())
        statistics = {
            "items": csr.items,
            "isolated_items": isolated,
            "edges": len(csr.indices),
            "pairs": counted["pairs"],
            "pairs_unknown_items": counted["pairs_unknown_items"],
            "first_date": dates[0],
            "last_date": dates[-1],
            "days": len(dates),
            "degree_quantiles": _quantiles(csr.degrees),
            "weight_quantiles": _quantiles(csr.weights),
            "overlap": _overlap(counted, dates),
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


def _decayed_pairs(
    engine: GraphEngine, store: Path, index: IdIndex, dates: list[str], options: GraphOptions
) -> ibis.Table:
    """source_row, target_row int32 (-1 unknown), weight int64 in units of 2^-24, seen: _Seen."""
    newest = datetime.date.fromisoformat(options.as_of or dates[-1])
    ages = [(newest - datetime.date.fromisoformat(date)).days for date in dates]
    decay = [
        0.5 ** (age / options.half_life_days) if options.half_life_days else 1.0 for age in ages
    ]
    day = engine.table(
        pa.table(
            {
                "of_date": dates,
                "units": pa.array([round(factor / _UNIT) for factor in decay], pa.int64()),
                **{
                    name: pa.array([int(place == at) for place in range(-len(dates), 0)], pa.int8())
                    for name, at in (("newest", -1), ("previous", -2))
                },
            }
        )
    )
    edge = engine.read_dated(store, [partition_path(store, date) for date in dates])
    edge = edge.inner_join(day, edge[DATE] == day.of_date)
    by_id = edge.group_by(SOURCE, TARGET).agg(
        weight=(edge[COUNT] * edge.units).sum().cast("int64"),
        newest=edge.newest.max(),
        previous=edge.previous.max(),
        days=edge.count(),
    )
    rows = pa.table({"id": index.id_array, "row": np.arange(len(index), dtype=np.int32)})
    source = engine.table(rows.rename_columns(["source_id", "source_row"]))
    target = engine.table(rows.rename_columns(["target_id", "target_row"]))
    joined = by_id.left_join(source, by_id[SOURCE] == source.source_id)
    joined = joined.left_join(target, joined[TARGET] == target.target_id)
    return joined.select(
        "weight",
        "newest",
        "previous",
        "days",
        source_row=joined.source_row.fill_null(-1),
        target_row=joined.target_row.fill_null(-1),
    )


def _counts(pair: ibis.Table) -> dict[str, int]:
    counts = pair.aggregate(
        pairs=(pair.weight > 0).sum(),
        pairs_unknown_items=(
            (pair.weight > 0) & ((pair.source_row < 0) | (pair.target_row < 0))
        ).sum(),
        newest=pair.newest.sum(),
        previous=pair.previous.sum(),
        both=((pair.newest > 0) & (pair.previous > 0)).sum(),
        seen_before=((pair.newest > 0) & (pair.days > 1)).sum(),
    )
    return {name: int(value or 0) for name, value in counts.to_pyarrow().to_pylist()[0].items()}


def _strongest(pair: ibis.Table, top_n: int) -> ibis.Table:
    forth = pair.select(row=pair.source_row, neighbor=pair.target_row, weight=pair.weight)
    back = pair.select(row=pair.target_row, neighbor=pair.source_row, weight=pair.weight)
    both = ibis.union(forth, back)
    rank = ibis.row_number().over(
        ibis.window(group_by=both.row, order_by=[both.weight.desc(), both.neighbor])
    )
    ranked = both.mutate(rank=rank)
    return ranked.filter(ranked["rank"] < top_n).order_by("row", "rank")


def _columns(rows: OrderedRows) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    for batch in rows.batches(_BATCH_ROWS):
        yield (
            np.asarray(batch.column("row")),
            np.asarray(batch.column("neighbor")),
            np.asarray(batch.column("weight")) * _UNIT,
        )


def _overlap(counted: dict[str, int], dates: list[str]) -> dict[str, Any] | None:
    if len(dates) < 2:
        return None
    new, old, both = counted["newest"], counted["previous"], counted["both"]
    return {
        "date": dates[-1],
        "previous_date": dates[-2],
        "jaccard": _share(both, new + old - both),
        "seen_before": _share(counted["seen_before"], new),
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
