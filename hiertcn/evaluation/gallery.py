"""The report's gallery: some popular and some rare items with their nearest neighbours.

A table of figures says whether the item vectors are good; a reader who knows the items sees in a
minute what is wrong with them. Neighbours are by cosine among all items, without the popularity
prior that the item table holds beside the vectors. Rare items are drawn by the seed among those
with the fewest interactions, because that is where vectors learnt from a graph are weakest.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiertcn.evaluation.report_parts import Cell, Row, Section, Table
from hiertcn.items.inverted_lists import QuantizationCost

_CHUNK_ROWS: Final = 65_536
_RAREST_SHARE: Final = 0.1

Labels = Callable[[NDArray[np.int64]], Sequence[str]]


def gallery_section(
    vectors: NDArray[np.floating[Any]],
    interactions: ArrayLike,
    labels: Labels,
    *,
    shown: int = 6,
    neighbors: int = 5,
    quantization: QuantizationCost | None = None,
    seed: int = 0,
) -> Section:
    """Return the section.

    Args:
        vectors: [items, dim], of any floats; without a popularity prior.
        interactions: [items], how often each was interacted with; items without any are not
            shown, but may be neighbours.
        labels: names items, int64 [n].
        shown: popular items, and rare ones.
        neighbors: of each.
        quantization: what 8 bits a coordinate would cost the neighbour search, if measured.
        seed: of the choice of rare items.
    """
    counts = np.asarray(interactions)
    popular, rare = _chosen(counts, shown, seed)
    chosen = np.concatenate([popular, rare])
    rows, cosines = nearest(vectors, chosen, neighbors)
    names = dict(zip(*_named(np.concatenate([chosen, rows.ravel()]), labels), strict=True))
    tables = tuple(
        Table(
            caption,
            ("Item", "Interactions", *(f"Neighbor {place + 1}" for place in range(rows.shape[1]))),
            tuple(
                Row(
                    names[int(item)],
                    (
                        Cell(f"{int(counts[item]):,}"),
                        *(
                            Cell(names[int(near)], detail=f"{cosine:.2f}")
                            for near, cosine in zip(rows[at], cosines[at], strict=True)
                            if near >= 0
                        ),
                    ),
                )
                for at, item in part
            ),
            wraps=True,
        )
        for caption, part in (
            ("Popular items", list(enumerate(popular))),
            ("Rare items", list(enumerate(rare, len(popular)))),
        )
        if part
    )
    paragraphs = ["Nearest items by the cosine of their vectors, which stands beside each."]
    if quantization is not None:
        paragraphs.append(
            "Stored in 8 bits a coordinate, the vectors would miss "
            f"{quantization.lost_without_reranking:.2%} of the nearest items, and "
            f"{quantization.lost:.2%} once candidates are ordered by the table's own vectors."
        )
    return Section("gallery", "Item neighbors", paragraphs=tuple(paragraphs), tables=tables)


def nearest(
    vectors: NDArray[np.floating[Any]], queries: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ``k`` items with the largest cosine to each query item, itself left out.

    Args:
        vectors: [items, dim], read 65,536 rows at a time; a zero vector's cosine is 0.
        queries: int64 [n], item rows.
        k: number of neighbours; fewer are returned if there are fewer other items.

    Returns:
        rows int64 [n, k], best first, and their cosines float32 [n, k].
    """
    k = min(k, len(vectors) - 1)
    wanted = _unit(vectors[queries])
    rows = np.empty((len(queries), 0), np.int64)
    cosines = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(vectors), _CHUNK_ROWS):
        part = np.arange(start, min(start + _CHUNK_ROWS, len(vectors)))
        found = wanted @ _unit(vectors[part]).T
        found[queries[:, None] == part] = -np.inf
        rows = np.concatenate([rows, np.broadcast_to(part, found.shape)], axis=1)
        cosines = np.concatenate([cosines, found], axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        rows = np.take_along_axis(rows, order, axis=1)
        cosines = np.take_along_axis(cosines, order, axis=1)
    return rows, cosines


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    wide = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
    return unit


def _chosen(
    counts: NDArray[Any], shown: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    known = np.flatnonzero(counts > 0)
    by_count = known[np.argsort(-counts[known], kind="stable")]
    popular = by_count[:shown]
    others = by_count[shown:]
    rarest = others[max(0, len(others) - max(shown, int(len(by_count) * _RAREST_SHARE))) :]
    drawn = np.random.default_rng(seed).permutation(len(rarest))[:shown]
    return popular, rarest[np.sort(drawn)]


def _named(rows: NDArray[np.int64], labels: Labels) -> tuple[list[int], Sequence[str]]:
    distinct = np.unique(rows[rows >= 0])
    return distinct.tolist(), labels(distinct)
