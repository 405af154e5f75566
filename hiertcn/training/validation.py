"""The MRR that early stopping watches, on a fixed sample of validation sessions.

Ranks as evaluation does: candidates are the items shown with the interaction (and the target) where
the log has impressions, else the whole catalogue, and no tie is resolved in the model's favour. Of
a log with impressions, only interactions that have some are ranked. The
full comparison, with other metrics, baselines and intervals, is hiertcn/evaluation's.
"""

import numpy as np
import torch
from torch import Tensor

from hiertcn.errors import InputError
from hiertcn.items.table import ItemTable
from hiertcn.sessions.split import Split
from hiertcn.sessions.store import SessionStore, ranges
from hiertcn.training.item_vectors import ItemVectors, as_vectors
from hiertcn.training.negatives import shown_negatives
from hiertcn.training.objective import score_shown
from hiertcn.training.session_model import SessionModel
from hiertcn.training.user_embeddings import embed_before

_REQUESTS_PER_PASS = 2048


class Validation:
    """Measures a model on whole sessions drawn from the validation range.

    Args:
        requests: draw sessions until they hold at least this many interactions.
        seed: of the draw.

    Raises:
        InputError: no session starts in the validation range.
    """

    def __init__(
        self,
        store: SessionStore,
        table: ItemTable | ItemVectors,
        split: Split,
        *,
        requests: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._store, self._device = store, device
        self._vectors = as_vectors(table, device)
        starts = store.session_starts_us()
        sessions = np.flatnonzero(
            (starts >= split.validation_start_us) & (starts < split.test_start_us)
        )
        if len(sessions) == 0:
            raise InputError(
                f"no session starts in the validation range [{split.validation_start_us}, "
                f"{split.test_start_us}) us; expected at least one: raise the validation share"
            )
        sessions = np.random.default_rng(seed).permutation(sessions)
        lengths = store.session_offsets[sessions + 1] - store.session_offsets[sessions]
        needed = int(np.searchsorted(np.cumsum(lengths), requests)) + 1
        sessions = np.sort(sessions[:needed])
        starts = store.session_offsets[sessions]
        lengths = store.session_offsets[sessions + 1] - starts
        self._interactions = ranges(starts, lengths)
        self._sessions = np.repeat(sessions, lengths)
        self._among_shown = False
        if store.has_impressions:
            shown = shown_negatives(store, self._interactions)
            has_pool = np.bincount(shown.owner, minlength=len(self._interactions)) > 0
            self._among_shown = bool(has_pool.any())
            if self._among_shown:
                self._interactions = self._interactions[has_pool]
                self._sessions = self._sessions[has_pool]

    def __len__(self) -> int:
        return len(self._interactions)

    def mrr(self, model: SessionModel) -> float:
        """Return the mean reciprocal rank of the sample's interactions."""
        ranks = [
            self._ranks(model, slice(first, first + _REQUESTS_PER_PASS))
            for first in range(0, len(self), _REQUESTS_PER_PASS)
        ]
        return float((1.0 / torch.cat(ranks).double()).mean())

    @torch.inference_mode()
    def _ranks(self, model: SessionModel, chosen: slice) -> Tensor:
        interactions, sessions = self._interactions[chosen], self._sessions[chosen]
        u = embed_before(model, self._store, self._vectors, sessions, interactions, self._device)
        targets = self._store.item_rows[interactions].astype(np.int64)
        outputs = self._vectors.outputs
        positive = (u * outputs.gather(targets)).sum(1, keepdim=True)
        if self._among_shown:
            shown = shown_negatives(self._store, interactions)
            scores, others = score_shown(u, shown, outputs, self._device)
        else:
            scores = u @ outputs.all().T
            others = torch.ones_like(scores, dtype=torch.bool)
            others[torch.arange(len(u)), torch.from_numpy(targets)] = False
        # A NaN score of the target must not rank it first.
        beaten_by = ~(scores < positive) & others
        return 1 + beaten_by.sum(1)
