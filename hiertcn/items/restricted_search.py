"""Search among some of the items only.

Few items are compared one by one, which is exact. Among many the inverted lists are searched with
the others masked out, in more lists the fewer pass, and in ever more until enough are found.
``benchmarks/filtered_retrieval.py`` measures both.
"""

from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from hiertcn.items.table import ItemTable

MOST_COMPARED: Final = 16_384
"""Items up to which all are compared with the query."""

_FARTHER: Final = 4


def search_among(
    queries: NDArray[np.float32],
    k: int,
    among: NDArray[np.bool_],
    table: ItemTable,
    index: Any,
    probes: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The ``k`` items of ``among`` with the largest dot product to each query, best first.

    Args:
        queries: float32 ``[batch, dim]``.
        k: at most the number of items that are ``among``, and at least 1.
        among: bool ``[items]``.
        table: the vectors.
        index: inverted lists over the table, None to compare all.
        probes: lists to search where every item counts.

    Returns:
        rows int64 ``[batch, k]`` and scores float32 ``[batch, k]``.
    """
    rows = np.flatnonzero(among)
    if index is None or len(rows) <= MOST_COMPARED:
        scores, places = faiss.knn(
            queries, table.gather(rows), k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return rows[places], scores
    # faiss's stubs know the C++ constructors only.
    selector = faiss.IDSelectorBitmap(  # type: ignore[call-arg]
        np.packbits(among, bitorder="little")  # type: ignore[arg-type]
    )
    # The lists hold fewer that count, and the best of some lie farther out than the best of all.
    probes = min(int(index.nlist), -(-_FARTHER * probes * len(among) // len(rows)))
    while True:
        parameters = faiss.SearchParametersIVF(  # type: ignore[call-arg]
            sel=selector, nprobe=probes
        )
        scores, found = index.search(queries, k, params=parameters)
        if probes >= index.nlist or (found >= 0).all():
            return found, scores
        probes = min(4 * probes, int(index.nlist))
