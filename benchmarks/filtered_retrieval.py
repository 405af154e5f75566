"""Catalogue search among the items that pass a filter: time and recall, by the share that passes.

    python -m benchmarks.filtered_retrieval [--items 200000] [--json PATH]

Searching among what passes (``hiertcn/items/restricted_search.py``) beside the usual alternative:
search all for more than is wanted, and throw away what does not pass. Recall is against comparing
every item. Random vectors in clusters, one thread, one query at a time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.files import write_json
from hiertcn.items.neighbor_building import build_neighbor_index
from hiertcn.items.neighbors import NeighborIndex
from hiertcn.items.table import ItemTable

_SHARES: Final = (0.001, 0.01, 0.05, 0.2, 0.5, 0.9)
_QUERIES: Final = 50

Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=129)
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    centers = random.normal(size=(1000, arguments.dim)).astype(np.float32)
    vectors = centers[random.integers(0, len(centers), arguments.items)]
    vectors += 0.5 * random.normal(size=vectors.shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        table = ItemTable.write(Path(scratch, "table"), vectors)
        build_neighbor_index(table, Path(scratch, "index"), exact_below=0, seed=0)
        index = NeighborIndex.open(Path(scratch, "index"), table)
        rows = [
            _measured(index, vectors, random.random(arguments.items) < share, share, arguments.k)
            for share in _SHARES
        ]
    print(json.dumps(rows, indent=2))
    if arguments.json:
        write_json(arguments.json, {"items": arguments.items, "k": arguments.k, "shares": rows})


def _measured(
    index: NeighborIndex,
    vectors: NDArray[np.float32],
    among: NDArray[np.bool_],
    share: float,
    k: int,
) -> dict[str, Any]:
    random = np.random.default_rng(1)
    chosen = random.integers(0, len(vectors), _QUERIES)
    queries = vectors[chosen] + 0.5 * random.normal(size=(_QUERIES, vectors.shape[1])).astype(
        np.float32
    )
    passing = np.flatnonzero(among)
    wanted = min(k, len(passing))
    best = [passing[np.argsort(-(vectors[passing] @ query))[:wanted]] for query in queries]
    more = min(len(vectors), int(2 * k / share))

    def restricted(query: NDArray[np.float32]) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = index.search(query[None], wanted, among=among)[0][0]
        return rows

    def thrown_away(query: NDArray[np.float32]) -> NDArray[np.int64]:
        found = index.search(query[None], more)[0][0]
        found = found[found >= 0]
        rows: NDArray[np.int64] = found[among[found]][:wanted]
        return rows

    row: dict[str, Any] = {"share": share, "pass": len(passing)}
    for name, search in (("among", restricted), ("thrown_away", thrown_away)):
        row[name] = _timed(search, queries, best, wanted)
    row["times_faster"] = row["thrown_away"]["ms"] / row["among"]["ms"]
    return row


def _timed(
    search: Search,
    queries: NDArray[np.float32],
    best: list[NDArray[np.int64]],
    wanted: int,
) -> dict[str, float]:
    search(queries[0])
    began = time.process_time()
    found = [search(query) for query in queries]
    spent = time.process_time() - began
    shared = [len(np.intersect1d(*pair)) / wanted for pair in zip(found, best, strict=True)]
    return {"ms": 1e3 * spent / len(queries), "recall": float(np.mean(shared))}


if __name__ == "__main__":
    main()
