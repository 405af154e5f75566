"""Importance neighborhoods: items a second of ours, of numpy and of torch, and peak memory.

    python -m benchmarks.random_walks [--items 2000000] [--degree 10] [--json PATH]

50 walks of 4 steps from each item and the 50 most visited, on a random graph with random weights.
All three do the same thing in chunks of items; numpy and torch walk a random part of the items,
since they are slower, and torch runs on as many threads. ``--to-files`` writes our result to files
(bounded memory); ``--items 30000000 --degree 10 --to-files --only-ours`` is the large one.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from hiertcn.files import write_json
from hiertcn.graph.csr import CSR, write_csr
from hiertcn.graph.walks import WalkOptions, walk_neighborhoods, write_neighborhoods

_CHUNK: Final = 1 << 12


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=2_000_000)
    parser.add_argument("--degree", type=int, default=10)
    parser.add_argument("--walks", type=int, default=50)
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--top", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=int, default=1 << 17, help="items numpy and torch walk")
    parser.add_argument("--to-files", action="store_true")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the graph goes (default: temporary)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    options = WalkOptions(walks=arguments.walks, length=arguments.length, top=arguments.top)
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        csr = draw_graph(folder, arguments.items, arguments.degree)
        # Compiled before it is timed.
        walk_neighborhoods(draw_graph(folder, 1000, arguments.degree), options, progress=False)
        began = time.perf_counter()
        if arguments.to_files:
            write_neighborhoods(csr, options, folder / "walks", threads=arguments.threads)
        else:
            walk_neighborhoods(csr, options, threads=arguments.threads)
        figures: dict[str, Any] = {
            "items": csr.items,
            "edges": len(csr.indices),
            "ours_items_per_s": round(csr.items / (time.perf_counter() - began)),
            "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }
        if not arguments.only_ours:
            homes = np.random.default_rng(1).permutation(csr.items)[: arguments.sample]
            cumulated = _cumulated(csr)
            for name, walk in (("numpy", _numpy_walk), ("torch", _torch_walk)):
                rate = _rate(walk, csr, cumulated, homes, options)
                figures[f"{name}_items_per_s"] = round(rate)
                figures[f"ratio_to_{name}"] = round(figures["ours_items_per_s"] / rate, 2)
    for name, value in figures.items():
        print(f"{name:<20} {value:,}")
    if arguments.json:
        write_json(arguments.json, figures)


def draw_graph(folder: Path, items: int, degree: int, seed: int = 0) -> CSR:
    """Write and map a graph whose items each have ``degree`` random neighbors."""
    rng = np.random.default_rng(seed)
    directory = folder / f"graph-{items}"
    directory.mkdir()

    def pieces() -> Any:
        for first in range(0, items, 1 << 20):
            count = min(1 << 20, items - first)
            neighbors = rng.integers(0, items, count * degree, np.int32)
            yield neighbors, rng.random(len(neighbors), np.float32) + np.float32(0.1)

    write_csr(directory, np.full(items, degree), pieces())
    return CSR.open(directory)


def _cumulated(csr: CSR) -> NDArray[np.float64]:
    """Sums of weights over all edges: one search finds an edge by weight, in any item's range."""
    return np.concatenate([[0.0], np.cumsum(csr.weights, dtype=np.float64)])


def _rate(
    walk: Callable[..., None],
    csr: CSR,
    cumulated: NDArray[np.float64],
    homes: NDArray[np.int64],
    options: WalkOptions,
) -> float:
    arrays = (csr.indptr, csr.indices, cumulated)
    if walk is _torch_walk:
        arrays = tuple(torch.from_numpy(array.copy()) for array in arrays)  # type: ignore[assignment]
    walk(*arrays, homes[:_CHUNK], options)
    began = time.perf_counter()
    for first in range(0, len(homes), _CHUNK):
        walk(*arrays, homes[first : first + _CHUNK], options)
    return len(homes) / (time.perf_counter() - began)


def _numpy_walk(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    cumulated: NDArray[np.float64],
    homes: NDArray[np.int64],
    options: WalkOptions,
) -> None:
    rng = np.random.default_rng(0)
    home = np.repeat(homes, options.walks)
    here = home.copy()
    visits = []
    for _ in range(options.length):
        here = np.where(rng.random(len(here)) < options.restart, home, here)
        low, high = cumulated[indptr[here]], cumulated[indptr[here + 1]]
        edge = np.searchsorted(cumulated, low + rng.random(len(here)) * (high - low), "right") - 1
        here = indices[np.clip(edge, indptr[here], indptr[here + 1] - 1)].astype(np.int64)
        visits.append(here)
    place = np.tile(np.repeat(np.arange(len(homes)), options.walks), options.length)
    visited = np.concatenate(visits)
    key = (place << 32) | visited
    found, count = np.unique(key[visited != homes[place]], return_counts=True)
    owner = found >> 32
    order = np.lexsort((found, -count, owner))
    starts = np.searchsorted(owner[order], np.arange(len(homes)))
    rank = np.arange(len(order)) - starts[owner[order]]
    top = order[rank < options.top]
    rows = np.full((len(homes), options.top), -1, np.int32)
    rows[owner[top], rank[rank < options.top]] = found[top] & 0xFFFFFFFF


def _torch_walk(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    cumulated: torch.Tensor,
    homes: NDArray[np.int64],
    options: WalkOptions,
) -> None:
    starts = torch.from_numpy(homes)
    home = starts.repeat_interleave(options.walks)
    here = home
    visits = []
    for _ in range(options.length):
        here = torch.where(torch.rand(len(here)) < options.restart, home, here)
        low, high = cumulated[indptr[here]], cumulated[indptr[here + 1]]
        drawn = low + torch.rand(len(here), dtype=torch.float64) * (high - low)
        edge = torch.searchsorted(cumulated, drawn, right=True) - 1
        here = indices[torch.clamp(edge, indptr[here], indptr[here + 1] - 1)].long()
        visits.append(here)
    place = torch.arange(len(homes)).repeat_interleave(options.walks).repeat(options.length)
    visited = torch.cat(visits)
    key = ((place << 32) | visited)[visited != starts[place]]
    found, count = torch.unique(key, return_counts=True)
    owner = found >> 32
    # By owner, then falling count; ``found`` ascends, and the sort is stable.
    order = torch.argsort((owner << 32) - count, stable=True)
    first = torch.searchsorted(owner[order].contiguous(), torch.arange(len(homes)))
    rank = torch.arange(len(order)) - first[owner[order]]
    top = order[rank < options.top]
    rows = torch.full((len(homes), options.top), -1, dtype=torch.int32)
    rows[owner[top], rank[rank < options.top]] = (found[top] & 0xFFFFFFFF).int()


if __name__ == "__main__":
    main()
