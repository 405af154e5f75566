"""Importance neighborhoods: whom random walks from an item visit most (PinSage, section 3.1).

From every item ``walks`` walks of ``length`` steps start. Before each step the walk returns to its
start with probability ``restart``, then moves to a neighbor with probability proportional to the
edge's weight; an item without neighbors sends it back to the start. The ``top`` most visited other
items are the neighborhood, the normalized visit counts its weights: with ``p_0`` at the start and
``p_t = (restart * p_0 + (1 - restart) * p_{t-1}) W`` the counts estimate ``sum_t p_t``, ties going
to the lower row.

Every item has a random stream of its own (SplitMix64 from the seed and the row), so the result
depends on the seed alone, not on threads or chunks. The walks of an item take each step together:
their loads from a graph that outgrows the caches then overlap instead of waiting for each other.
An edge is chosen by Walker's alias method from one 8-byte entry per edge (its probability, like
the restart's, to 1 part in 65,536), which takes one or two cache lines where a search takes
several. Memory: 8 bytes per edge and per item, beside the result unless that goes to files.
Compiled by numba at the first call (a few seconds, cached on disk).
"""

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.files import read_json, whole_directory, write_json
from hiertcn.graph.csr import CSR, read_only
from hiertcn.graph.walk_kernels import alias_entries, walk_items

NO_ITEM: Final = -1

_ROWS_FILE: Final = "rows.npy"
_WEIGHTS_FILE: Final = "weights.npy"
_OPTIONS_FILE: Final = "walks.json"
_ITEMS_PER_TASK: Final = 1 << 12
_TASKS_AHEAD: Final = 4
_MOST_NEIGHBORS: Final = 1 << 16

_Part = tuple[NDArray[np.int32], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class WalkOptions:
    """How neighborhoods are walked.

    Attributes:
        walks: walks from each item.
        length: steps of a walk.
        restart: probability of returning to the start before a step, at least 0 and below 1.
        top: neighbors kept.
        seed: of the random streams.
    """

    walks: int = 50
    length: int = 4
    restart: float = 0.3
    top: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("walks", "length", "top"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.restart < 1:
            raise InputError(f"restart is {self.restart}; expected a probability in [0, 1)")


@dataclass(frozen=True, eq=False)
class Neighborhoods:
    """The most visited items around each item.

    Attributes:
        rows: int32 [items, top], by falling weight, -1 where there are fewer.
        weights: float32 [items, top], summing to 1 over an item's neighbors, 0 beside a -1.
        options: how they were walked, so that they can be walked again on another graph.
    """

    rows: NDArray[np.int32]
    weights: NDArray[np.float32]
    options: WalkOptions

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", read_only(self.rows))
        object.__setattr__(self, "weights", read_only(self.weights))

    def __len__(self) -> int:
        return len(self.rows)

    def write(self, directory: Path) -> None:
        """Write the arrays and how they were walked, whole or not at all."""
        with whole_directory(directory) as aside:
            np.save(aside / _ROWS_FILE, self.rows)
            np.save(aside / _WEIGHTS_FILE, self.weights)
            write_json(aside / _OPTIONS_FILE, asdict(self.options))

    @classmethod
    def open(cls, directory: Path) -> "Neighborhoods":
        """Map neighborhoods that :meth:`write` wrote.

        Raises:
            InputError: a file is missing, truncated, or disagrees with the others.
        """
        try:
            rows, weights = (
                np.asarray(np.load(directory / name, mmap_mode="r", allow_pickle=False))
                for name in (_ROWS_FILE, _WEIGHTS_FILE)
            )
            options = WalkOptions(**read_json(directory / _OPTIONS_FILE))
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise InputError(
                f"the neighborhoods at {directory} cannot be mapped ({error}); walk again"
            ) from error
        if rows.shape != weights.shape or rows.shape[1:] != (options.top,):
            raise InputError(
                f"the neighborhoods at {directory} have rows {list(rows.shape)} and weights "
                f"{list(weights.shape)}, expected [items, {options.top}] each; walk again"
            )
        return cls(rows, weights, options)


def importance_neighborhoods(
    csr: CSR,
    *,
    walks: int = 50,
    length: int = 4,
    restart: float = 0.3,
    top: int = 10,
    seed: int = 0,
    threads: int = 0,
    progress: bool = True,
) -> Neighborhoods:
    """Walk from every item of the graph and return whom the walks visit most.

    Args:
        csr: the item graph, at most 65,536 neighbors an item.
        walks, length, restart, top, seed: see :class:`WalkOptions`.
        threads: 0 means one per core; the result does not depend on it.
        progress: show a progress bar.

    Raises:
        InputError: an option is out of its range, or an item has more neighbors.
    """
    options = WalkOptions(walks=walks, length=length, restart=restart, top=top, seed=seed)
    return walk_neighborhoods(csr, options, threads=threads, progress=progress)


def walk_neighborhoods(
    csr: CSR, options: WalkOptions, *, threads: int = 0, progress: bool = True
) -> Neighborhoods:
    """Like :func:`importance_neighborhoods`, from one options object."""
    rows = np.empty((csr.items, options.top), np.int32)
    weights = np.empty((csr.items, options.top), np.float32)
    start = 0
    for part_rows, part_weights in _walked(csr, options, threads, progress):
        stop = start + len(part_rows)
        rows[start:stop], weights[start:stop] = part_rows, part_weights
        start = stop
    return Neighborhoods(rows, weights, options)


def write_neighborhoods(
    csr: CSR, options: WalkOptions, directory: Path, *, threads: int = 0, progress: bool = True
) -> Neighborhoods:
    """Like :func:`walk_neighborhoods`, into files: memory does not grow with the result.

    The folder appears whole or not at all; the neighborhoods come back mapped.
    """
    shape = (csr.items, options.top)
    with whole_directory(directory) as aside:
        with (
            _array_file(aside / _ROWS_FILE, np.int32, shape) as rows,
            _array_file(aside / _WEIGHTS_FILE, np.float32, shape) as weights,
        ):
            for part_rows, part_weights in _walked(csr, options, threads, progress):
                part_rows.tofile(rows)
                part_weights.tofile(weights)
        write_json(aside / _OPTIONS_FILE, asdict(options))
    return Neighborhoods.open(directory)


@contextlib.contextmanager
def _array_file(path: Path, dtype: type[np.generic], shape: tuple[int, int]) -> Iterator[IO[bytes]]:
    """Open a .npy file whose rows follow its header as they come."""
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def _walked(csr: CSR, options: WalkOptions, threads: int, progress: bool) -> Iterator[_Part]:
    """Yield rows and weights [n, top] of all items, in their order."""
    most = int(csr.degrees.max(initial=0))
    if most > _MOST_NEIGHBORS:
        raise InputError(
            f"item row {csr.degrees.argmax()} has {most} neighbors; walks take at most "
            f"{_MOST_NEIGHBORS}, so build the graph with a smaller top_n"
        )
    # Copies in memory of our own: the kernel gives it large pages, unlike a mapped file's.
    indptr = np.array(csr.indptr)
    entries = np.empty(len(csr.indices), np.uint64)
    alias_entries(csr.indptr, csr.indices, csr.weights, entries)

    def walk(first: int) -> _Part:
        count = min(_ITEMS_PER_TASK, csr.items - first)
        rows = np.full((count, options.top), NO_ITEM, np.int32)
        weights = np.zeros((count, options.top), np.float32)
        walk_items(
            indptr,
            entries,
            first,
            options.walks,
            options.length,
            np.uint64(round(options.restart * 2**16)),
            np.uint64(options.seed & (2**64 - 1)),
            rows,
            weights,
        )
        return rows, weights

    workers = threads or os.cpu_count() or 1
    bar = tqdm(
        total=csr.items, desc="walks", unit="item", mininterval=2, disable=not progress or None
    )
    # Threads of our own: numba's would set how many threads the OpenMP shared with torch uses.
    with bar, ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[_Part]] = deque()
        for first in range(0, csr.items, _ITEMS_PER_TASK):
            waiting.append(pool.submit(walk, first))
            if len(waiting) > workers * _TASKS_AHEAD:
                yield _counted(waiting.popleft().result(), bar)
        while waiting:
            yield _counted(waiting.popleft().result(), bar)


def _counted(part: _Part, bar: Any) -> _Part:
    bar.update(len(part[0]))
    return part
