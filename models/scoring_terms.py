"""Memory and freshness, learned beside the dot product.

Counting beats neural models where people repeat themselves or follow the crowd, so the score of an
item is ``x^T u + sum_k w_k log(1 + a_k f_k)`` (Eq. 12 and its extension): ``f_k`` are non-negative
features of the item at the request (hiertcn/sessions/memory.py, hiertcn/sessions/live_counts.py),
``a_k`` are learned scales, and the weights ``w = W [u; c] + b`` depend on the user embedding and on
the request's context, so that a session's first item can lean on the user's past and later ones on
what follows what. An item without features keeps its dot product, so retrieval stays exact: the
best items are among the best dot products and the items that have features.

Not here: the features themselves.
"""

import torch
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.sessions.request_features import CONTEXT, FEATURES, SparseFeatures

_START = {
    "transitions": (1.0, 5.0),
    "own_transitions": (0.5, 2.0),
    "past_items": (0.3, 3.0),
    "session_items": (-1.0, 0.0),
    "live_15m": (0.3, 0.0),
    "live_1h": (0.3, 0.0),
    "live_6h": (0.3, 0.0),
}
"""Weight and logarithm of the scale at the start: what a grid search by hand would choose."""


class ScoringTerms(nn.Module):
    """The gate and the scales.

    Parameters: ``gate.weight [terms, dim + context]``, ``gate.bias [terms]``, ``log_scale
    [terms]``.

    Args:
        names: the features used, from `hiertcn.sessions.request_features.FEATURES`.
        dim: width of the user embedding.

    Raises:
        InputError: a feature is unknown, or there is none.
    """

    def __init__(self, names: tuple[str, ...], dim: int) -> None:
        super().__init__()
        unknown = [name for name in names if name not in FEATURES]
        if unknown or not names:
            raise InputError(
                f"the scoring terms are {list(names)}; expected one or more of "
                f"{', '.join(FEATURES)}"
            )
        self.names = names
        self.gate = nn.Linear(dim + len(CONTEXT), len(names))
        self.log_scale = nn.Parameter(torch.empty(len(names)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from constant weights that already rank well."""
        nn.init.zeros_(self.gate.weight)
        with torch.no_grad():
            self.gate.bias.copy_(torch.tensor([_START[name][0] for name in self.names]))
            self.log_scale.copy_(torch.tensor([_START[name][1] for name in self.names]))

    def forward(self, u: Tensor, context: Tensor, features: Tensor) -> Tensor:
        """Return what to add to the dot products of asked items, ``[n, count]``.

        Args:
            u: ``[n, dim]`` float.
            context: ``[n, context]`` float.
            features: ``[terms, n, count]`` float, not negative.
        """
        weights = self.gate(torch.cat([u, context], dim=1))
        grown = torch.log1p(self.log_scale.exp()[:, None, None] * features)
        added: Tensor = torch.einsum("nk,knc->nc", weights, grown)
        return added

    def add_to_catalogue(
        self, scores: Tensor, u: Tensor, context: Tensor, features: SparseFeatures
    ) -> Tensor:
        """Return ``scores [n, items]`` with the terms of all items that have features added."""
        weights = self.gate(torch.cat([u, context], dim=1))
        index = torch.from_numpy(features.index).to(u.device)
        values = torch.from_numpy(features.values).to(u.device)
        owner = index // scores.shape[1]
        grown = torch.log1p(values * self.log_scale.exp().unsqueeze(1))
        added = (weights.T.index_select(1, owner) * grown).sum(0)
        return scores.flatten().index_add(0, index, added).view_as(scores)
