"""HierTCN as a ranker of the evaluation protocol.

Exact and stateless: each request's user state is folded from the start state over all closed
sessions, and the running session passes through the network's whole receptive field, so a score
equals what the sidecar would serve from an up-to-date state. Item rows past the table are skipped.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.items.table import ItemTable
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import TransitionTable
from hiertcn.training.item_vectors import ItemVectors, as_vectors
from hiertcn.training.term_scores import term_scores
from hiertcn.training.user_embeddings import embed_before
from models.hiertcn import HierTCN


class HierTCNRanker:
    """Scores candidates by ``x^T u`` (Eq. 12) and the model's scoring terms.

    Args:
        model: put into evaluation mode.
        store: the histories.
        table: the vectors the model was trained with.
        outputs: the vectors that score items, where they are other ones (one-hot items).
        transitions: the table the model was trained with, if it has scoring terms.
        name: of the ranker in tables and in the gate.
        device: where to compute.
    """

    def __init__(
        self,
        model: HierTCN,
        store: SessionStore,
        table: ItemTable | ItemVectors,
        *,
        outputs: ItemTable | None = None,
        transitions: TransitionTable | None = None,
        name: str = "HierTCN",
        device: str = "cpu",
    ) -> None:
        self.name = name
        self._model = model.to(device).eval()
        self._store, self._device = store, device
        self._vectors = as_vectors(table, device)
        self._outputs = self._vectors.outputs if outputs is None else as_vectors(outputs, device)
        if model.terms is not None and transitions is None:
            raise InputError(
                f"{name} has the scoring terms {', '.join(model.config.terms)} but no transition "
                "table; expected the folder `transitions` of its model"
            )
        self._terms = term_scores(model, store, transitions, device=device)

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
