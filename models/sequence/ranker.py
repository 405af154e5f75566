"""A compared network as a ranker of the evaluation protocol, exact and stateless.

Each request's ``u`` is computed from the user's whole history up to it. Item rows past the vectors
are skipped in a history.
"""

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hiertcn.evaluation.protocol import Requests
from hiertcn.items.table import ItemTable
from hiertcn.sessions.store import SessionStore
from hiertcn.training.item_vectors import ItemVectors, as_vectors
from hiertcn.training.session_model import SessionModel
from hiertcn.training.user_embeddings import embed_before


class NetworkRanker:
    """Scores items by ``x^T u`` (Eq. 12).

    Args:
        network: of :mod:`models.sequence.networks`; put into evaluation mode.
        store: the histories.
        table: the vectors the network was trained with.
        outputs: the vectors that score items, where they are other ones (one-hot items).
        name: of the ranker in tables; None for the network's.
        device: where to compute.
    """

    def __init__(
        self,
        network: nn.Module,
        store: SessionStore,
        table: ItemTable | ItemVectors,
        *,
        outputs: ItemTable | None = None,
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        config = cast(Any, network).config
        self.name: str = config.network if name is None else name
        self._model = cast(SessionModel, network.to(device).eval())
        self._store, self._device = store, device
        self._vectors = as_vectors(table, device)
        self._outputs = self._vectors.outputs if outputs is None else as_vectors(outputs, device)

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
        else:
            padding = torch.from_numpy(candidates < 0).to(self._device)
            scores = (self._outputs.gather(candidates) @ u.unsqueeze(2)).squeeze(2)
            scores = scores.masked_fill(padding, -torch.inf)
        return np.asarray(scores.float().cpu(), np.float32)
