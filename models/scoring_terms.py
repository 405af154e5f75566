"""Memory and freshness, mixed in beside the dot product.

Counting beats neural models where people repeat themselves or follow the crowd, so an item's score
is

    a(c) x^T u + b(c) log(1 + sum_k exp(w_k(c)) f_k) + d(c) s

with ``x^T u`` of Eq. 12, shares ``f_k >= 0`` of the item at the request
(hiertcn/sessions/request_features.py), ``s = 1`` for items of the running session, and ``c`` the
request's context: whether the session just began, how long it and the history are. One logarithm
over all shares makes them a mixture, as smoothed language models mix their orders, and not a
product: an item may be lifted by what follows the last one or by what everybody reads, and need not
have both. ``a`` and ``b`` are positive, so retrieval stays exact: the best items are among the best
dot products and the items that have features.

The weights depend on the context alone, not on ``u``: they are few enough to be fitted on sessions
that the network never saw (hiertcn/training/term_fitting.py), and survive its retraining.
"""

import torch
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.sessions.request_features import CONTEXT, FEATURES, SparseFeatures

SESSION_ITEMS = "session_items"

_START = {
    "transitions": 4.0,
    "own_transitions": 2.0,
    "past_items": 2.0,
    SESSION_ITEMS: -2.0,
    "familiar_transitions": 3.0,
    "live_transitions": 3.0,
    "live_5m": 4.0,
    "live_15m": 4.0,
    "live_1h": 2.0,
    "live_6h": 1.0,
}


class ScoringTerms(nn.Module):
    """The gate: ``weight [terms + 2, context]`` and ``bias [terms + 2]``.

    Its first outputs are ``w_k`` of the features, in their order (``d`` in the place of the running
    session's), then the logarithms of ``a`` and ``b``.

    Args:
        names: the features used, from `hiertcn.sessions.request_features.FEATURES`.

    Raises:
        InputError: a feature is unknown, or there is none.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        unknown = [name for name in names if name not in FEATURES]
        if unknown or not names:
            raise InputError(
                f"the scoring terms are {list(names)}; expected one or more of "
                f"{', '.join(FEATURES)}"
            )
        self.names = names
        self._shares = [place for place, name in enumerate(names) if name != SESSION_ITEMS]
        self._session = names.index(SESSION_ITEMS) if SESSION_ITEMS in names else None
        self.gate = nn.Linear(len(CONTEXT), len(names) + 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from constant weights that already rank well."""
        nn.init.zeros_(self.gate.weight)
        with torch.no_grad():
            self.gate.bias.copy_(torch.tensor([*(_START[name] for name in self.names), 0.0, 0.0]))

    def forward(self, dots: Tensor, context: Tensor, features: Tensor) -> Tensor:
        """Return the scores of asked items, ``[n, count]``.

        Args:
            dots: ``[n, count]`` float, their dot products.
            context: ``[n, context]`` float.
            features: ``[terms, n, count]`` float, not negative.
        """
        gate = self.gate(context)
        mixed = torch.zeros_like(dots)
        if self._shares:
            weights = gate[:, self._shares].exp()
            mixed = torch.einsum("nk,knc->nc", weights, features[self._shares])
        scores: Tensor = gate[:, -2:-1].exp() * dots + gate[:, -1:].exp() * torch.log1p(mixed)
        if self._session is not None:
            scores = scores + gate[:, self._session, None] * features[self._session]
        return scores

    def of_catalogue(self, dots: Tensor, context: Tensor, features: SparseFeatures) -> Tensor:
        """Return the scores of all items, ``[n, items]``, given their ``dots [n, items]``."""
        gate = self.gate(context)
        index = torch.from_numpy(features.index).to(dots.device)
        values = torch.from_numpy(features.values).to(dots.device)
        owner = index // dots.shape[1]
        added = torch.zeros_like(values[0])
        if self._shares:
            weights = gate[:, self._shares].exp().T.index_select(1, owner)
            mixed = torch.log1p((weights * values[self._shares]).sum(0))
            added = gate[:, -1].exp().index_select(0, owner) * mixed
        if self._session is not None:
            session = gate[:, self._session].index_select(0, owner)
            added = added + session * values[self._session]
        scaled = gate[:, -2:-1].exp() * dots
        scores: Tensor = scaled.flatten().index_add(0, index, added).view_as(dots)
        return scores
