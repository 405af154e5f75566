"""What a graph convolution needs to embed a few items: their neighborhoods, layer by layer.

A block links ``targets`` items to the ``sources`` they are computed from. The targets are the first
sources, so one array of rows serves both. Each item appears once per layer however often it is
somebody's neighbor. Cost: one pass over the neighborhoods of the targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.graph.walks import NO_ITEM, Neighborhoods


@dataclass(frozen=True, eq=False)
class Block:
    """The weighted edges of one layer, in compressed sparse rows.

    Attributes:
        targets: number of items computed; they are the first of the sources.
        sources: number of items they are computed from.
        indptr: int64 [targets + 1].
        neighbors: int64 [edges], places among the sources.
        weights: float32 [edges], summing to 1 over a target's neighbors.
    """

    targets: int
    sources: int
    indptr: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    weights: NDArray[np.float32]


class BlockBuilder:
    """Builds blocks of one graph; holds 8 bytes per item. Not for several threads at once."""

    def __init__(self, neighborhoods: Neighborhoods) -> None:
        self._neighborhoods = neighborhoods
        self._place = np.full(len(neighborhoods), -1, np.int64)

    def build(
        self, targets: NDArray[np.int64], layers: int, alone: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], Sequence[Block]]:
        """Return the rows of the first layer's sources, int64 [sources], and a block per layer.

        Args:
            targets: distinct item rows, int64 [targets].
            layers: number of convolutions; blocks come first layer first.
            alone: bool [targets], true where a target is to have no neighbors in any layer; None:
                nowhere.
        """
        rows = np.ascontiguousarray(targets, np.int64)
        if alone is None:
            alone = np.zeros(len(rows), np.bool_)
        blocks: list[Block] = []
        for _ in range(layers):
            count = len(rows)
            rows, indptr, neighbors, weights = _expand(
                rows, alone, self._neighborhoods.rows, self._neighborhoods.weights, self._place
            )
            blocks.append(Block(count, len(rows), indptr, neighbors, weights))
        return rows, blocks[::-1]


@compiled
def _expand(targets: Any, alone: Any, neighbor_rows: Any, neighbor_weights: Any, place: Any) -> Any:
    top = neighbor_rows.shape[1]
    sources = np.empty(len(targets) * (top + 1), np.int64)
    count = len(targets)
    for k in range(count):
        sources[k] = targets[k]
        place[targets[k]] = k
    indptr = np.zeros(len(targets) + 1, np.int64)
    neighbors = np.empty(len(targets) * top, np.int64)
    weights = np.empty(len(targets) * top, np.float32)
    edges = 0
    for k in range(len(targets)):
        for t in range(0 if k < len(alone) and alone[k] else top):
            row = neighbor_rows[targets[k], t]
            if row == NO_ITEM:
                break
            if place[row] == -1:
                place[row] = count
                sources[count] = row
                count += 1
            neighbors[edges] = place[row]
            weights[edges] = neighbor_weights[targets[k], t]
            edges += 1
        indptr[k + 1] = edges
    for k in range(count):
        place[sources[k]] = -1
    return sources[:count].copy(), indptr, neighbors[:edges].copy(), weights[:edges].copy()
