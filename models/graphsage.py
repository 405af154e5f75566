"""GraphSAGE item encoder with PinSage's importance-weighted convolution (HierTCN, section 3.6.1).

    z_0   = [features given ? A x + a : missing] + id vector of the row (either may be left out)
    n_u   = sum_v w_uv ReLU(Q z_v + q)           over the importance neighborhood of u; Eq. 18's AGG
    z_u   = ReLU(W concat(z_u, n_u) + w)         Eq. 18, once per layer
    out_u = normalize(G2 ReLU(G1 z_u + g) + S z_0)    PinSage, Algorithm 2, lines 15-16

The weights of a neighborhood sum to 1, so AGG is the importance-weighted mean. Q is applied once
per source, not once per edge. ``pooling`` chooses another AGG over the same neighborhood: the plain
mean or the coordinate-wise maximum of the messages, or the mean of the neighbors as they are, with
no Q, which is GraphSAGE's mean aggregator (Hamilton et al. 2017, Algorithm 1).

Where we differ: Eq. 18 ends in a ReLU, which would confine all vectors to one orthant; as PinSage
does, two dense layers follow. ``S z_0`` is ours: it lets the encoder keep what distinguishes an
item from its neighbors. PinSage has no id vectors; they are needed where items have no features,
and an item added since then has none (row -1). An item without features uses a learned vector,
an item without neighbors another one, never zeros.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import spmm

from hiertcn.errors import InputError
from hiertcn.files import read_json
from hiertcn.training.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_weights
from hiertcn.training.item_batches import WeightedSum
from hiertcn.training.optimizers import DENSE_ITEMS

POOLINGS: Final = ("importance", "mean", "max", "graphsage")


@dataclass(frozen=True, kw_only=True)
class GraphSAGEConfig:
    """Sizes of the encoder.

    Attributes:
        items: rows of the id vectors; the items known when it is trained.
        feature_dim: width of the features; 0 if items have none.
        dim: width of the output.
        hidden: width between the layers.
        layers: convolutions.
        id_vectors: learn a vector per item, added to the projected features.
        pooling: one of :data:`POOLINGS`.
    """

    items: int
    feature_dim: int
    dim: int = 64
    hidden: int = 64
    layers: int = 2
    id_vectors: bool = True
    pooling: str = "importance"

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("items", "feature_dim"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling is {self.pooling!r}; expected one of {', '.join(POOLINGS)}")
        if not self.id_vectors and not self.feature_dim:
            raise InputError(
                "id_vectors is false and feature_dim is 0, so all items would look alike; give "
                "item features or switch id_vectors on"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "GraphSAGEConfig":
        """Return the config that :meth:`to_dict` described.

        Raises:
            InputError: a field is unknown or out of its range.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"the item encoder's config does not fit this version: {error}") from (
                error
            )


class PinSageConv(MessagePassing):  # type: ignore[misc]
    """Eq. 18; AGG is the importance-weighted mean or another pooling (see the module).

    Args:
        dim: width of sources and targets.
        pooling: one of :data:`POOLINGS`. ``max`` runs on CPUs only.
    """

    def __init__(self, dim: int, pooling: str = "importance") -> None:
        super().__init__(aggr="max" if pooling == "max" else "sum")
        self.pooling = pooling
        self.neighbor = nn.Identity() if pooling == "graphsage" else nn.Linear(dim, dim)
        self.combine = nn.Linear(2 * dim, dim)
        self.no_neighbors = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        if isinstance(self.neighbor, nn.Linear):
            self.neighbor.reset_parameters()
        self.combine.reset_parameters()
        nn.init.uniform_(self.no_neighbors, 0.0, 0.1)

    def forward(self, z: Tensor, adjacency: Tensor) -> Tensor:
        """Convolve once.

        Args:
            z: float32 [sources, dim]; the targets come first.
            adjacency: sparse CSR float32 [targets, sources], rows summing to 1 or empty.

        Returns:
            float32 [targets, dim].
        """
        return self.update_targets(z[: adjacency.shape[0]], self.messages(z), adjacency)

    def messages(self, z: Tensor) -> Tensor:
        """ReLU(Q z + q), or z for ``graphsage``: float32 [sources, dim] -> [sources, dim]."""
        return z if self.pooling == "graphsage" else torch.relu_(self.neighbor(z))

    def update_targets(self, z: Tensor, messages: Tensor, adjacency: Tensor) -> Tensor:
        """Aggregate and combine.

        Args:
            z: float32 [targets, dim].
            messages: float32 [sources, dim].
            adjacency: sparse CSR float32 [targets, sources].
        """
        degrees = adjacency.crow_indices().diff()
        aggregated = self.propagate(self._weighted(adjacency, degrees), x=messages)
        alone = torch.nonzero(degrees == 0).squeeze(1)
        # These rows are 0; replacing them with torch.where would copy all the others too.
        aggregated = aggregated.index_add_(0, alone, self.no_neighbors.expand(len(alone), -1))
        # W concat(z, n) as the sum of two products, without copying both into one.
        weight, width = self.combine.weight, z.shape[1]
        own, others = weight[:, :width], weight[:, width:]
        combined = torch.addmm(self.combine.bias, z, own.T).addmm_(aggregated, others.T)
        return torch.relu_(combined)

    def message_and_aggregate(self, edge_index: Tensor, x: Tensor) -> Tensor:
        """Aggregate messages by the adjacency without materializing one per edge."""
        if self.pooling == "max" or x.is_cuda:
            return spmm(edge_index, x, reduce=self.aggr)  # type: ignore[no-any-return]
        return WeightedSum.apply(x, edge_index)  # type: ignore[no-any-return, no-untyped-call]

    def _weighted(self, adjacency: Tensor, degrees: Tensor) -> Tensor:
        """Return the adjacency with the weights that the pooling gives its edges."""
        if self.pooling == "importance":
            return adjacency
        weights = torch.ones_like(adjacency.values())
        if self.pooling != "max":
            shares = degrees.to(weights.dtype).reciprocal()
            weights = torch.repeat_interleave(shares, degrees, output_size=len(weights))
        return torch.sparse_csr_tensor(
            adjacency.crow_indices(),
            adjacency.col_indices(),
            weights,
            adjacency.shape,
            check_invariants=False,
        )


class GraphSAGE(nn.Module):
    """Item encoder; see the module. Output vectors have length 1."""

    def __init__(self, config: GraphSAGEConfig) -> None:
        super().__init__()
        self.config = config
        if config.feature_dim:
            self.features = nn.Linear(config.feature_dim, config.hidden)
            self.missing = nn.Parameter(torch.empty(config.hidden))
        if config.id_vectors:
            self.id_vectors = nn.Embedding(
                config.items, config.hidden, sparse=config.items > DENSE_ITEMS
            )
        self.convolutions = nn.ModuleList(
            PinSageConv(config.hidden, config.pooling) for _ in range(config.layers)
        )
        self.head = nn.Linear(config.hidden, config.hidden)
        self.output = nn.Linear(config.hidden, config.dim, bias=False)
        self.skip = nn.Linear(config.hidden, config.dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        if self.config.feature_dim:
            # As small as the id vectors: larger inputs let the vectors collapse into one while the
            # learning rate is high, and training does not recover.
            nn.init.normal_(self.features.weight, std=0.1 / self.config.feature_dim**0.5)
            nn.init.zeros_(self.features.bias)
            nn.init.normal_(self.missing, std=0.1)
        if self.config.id_vectors:
            nn.init.normal_(self.id_vectors.weight, std=0.1)
        for module in self.convolutions:
            if isinstance(module, PinSageConv):
                module.reset_parameters()
        for linear in (self.head, self.output, self.skip):
            linear.reset_parameters()

    @property
    def per_item_parameters(self) -> frozenset[str]:
        """Names of parameters with one row per item, which grow as items are added."""
        return frozenset({"id_vectors.weight"} if self.config.id_vectors else ())

    @property
    def has_sparse_gradients(self) -> bool:
        """Whether those parameters have sparse gradients, as they do of many items."""
        return self.config.id_vectors and self.id_vectors.sparse

    @property
    def layers(self) -> int:
        """Number of convolutions: blocks that :meth:`forward` expects."""
        return self.config.layers

    def forward(
        self, rows: Tensor, features: Tensor, present: Tensor, adjacencies: Sequence[Tensor]
    ) -> Tensor:
        """Embed the targets of the last adjacency.

        Args:
            rows: int64 [sources], item rows; -1 for an item without an id vector.
            features: float32 [sources, feature_dim]; ignored where not present.
            present: bool [sources].
            adjacencies: one sparse CSR [targets, sources] per layer, first layer first.

        Returns:
            float32 [targets, dim], of length 1.
        """
        z = self.embed_inputs(rows, features, present)
        for layer, adjacency in enumerate(adjacencies):
            z = self.convolutions[layer](z, adjacency)
        # Once more for the few that are asked for: the gradient of a slice of all would be as
        # large as all.
        n = len(z)
        return self.finish(z, self.embed_inputs(rows[:n], features[:n], present[:n]))

    def embed_inputs(self, rows: Tensor, features: Tensor, present: Tensor) -> Tensor:
        """z_0: rows int64 [n], features [n, feature_dim], present bool [n] -> [n, hidden]."""
        z = torch.zeros((), device=rows.device)
        if self.config.feature_dim:
            z = self.features(features)
            if not present.all():
                z = torch.where(present.unsqueeze(-1), z, self.missing)
        if self.config.id_vectors:
            known = (rows >= 0) & (rows < self.config.items)
            if known.all():
                return z + self.id_vectors(rows)  # type: ignore[no-any-return]
            # Only the known ones are looked up: any other row, too, would get a gradient.
            places = known.nonzero().squeeze(1)
            z = z.expand(len(rows), self.config.hidden)
            return z.index_add(0, places, self.id_vectors(rows[places]))
        return z

    def messages(self, layer: int, z: Tensor) -> Tensor:
        """What sources tell their targets: [n, hidden] -> [n, hidden]."""
        return self.convolutions[layer].messages(z)  # type: ignore[operator, no-any-return]

    def update_targets(self, layer: int, z: Tensor, messages: Tensor, adjacency: Tensor) -> Tensor:
        """One layer from messages: z [targets, hidden], messages [sources, hidden]."""
        return self.convolutions[layer].update_targets(z, messages, adjacency)  # type: ignore[operator, no-any-return]

    def finish(self, z: Tensor, z_0: Tensor) -> Tensor:
        """From the last layer and the inputs, [n, hidden] each, to unit vectors [n, dim]."""
        out = self.output(torch.relu(self.head(z))) + self.skip(z_0)
        return nn.functional.normalize(out, dim=-1)

    @torch.no_grad()
    def start_id_vectors(self, vectors: NDArray[np.float32]) -> None:
        """Set the first columns of the id vectors, if any: float32 [items, columns].

        Rows of zeros stay as they were drawn.
        """
        if self.config.id_vectors:
            given = torch.from_numpy(vectors)
            known = (given != 0).any(dim=1)
            self.id_vectors.weight[known, : given.shape[1]] = given[known]

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Make every vector ``v`` become ``v @ rotation``; rotation [dim, dim], orthogonal."""
        for linear in (self.output, self.skip):
            linear.weight.copy_((rotation.T @ linear.weight.to(rotation)).to(linear.weight))


def load_graphsage(directory: Path) -> GraphSAGE:
    """Load an encoder that ``train_item_encoder`` wrote, in inference mode.

    Raises:
        InputError: a file is missing, damaged, or does not fit this version.
    """
    encoder = GraphSAGE(GraphSAGEConfig.from_dict(read_json(directory / CONFIG_FILE)))
    load_weights(encoder, directory / WEIGHTS_FILE)
    return encoder.eval()
