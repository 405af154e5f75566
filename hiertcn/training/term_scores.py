"""What a model's scoring terms make of the dot products, at interactions of a session store.

Joins the learned gate (models/scoring_terms.py) with the features it reads
(hiertcn/sessions/request_features.py), for the loss, for validation and for ranking. A model
without terms has none of it: callers then hold None.
"""

from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiertcn.compiling import compiled
from hiertcn.sessions.request_features import RequestFeatures, SparseFeatures
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import TransitionTable


class TermsModule(Protocol):
    """The learned part, as `models.scoring_terms.ScoringTerms` has it."""

    @property
    def names(self) -> tuple[str, ...]:
        """The features it reads."""

    def __call__(self, dots: Tensor, context: Tensor, features: Tensor) -> Tensor:
        """Return the scores of items with ``features [terms, n, count]``: ``[n, count]``."""

    def of_catalogue(self, dots: Tensor, context: Tensor, features: SparseFeatures) -> Tensor:
        """Return the scores of all items, ``[n, items]``."""


class TermScores:
    """Turns dot products into scores with a model's terms.

    Args:
        terms: the learned part.
        features: of the store that the interactions belong to.
        device: where scores live.
    """

    def __init__(
        self, terms: TermsModule, features: RequestFeatures, device: torch.device | str
    ) -> None:
        self._terms, self._features, self._device = terms, features, device

    def of_catalogue(
        self, dots: Tensor, session: NDArray[np.int64], interaction: NDArray[np.int64]
    ) -> Tensor:
        """Return the scores of all items, ``[n, items]``.

        Args:
            dots: ``[n, items]`` float, the dot products.
            session: int64 ``[n]``, the session of each interaction.
            interaction: int64 ``[n]``, places in the store's columns.
        """
        features, context = self._features.of_catalogue(session, interaction)
        return self._terms.of_catalogue(dots, self._tensor(context), features)

    def of_items(
        self,
        dots: Tensor,
        session: NDArray[np.int64],
        interaction: NDArray[np.int64],
        rows: NDArray[np.integer[Any]],
    ) -> Tensor:
        """Return the scores of the asked items, ``[n, count]``.

        Args:
            dots: ``[n, count]`` float, the dot products.
            session: int64 ``[n]``.
            interaction: int64 ``[n]``.
            rows: item rows, ``[n, count]``, or ``[count]`` asked at every interaction; negative
                ones have no features.
        """
        features, context = self._features.of_items(session, interaction, rows)
        return self._terms(dots, self._tensor(context), self._tensor(features))

    def support(
        self, session: NDArray[np.int64], interaction: NDArray[np.int64], most: int
    ) -> NDArray[np.int64]:
        """Return the items that memory brings up, int64 ``[n, most]``, -1 if fewer."""
        return self._features.support(session, interaction, most)

    def _tensor(self, array: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def terms_of(model: object) -> TermsModule | None:
    """Return a model's scoring terms, None if it has none."""
    terms = getattr(model, "terms", None)
    return cast(TermsModule, terms) if isinstance(terms, nn.Module) else None


def term_scores(
    model: object,
    store: SessionStore,
    transitions: TransitionTable | None,
    *,
    device: torch.device | str,
) -> TermScores | None:
    """Return what scores a model's terms on a store, None for a model without terms.

    Args:
        model: anything with a ``terms`` module or None.
        store: the histories.
        transitions: the table the model was trained with; needed if it has terms.
        device: where scores live.
    """
    terms = terms_of(model)
    if terms is None:
        return None
    assert transitions is not None
    features = RequestFeatures(terms.names, store, transitions)
    return TermScores(terms, features, device)


def contained(rows: NDArray[np.int64], own: NDArray[np.int64], items: int) -> NDArray[np.bool_]:
    """Return which of the shared ``rows [m]`` each line of ``own [n, s]`` has, bool ``[n, m]``."""
    out = np.zeros((len(own), len(rows)), np.bool_)
    _mark(rows, own, np.zeros(items, np.bool_), out)
    return out


@compiled
def _mark(
    rows: NDArray[np.int64],
    own: NDArray[np.int64],
    marked: NDArray[np.bool_],
    out: NDArray[np.bool_],
) -> None:
    for line in range(len(own)):
        for row in own[line]:
            if row >= 0:
                marked[row] = True
        for column in range(len(rows)):
            out[line, column] = marked[rows[column]]
        for row in own[line]:
            if row >= 0:
                marked[row] = False
