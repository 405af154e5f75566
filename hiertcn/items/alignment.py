"""How today's item vectors lie to yesterday's, and the rotation that brings them closest.

Dot products and neighbors are the same in any rotation of a table, so two days' encoders may agree
on everything and still give vectors that differ in every coordinate; weights trained on
yesterday's coordinates then start from nothing. The orthogonal Procrustes problem (Schönemann
1966) asks for the rotation ``R`` that minimizes ``|now R - then|``; it is ``U V^T`` of the singular
value decomposition ``now^T then = U S V^T``. It changes no ranking within a day.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError

_QUERIES_PER_SLICE = 256


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far items moved from one day to the next.

    Attributes:
        items: items of both days that were compared.
        cosine: mean cosine between an item's two vectors, as today's encoder gave them;
            ``cosine_p10`` is the tenth percentile.
        aligned_cosine: the mean after the rotation that brings today's closest; so the part of the
            drift that no rotation explains. ``aligned_cosine_p10`` likewise.
        neighbor_overlap: mean share of an item's 10 nearest among the compared items that are the
            same on both days; a rotation does not change it.
        aligned: whether today's vectors are used rotated.
    """

    items: int
    cosine: float
    cosine_p10: float
    aligned_cosine: float
    aligned_cosine_p10: float
    neighbor_overlap: float
    aligned: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)


def procrustes_rotation(
    now: NDArray[np.floating[Any]], then: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Return the orthogonal ``R``, float64 [dim, dim], that brings ``now @ R`` closest to ``then``.

    Args:
        now: [items, dim].
        then: [items, dim], row by row the same items.

    Raises:
        InputError: the shapes differ.
    """
    if now.shape != then.shape or now.ndim != 2:
        raise InputError(
            f"the vectors to align have the shapes {list(now.shape)} and {list(then.shape)}; "
            "expected the same items in the same width"
        )
    left, _, right = np.linalg.svd(np.asarray(now, np.float64).T @ np.asarray(then, np.float64))
    rotation: NDArray[np.float64] = left @ right
    return rotation


def measure_drift(
    now: NDArray[np.float32],
    then: NDArray[np.float32],
    rotation: NDArray[np.float64],
    *,
    aligned: bool,
    queries: int = 1_000,
    neighbors: int = 10,
    seed: int = 0,
) -> Drift:
    """Compare two days' vectors of the same items.

    Args:
        now, then: float32 [items, dim].
        rotation: of :func:`procrustes_rotation`.
        aligned: see :class:`Drift`.
        queries: items, drawn by the seed, whose neighbors are compared.
        neighbors: nearest items, by cosine, compared of each.
        seed: of the draw.
    """
    now, then = _unit(now), _unit(then)
    plain = (now * then).sum(axis=1)
    turned = ((now @ rotation.astype(np.float32)) * then).sum(axis=1)
    asked = np.random.default_rng(seed).permutation(len(now))[:queries]
    return Drift(
        items=len(now),
        cosine=float(plain.mean()),
        cosine_p10=float(np.quantile(plain, 0.1)),
        aligned_cosine=float(turned.mean()),
        aligned_cosine_p10=float(np.quantile(turned, 0.1)),
        neighbor_overlap=_overlap(now, then, asked, min(neighbors, len(now) - 1)),
        aligned=aligned,
    )


def _overlap(
    now: NDArray[np.float32], then: NDArray[np.float32], asked: NDArray[np.int64], neighbors: int
) -> float:
    if neighbors < 1:
        return 1.0
    shared = 0
    for start in range(0, len(asked), _QUERIES_PER_SLICE):
        rows = asked[start : start + _QUERIES_PER_SLICE]
        nearest = []
        for vectors in (now, then):
            scores = vectors[rows] @ vectors.T
            scores[np.arange(len(rows)), rows] = -np.inf
            nearest.append(np.argpartition(-scores, neighbors - 1, axis=1)[:, :neighbors])
        shared += sum(len(np.intersect1d(a, b)) for a, b in zip(*nearest, strict=True))
    return shared / (len(asked) * neighbors)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit
