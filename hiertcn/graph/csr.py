"""The item graph in compressed sparse rows, memory-mapped.

A graph is a folder of three arrays and their statistics:

    indptr.npy       int64 [items + 1]    where each item's neighbors begin
    indices.npy      int32 [edges]        neighbors' rows, by falling weight
    weights.npy      float32 [edges]      above 0
    statistics.json  what the merge counted (see ``merge``)

Rows are item rows. An item without neighbors has an empty range. Opening maps the files: constant
time at any size, and processes share the pages.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError

STATISTICS_FILE: Final = "statistics.json"

_INDPTR_FILE: Final = "indptr.npy"
_INDICES_FILE: Final = "indices.npy"
_WEIGHTS_FILE: Final = "weights.npy"


@dataclass(frozen=True, eq=False)
class CSR:
    """Weighted neighbor lists of all items.

    Attributes:
        indptr: int64 [items + 1], ascending from 0.
        indices: int32 [edges], item rows.
        weights: float32 [edges], above 0.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    weights: NDArray[np.float32]

    def __post_init__(self) -> None:
        # Read-only like mapped arrays: numba compiles once more for arrays that can be written.
        for name in ("indptr", "indices", "weights"):
            object.__setattr__(self, name, read_only(getattr(self, name)))

    @property
    def items(self) -> int:
        """Number of items, with or without neighbors."""
        return len(self.indptr) - 1

    @property
    def degrees(self) -> NDArray[np.int64]:
        """Neighbors per item, int64 [items]."""
        return np.diff(self.indptr)

    def write(self, directory: Path) -> None:
        """Write the three arrays into an existing folder."""
        np.save(directory / _INDPTR_FILE, self.indptr)
        np.save(directory / _INDICES_FILE, self.indices)
        np.save(directory / _WEIGHTS_FILE, self.weights)

    @classmethod
    def open(cls, directory: Path) -> "CSR":
        """Map a graph.

        Raises:
            InputError: a file is missing, truncated, of another type, or disagrees with the others.
        """
        arrays = []
        for name, dtype in (
            (_INDPTR_FILE, np.int64),
            (_INDICES_FILE, np.int32),
            (_WEIGHTS_FILE, np.float32),
        ):
            try:
                # Plain views: numba takes 30 us a call to recognize an np.memmap.
                array = np.asarray(np.load(directory / name, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise InputError(
                    f"{directory / name} cannot be mapped ({error}); build the item graph again"
                ) from error
            if array.dtype != dtype or array.ndim != 1:
                raise InputError(
                    f"{directory / name} is {array.dtype} {list(array.shape)}; expected "
                    f"{np.dtype(dtype)} of one dimension; build the item graph again"
                )
            arrays.append(array)
        indptr, indices, weights = arrays
        if not len(indptr) or indptr[-1] != len(indices) or len(indices) != len(weights):
            raise InputError(
                f"the item graph at {directory} has {len(indices)} indices and {len(weights)} "
                f"weights but its {_INDPTR_FILE} does not end there; build the item graph again"
            )
        return cls(indptr, indices, weights)


def write_csr(
    directory: Path,
    degrees: NDArray[np.int64],
    edges: Iterable[tuple[NDArray[Any], NDArray[Any]]],
) -> None:
    """Write a graph whose edges come in pieces, without holding them.

    Args:
        directory: existing folder.
        degrees: int64 [items], neighbors of each.
        edges: pieces of (neighbors, weights), each [n], of all items in turn.
    """
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    indices = _new_array(directory / _INDICES_FILE, np.int32, int(indptr[-1]))
    weights = _new_array(directory / _WEIGHTS_FILE, np.float32, int(indptr[-1]))
    start = 0
    for neighbors, neighbor_weights in edges:
        stop = start + len(neighbors)
        indices[start:stop] = neighbors
        weights[start:stop] = neighbor_weights
        start = stop
    np.save(directory / _INDPTR_FILE, indptr)


def _new_array(path: Path, dtype: type[np.generic], length: int) -> NDArray[Any]:
    if not length:
        # An empty file cannot be mapped for writing.
        np.save(path, np.empty(0, dtype))
        return np.empty(0, dtype)
    return np.lib.format.open_memmap(path, "w+", dtype, (length,))


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a contiguous view of the array that cannot be written through."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
