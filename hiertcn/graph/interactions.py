"""How often each item was interacted with lately: the counts behind the popularity prior."""

import datetime
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hiertcn.events.columns import DATE, ITEM_ID
from hiertcn.graph.edges import event_files
from hiertcn.graph.engine import connect
from hiertcn.graph.options import GraphOptions
from hiertcn.items.index import IdIndex


def decayed_interaction_counts(
    events: Path,
    index: IdIndex,
    options: GraphOptions = GraphOptions(),  # noqa: B008
) -> NDArray[np.float32]:
    """Return each item's interactions, each counting ``2^(-age / half_life)``, float32 [items].

    Args:
        events: folder of ``date=YYYY-MM-DD/*.parquet``.
        index: item rows; interactions with items it does not know are left out.
        options: ``half_life_days`` (0: all count one), ``as_of`` and engine limits; the age is in
            whole days before ``as_of`` or before the log's last day. Later days are left out.

    Raises:
        InputError: no events there, or DuckDB ran out of memory or disk.
    """
    files = event_files(events)
    newest = datetime.date.fromisoformat(options.as_of or max(files))
    paths = [file for date in sorted(files) if date <= newest.isoformat() for file in files[date]]
    counts = np.zeros(len(index), np.float64)
    if not paths:
        return counts.astype(np.float32)
    with connect(options, events) as engine:
        table = engine.read_dated(events, paths)
        grouped: ibis.Table = table.group_by([table[DATE].name("day"), ITEM_ID]).agg(
            n=table.count()
        )
        found: pa.Table = grouped.to_pyarrow()
    ages = np.array(
        [(newest - datetime.date.fromisoformat(date)).days for date in found["day"].to_pylist()]
    )
    decay = 0.5 ** (ages / options.half_life_days) if options.half_life_days else np.ones(len(ages))
    rows = index.rows(found[ITEM_ID])
    known = rows >= 0
    weighted = found["n"].to_numpy() * decay
    # In the order of the rows and days, so that equal logs give equal bits.
    order = np.lexsort((ages, rows))
    order = order[known[order]]
    np.add.at(counts, rows[order], weighted[order])
    return counts.astype(np.float32)
