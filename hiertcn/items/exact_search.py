"""The best items of a table by dot product, by looking at all of them, in bounded memory."""

from typing import Final

import faiss
import numpy as np
from numpy.typing import NDArray

from hiertcn.items.table import ItemTable

_CHUNK_ROWS: Final = 65_536


def best_items(
    table: ItemTable, queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ``k`` best items of each query, in any order.

    Args:
        table: the item vectors.
        queries: float32 [n, dim].
        k: at most the number of items.

    Returns:
        int64 [n, k], their rows, and float32 [n, k], their scores.
    """
    best = np.full((len(queries), k), -np.inf, np.float32)
    best_rows = np.full((len(queries), k), -1, np.int64)
    for start in range(0, len(table), _CHUNK_ROWS):
        rows = np.arange(start, min(start + _CHUNK_ROWS, len(table)))
        scores, found = faiss.knn(
            queries, table.gather(rows), min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
        )
        both = np.concatenate([best, scores], axis=1)
        both_rows = np.concatenate([best_rows, found + start], axis=1)
        kept = np.argpartition(both, both.shape[1] - k, axis=1)[:, -k:]
        best = np.take_along_axis(both, kept, axis=1)
        best_rows = np.take_along_axis(both_rows, kept, axis=1)
    return best_rows, best
