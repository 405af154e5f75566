"""Nearest-neighbour search: exact, inverted lists and 8-bit vectors, side by side on one table.

    python -m benchmarks.neighbor_index [--items 300000] [--dim 128] [--hnsw]

Items are unit vectors around centres whose sizes fall like Zipf's law, queries are noisy items that
no index was built with. Recall is the share of the exact 100 best items. Searches of the variants
take turns, so that what else the machine does meets all of them; one thread. HNSW is not an index
of ours: faiss with 32 links, 80 candidates while it is built, and as many while it searches as
reach a recall of .95, doubled from 100.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from hiertcn.files import write_json
from hiertcn.items.inverted_lists import least_exact_scores
from hiertcn.items.neighbor_building import build_neighbor_index
from hiertcn.items.neighbors import NeighborIndex
from hiertcn.items.reranking import VectorKind
from hiertcn.items.table import ItemTable

_K: Final = 100
_BATCH: Final = 32
_TOLERANCE: Final = 1e-5
_ALWAYS: Final = 1 << 40
_VARIANTS: Final[dict[str, tuple[int, VectorKind]]] = {
    "exact": (_ALWAYS, "float16"),
    "inverted lists, float16": (0, "float16"),
    "inverted lists, int8": (0, "int8"),
    "all compared, int8": (_ALWAYS, "int8"),
}
"""Of each: the number of items below which none is left out, and how vectors are stored."""

Search = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Scores of the best items: float32 [batch, dim] -> float32 [batch, k]."""


def main() -> None:
    """Print the table."""
    arguments = _parse()
    with tempfile.TemporaryDirectory() as folder:
        table = ItemTable.write(
            Path(folder) / "table", _vectors(arguments.items, arguments.dim), "float16"
        )
        queries = _queries(table, arguments.queries)
        rows: dict[str, dict[str, Any]] = {}
        searches: dict[str, Search] = {}
        for name, (exact_below, vectors) in _VARIANTS.items():
            path = Path(folder) / name.replace(" ", "-")
            built = build_neighbor_index(table, path, exact_below=exact_below, vectors=vectors)
            index = NeighborIndex.open(path, table)
            searches[name] = _search(index)
            exact_bytes = arguments.items * arguments.dim * 4
            rows[name] = {
                "build_s": built.seconds,
                "memory_mb": (exact_bytes if built.kind == "exact" else built.bytes) / 1e6,
                "probes": built.probes,
                "lists": built.lists,
            }
            if built.quantization is not None:
                rows[name]["recall_lost_to_int8"] = built.quantization.lost
                rows[name]["lost_without_reranking"] = built.quantization.lost_without_reranking
        faiss.omp_set_num_threads(1)
        least = least_exact_scores(table, queries, _K) - _TOLERANCE
        if arguments.hnsw:
            searches["HNSW"], rows["HNSW"] = _hnsw(table, queries, least)
        _measure(searches, queries, least, rows)
    _show(arguments, rows)
    if arguments.json:
        write_json(arguments.json, {**vars(arguments), "json": None, "rows": rows})


def _search(index: NeighborIndex) -> Search:
    return lambda asked: index.search(asked, _K)[1]


def _vectors(items: int, dim: int) -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    clusters = max(1, items // 300)
    centres = random.standard_normal((clusters, dim), np.float32)
    shares = 1.0 / np.arange(1, clusters + 1) ** 0.8
    chosen = random.choice(clusters, items, p=shares / shares.sum())
    vectors = centres[chosen] + random.standard_normal((items, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _queries(table: ItemTable, count: int) -> NDArray[np.float32]:
    random = np.random.default_rng(1)
    vectors = table.gather(random.choice(len(table), count, replace=False))
    spread = vectors.std(axis=0)
    noisy: NDArray[np.float32] = vectors + 0.5 * spread * random.standard_normal(
        vectors.shape, np.float32
    )
    return noisy


def _hnsw(
    table: ItemTable, queries: NDArray[np.float32], least: NDArray[np.float32]
) -> tuple[Search, dict[str, Any]]:
    started = time.perf_counter()
    index = faiss.IndexHNSWFlat(table.dim, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 80
    index.add(table.gather(np.arange(len(table))))
    seconds = time.perf_counter() - started
    candidates = _K
    while True:
        index.hnsw.efSearch = candidates
        scores, _ = index.search(queries, _K)
        if candidates >= len(table) or (scores >= least[:, None]).mean() >= 0.95:
            break
        candidates *= 2
    links_mb = len(table) * 32 * 2 * 4 / 1e6
    return (
        lambda asked: index.search(asked, _K)[0],
        {
            "build_s": seconds,
            "memory_mb": len(table) * table.dim * 4 / 1e6 + links_mb,
            "candidates": candidates,
        },
    )


def _measure(
    searches: dict[str, Search],
    queries: NDArray[np.float32],
    least: NDArray[np.float32],
    rows: dict[str, dict[str, Any]],
) -> None:
    one: dict[str, list[float]] = {name: [] for name in searches}
    many: dict[str, list[float]] = {name: [] for name in searches}
    for name, search in searches.items():
        scores = np.concatenate(
            [search(queries[at : at + _BATCH]) for at in range(0, len(queries), _BATCH)]
        )
        rows[name]["recall"] = float((scores >= least[:, None]).mean())
    for at in range(len(queries)):
        for name, search in searches.items():
            started = time.perf_counter()
            search(queries[at : at + 1])
            one[name].append(time.perf_counter() - started)
    for at in range(0, len(queries) - _BATCH + 1, _BATCH):
        for name, search in searches.items():
            started = time.perf_counter()
            search(queries[at : at + _BATCH])
            many[name].append((time.perf_counter() - started) / _BATCH)
    for name, row in rows.items():
        row["ms_per_query"] = 1e3 * float(np.median(one[name]))
        row["ms_per_query_in_batches"] = 1e3 * float(np.median(many[name]))
        row["speedup_over_exact"] = float(np.median(one["exact"]) / np.median(one[name]))


def _show(arguments: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    print(f"{arguments.items:,} items of {arguments.dim}, {arguments.queries} queries, best {_K}\n")
    print("| | build s | memory MB | recall | ms a query | in batches of 32 | over exact |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['build_s']:.1f} | {row['memory_mb']:.0f} | {row['recall']:.4f} | "
            f"{row['ms_per_query']:.2f} | {row['ms_per_query_in_batches']:.2f} | "
            f"{row['speedup_over_exact']:.1f}x |"
        )
    print(json.dumps(rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=256, help="at least 32")
    parser.add_argument("--hnsw", action="store_true", help="also build faiss HNSW (minutes)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
