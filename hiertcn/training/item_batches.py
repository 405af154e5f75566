"""What the item encoder is, seen from the platform, and its inputs as tensors."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiertcn.compiling import compiled
from hiertcn.graph.blocks import Block


class ItemFeatures(Protocol):
    """Features of all items: ``hiertcn.items.features.FeatureMatrix`` or alike."""

    @property
    def values(self) -> NDArray[np.float32]:
        """float32 [items, features]; unspecified where not present."""

    @property
    def present(self) -> NDArray[np.bool_]:
        """Bool [items]."""


class ItemEncoder(Protocol):
    """An encoder in layers, such as ``models.graphsage.GraphSAGE`` (shapes are given there)."""

    config: Any

    @property
    def per_item_parameters(self) -> frozenset[str]:
        """Names of parameters with one row per item."""

    @property
    def has_sparse_gradients(self) -> bool:
        """Whether those parameters have sparse gradients."""

    @property
    def layers(self) -> int:
        """Number of convolutions."""

    def __call__(
        self, rows: Tensor, features: Tensor, present: Tensor, adjacencies: Sequence[Tensor]
    ) -> Tensor:
        """Embed the targets of the last adjacency."""

    def embed_inputs(self, rows: Tensor, features: Tensor, present: Tensor) -> Tensor:
        """Vectors before the first layer."""

    def messages(self, layer: int, z: Tensor) -> Tensor:
        """What sources tell their targets."""

    def update_targets(self, layer: int, z: Tensor, messages: Tensor, adjacency: Tensor) -> Tensor:
        """One layer from messages."""

    def finish(self, z: Tensor, z_0: Tensor) -> Tensor:
        """Unit vectors from the last layer."""

    def start_id_vectors(self, vectors: NDArray[np.float32]) -> None:
        """Set the first columns of the id vectors: [items, columns]; rows of 0 stay as they are."""

    def rotate(self, rotation: Tensor) -> None:
        """Turn all vectors it gives: [dim, dim], orthogonal."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Trainable tensors."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Trainable tensors with their names."""

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors with their names."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any:
        """Set all tensors."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training."""

    def eval(self) -> Any:
        """Switch to inference."""


def feature_tensors(
    features: ItemFeatures | None, rows: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Return features float32 [n, features] and present bool [n] of some rows.

    Without features the first is [n, 0] and the second all false. Rows beyond the features (items
    newer than them) are not present.
    """
    if features is None:
        return torch.zeros(len(rows), 0), torch.zeros(len(rows), dtype=torch.bool)
    present = have_features(features, rows)
    if present.all():
        values = np.take(features.values, rows, axis=0).astype(np.float32, copy=False)
    else:
        values = np.zeros((len(rows), features.values.shape[1]), np.float32)
        values[present] = features.values[rows[present]]
    return torch.from_numpy(values), torch.from_numpy(present)


def have_features(features: ItemFeatures | None, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of some rows have features, bool [n]; rows beyond the features have none."""
    present = np.zeros(len(rows), np.bool_)
    if features is not None:
        inside = rows < len(features.present)
        present[inside] = features.present[rows[inside]]
    return present


def adjacency(block: Block) -> Tensor:
    """Return a block as a sparse CSR tensor, float32 [targets, sources]."""
    return sparse_rows(block.indptr, block.neighbors, block.weights, block.sources)


def sparse_rows(
    indptr: NDArray[np.int64],
    columns: NDArray[np.int64],
    weights: NDArray[np.float32],
    width: int,
) -> Tensor:
    """Return a sparse CSR tensor, float32 [len(indptr) - 1, width]."""
    with warnings.catch_warnings():
        # Sparse CSR is announced as beta at every process's first use.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return torch.sparse_csr_tensor(
            torch.from_numpy(indptr),
            torch.from_numpy(columns),
            torch.from_numpy(weights),
            (len(indptr) - 1, width),
            check_invariants=False,
        )


class WeightedSum(torch.autograd.Function):
    """``adjacency @ x`` on a CPU; no gradient for the weights.

    As ``torch.sparse.mm``, whose backward sorts all edges to transpose the matrix. Here each is put
    in its place by counting.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        """x float32 [sources, dim], adjacency sparse CSR [targets, sources] -> [targets, dim]."""
        ctx.adjacency = adjacency
        total: Tensor = torch.sparse.mm(adjacency, x)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x, [sources, dim]."""
        return torch.sparse.mm(transposed(ctx.adjacency), gradients[0].contiguous()), None


def transposed(adjacency: Tensor) -> Tensor:
    """Return the transpose of a sparse CSR tensor as another one; both on a CPU."""
    indptr, columns, weights = _transpose(
        adjacency.crow_indices().numpy(),
        adjacency.col_indices().numpy(),
        adjacency.values().numpy(),
        adjacency.shape[1],
    )
    return sparse_rows(indptr, columns, weights, adjacency.shape[0])


@compiled
def _transpose(indptr: Any, columns: Any, weights: Any, width: int) -> Any:
    starts = np.zeros(width + 1, np.int64)
    for column in columns:
        starts[column + 1] += 1
    for column in range(width):
        starts[column + 1] += starts[column]
    free = starts[:-1].copy()
    rows = np.empty(len(columns), np.int64)
    moved = np.empty(len(columns), np.float32)
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            place = free[columns[k]]
            free[columns[k]] = place + 1
            rows[place] = row
            moved[place] = weights[k]
    return starts, rows, moved
