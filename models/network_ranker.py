"""A trained network, HierTCN or a compared one, as a ranker of the evaluation protocol.

Exact and stateless: each request's ``u`` is computed from the user's whole history up to it. For
HierTCN that means folding the user state from the start state over all closed sessions, and passing
the running session through the whole receptive field, so a score equals what the sidecar would
serve from an up-to-date state. Item rows past the table are skipped.
"""

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.items.table import ItemTable
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import TransitionTable
from hiertcn.training.item_vectors import ItemVectors, as_vectors
from hiertcn.training.session_model import SessionModel
from hiertcn.training.term_scores import term_scores, terms_of
from hiertcn.training.user_embeddings import embed_before


class NetworkRanker:
    """Scores candidates by ``x^T u`` (Eq. 12) and the network's scoring terms, if it has any.

    Args:
        network: a `hiertcn.training.session_model.SessionModel`; put into evaluation mode.
        store: the histories.
        table: the vectors the network was trained with.
        outputs: the vectors that score items, where they are other ones (one-hot items).
        transitions: which items follow which, if it has scoring terms.
        name: of the ranker in tables and in the gate; None for the network's.
        device: where to compute.
    """

    def __init__(
        self,
        network: nn.Module,
        store: SessionStore,
        table: ItemTable | ItemVectors,
        *,
        outputs: ItemTable | None = None,
        transitions: TransitionTable | None = None,
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        own_name: str = getattr(cast(Any, network).config, "network", type(network).__name__)
        self.name = own_name if name is None else name
        self._model = cast(SessionModel, network.to(device).eval())
        self._store, self._device = store, device
        self._vectors = as_vectors(table, device)
        self._outputs = self._vectors.outputs if outputs is None else as_vectors(outputs, device)
        terms = terms_of(network)
        if terms is not None and transitions is None:
            raise InputError(
                f"{self.name} has the scoring terms {', '.join(terms.names)} but no transition "
                "table; expected the folder `transitions` of its model"
            )
        self._terms = term_scores(network, store, transitions, device=device)

    @property
    def items(self) -> int:
        """Number of item rows the table has."""
        return len(self._vectors)

    @torch.inference_mode()
    def score(
        self, requests: Requests, candidates: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        """Score candidates ``[batch, count]`` (padded with -1), or all items, for each request.

        Returns:
            float32 of the candidates' shape, or ``[batch, items]``; -inf on padding.
        """
        u = embed_before(
            self._model,
            self._store,
            self._vectors,
            requests.session,
            requests.interaction,
            self._device,
        )
        if candidates is None:
            scores = u @ self._outputs.all().T
            if self._terms is not None:
                scores = self._terms.of_catalogue(scores, requests.session, requests.interaction)
        else:
            vectors = self._outputs.gather(candidates)
            padding = torch.from_numpy(candidates < 0).to(self._device)
            scores = torch.einsum("bcd,bd->bc", vectors, u)
            if self._terms is not None:
                scores = self._terms.of_items(
                    scores, requests.session, requests.interaction, candidates
                )
            scores = scores.masked_fill(padding, -torch.inf)
        return np.asarray(scores.float().cpu(), np.float32)
