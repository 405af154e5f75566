"""Search in vectors of 8 bits a coordinate, and order what is found by the table's own vectors.

Each coordinate is cut into 256 steps between its smallest and largest value in the training sample
(faiss ``QT_8bit``, one scale a dimension), which halves a float16 index and quarters a float32 one.
Dot products are then off by about a hundredth of their spread, so the places near the end of a list
are uncertain: a search asks for twice as many candidates and computes their scores again from the
table (TransAct V2 serves PinSage vectors in int8 without that).
"""

from typing import Any, Final, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from hiertcn.items.table import ItemTable

VectorKind = Literal["float16", "int8"]
"""How an index stores its vectors."""

VECTOR_KINDS: Final[tuple[VectorKind, ...]] = ("float16", "int8")

CANDIDATES_PER_RESULT: Final = 2
"""Candidates whose scores are computed again for each item asked for."""


def quantizer_type(kind: VectorKind) -> int:
    """Return faiss' name of how vectors are stored."""
    sizes = {"float16": faiss.ScalarQuantizer.QT_fp16, "int8": faiss.ScalarQuantizer.QT_8bit}
    return int(sizes[kind])


def is_int8(index: Any) -> bool:
    """Whether a faiss index stores 8 bits a coordinate."""
    return bool(index.sq.qtype == faiss.ScalarQuantizer.QT_8bit)


def flat_int8(table: ItemTable, sample: NDArray[np.float32]) -> Any:
    """Return an empty faiss index that compares all vectors, its scales those of a sample.

    Args:
        table: gives the width.
        sample: float32 [n, dim].
    """
    index = faiss.IndexScalarQuantizer(
        table.dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.train(sample)
    return index


def search_index(
    index: Any, table: ItemTable, queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ``k`` best rows that the index finds, and their scores by the table's vectors.

    Args:
        index: a faiss index of the table, by inner product.
        table: the vectors; read only if the index stores 8 bits.
        queries: float32 [batch, dim].
        k: number of items, at most those of the table.

    Returns:
        rows int64 [batch, k], -1 where fewer were found, and scores float32 [batch, k].
    """
    if not is_int8(index):
        scores, rows = index.search(queries, k)
        return rows, scores
    _, rows = index.search(queries, min(CANDIDATES_PER_RESULT * k, len(table)))
    return rescored(table, queries, rows, k)


def rescored(
    table: ItemTable, queries: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ``k`` best of some rows by the table's vectors, best first.

    Args:
        table: the vectors.
        queries: float32 [batch, dim].
        rows: int64 [batch, n], -1 for none, ``n >= k``.
        k: number of items.

    Returns:
        rows int64 [batch, k] and scores float32 [batch, k], -1 and -inf where there are fewer.
    """
    found = np.empty((len(rows), k), np.int64)
    best = np.empty((len(rows), k), np.float32)
    for place, query in enumerate(queries):
        scores = table.gather(rows[place]) @ query
        scores[rows[place] < 0] = -np.inf
        order = np.argsort(-scores, kind="stable")[:k]
        found[place], best[place] = rows[place, order], scores[order]
    return found, best
