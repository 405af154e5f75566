"""The item encoder as it is served: one item from its features and its neighbors, without a graph.

A convolution (HierTCN Eq. 18) needs its neighbors' vectors of the layer before, which their final
vectors do not give away. So the release keeps what went into each layer for every item
(``item_layers``, ``hiertcn.training.item_inference``), and the served model gets those rows of the
neighbors: the new item is computed as layer-wise inference would compute it, had it been in the
graph as a target and nobody's neighbor. Other items do not change by it before the next build.

An item that came after the training has no id vector. Weights are copied at construction.
"""

import copy

import torch
from torch import Tensor, nn

from models.graphsage import GraphSAGE, PinSageConv


class NewItemEncoder(nn.Module):
    """``GraphSAGE`` for items beyond its id vectors; equals it for given neighbors."""

    def __init__(self, encoder: GraphSAGE) -> None:
        super().__init__()
        self.config = encoder.config
        self.inputs = _Inputs(encoder)
        self.convolutions = nn.ModuleList(
            _DenseConv(convolution)
            for convolution in encoder.convolutions
            if isinstance(convolution, PinSageConv)
        )
        self.head = copy.deepcopy(encoder.head)
        self.output = copy.deepcopy(encoder.output)
        self.skip = copy.deepcopy(encoder.skip)
        self.requires_grad_(False)

    def forward(
        self,
        features: Tensor,
        features_present: Tensor,
        neighbor_layers: Tensor,
        neighbor_weights: Tensor,
    ) -> Tensor:
        """Embed items.

        Args:
            features: ``[batch, max(1, feature_dim)]`` float32, ignored where not present.
            features_present: ``[batch, 1]`` int32, 1 or 0.
            neighbor_layers: ``[batch, neighbors, layers * hidden]`` float32, what went into each
                layer for each neighbor, first layer first; anything finite beside a weight of 0.
            neighbor_weights: ``[batch, neighbors]`` float32, summing to 1 over an item's neighbors
                or all 0 for an item without any.

        Returns:
            ``[batch, dim]`` float32, of length 1.
        """
        z_0 = z = self.inputs(features, features_present > 0)
        per_layer = torch.chunk(neighbor_layers, self.config.layers, dim=2)
        for convolution, sources in zip(self.convolutions, per_layer, strict=True):
            z = convolution(z, sources, neighbor_weights)
        out = self.output(torch.relu(self.head(z))) + self.skip(z_0)
        return nn.functional.normalize(out, dim=-1)


class _Inputs(nn.Module):
    """z_0 of an item without an id vector: [batch, features], [batch, 1] -> [batch, hidden]."""

    def __init__(self, encoder: GraphSAGE) -> None:
        super().__init__()
        self.hidden = encoder.config.hidden
        self.features = copy.deepcopy(encoder.features) if encoder.config.feature_dim else None
        if encoder.config.feature_dim:
            self.missing = nn.Parameter(encoder.missing.detach().clone())

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        if self.features is None:
            # Present in no item, so zeros; but the exporter would drop an input that is not used.
            nothing = torch.where(present, features[:, :1], torch.zeros((), dtype=features.dtype))
            return nothing.expand(-1, self.hidden)
        given = torch.where(present, features, torch.zeros((), dtype=features.dtype))
        return torch.where(present, self.features(given), self.missing)


class _DenseConv(nn.Module):
    """``PinSageConv`` with an item's neighbors side by side instead of a sparse adjacency."""

    def __init__(self, convolution: PinSageConv) -> None:
        super().__init__()
        self.pooling = convolution.pooling
        self.neighbor = copy.deepcopy(convolution.neighbor)
        self.combine = copy.deepcopy(convolution.combine)
        self.no_neighbors = nn.Parameter(convolution.no_neighbors.detach().clone())

    def forward(self, z: Tensor, sources: Tensor, weights: Tensor) -> Tensor:
        """z [batch, hidden], sources [batch, neighbors, hidden], weights [batch, neighbors]."""
        messages = sources if self.pooling == "graphsage" else torch.relu(self.neighbor(sources))
        real = (weights > 0).to(z.dtype)
        count = real.sum(dim=1, keepdim=True)
        if self.pooling == "max":
            nothing = torch.full((), -torch.inf, dtype=z.dtype)
            aggregated = torch.where(real.unsqueeze(2) > 0, messages, nothing).amax(dim=1)
        else:
            shares = weights if self.pooling == "importance" else real / count.clamp(min=1.0)
            aggregated = (shares.unsqueeze(2) * messages).sum(dim=1)
        aggregated = torch.where(count > 0, aggregated, self.no_neighbors)
        return torch.relu(self.combine(torch.cat([z, aggregated], dim=1)))
