"""The loss of one batch: which negatives it draws and how they are scored.

Scores are dot products with item embeddings (HierTCN Eq. 12). Without impressions a target is
ranked against the shared pool of hiertcn/training/negatives.py. With impressions the softmax has
two terms, one among the shown items, as in the paper's candidate pools, and one against the pool,
so that the model also learns to find items nobody showed; the other losses take both kinds of
negatives in one sum.

One embedding may also be asked for the items after the next one of its session
(``TrainOptions.positions_ahead``), each against a pool of its own draw, and never among what was
shown at another moment.

A model's scoring terms (hiertcn/training/term_scores.py), where they are given, make scores of the
dot products: so they are fitted (hiertcn/training/term_fitting.py). In a pool
that is not the whole catalogue, the items that memory brings up for a target are negatives of their
own: they are the ones that the terms lift, and random draws would hardly ever find them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiertcn.sessions.store import SessionStore
from hiertcn.training import losses
from hiertcn.training.item_vectors import ItemVectors
from hiertcn.training.negatives import PoolSampler, ShownItems, shown_negatives
from hiertcn.training.options import TrainOptions
from hiertcn.training.targets import Targets, targets_ahead
from hiertcn.training.term_scores import TermScores, contained

_REMEMBERED_NEGATIVES = 64
_LIKELIHOOD_SHARE = 0.1


class Objective:
    """Callable loss; holds the sampler.

    Args:
        vectors: what the batches' items were gathered from; ``vectors.outputs`` score.
        counts: int64 ``[items]``, how often each item is a training target.
        terms: the model's scoring terms, None if it has none.
    """

    def __init__(
        self,
        store: SessionStore,
        vectors: ItemVectors,
        counts: NDArray[np.int64],
        options: TrainOptions,
        device: torch.device,
        terms: TermScores | None = None,
    ) -> None:
        self._store, self._options, self._device = store, options, device
        self._terms = terms
        self._vectors = vectors
        self._outputs, self._is_tied = vectors.outputs, vectors.outputs is vectors
        self._sampler = PoolSampler(
            counts, random=options.random_negatives, in_batch=options.in_batch_negatives
        )
        self._uses_shown = store.has_impressions and options.max_impressions > 0

    def __call__(self, u: Tensor, batch: Targets, rng: np.random.Generator) -> Tensor:
        """Return the loss summed over the positions ahead, its mean over the batch's targets.

        Args:
            u: ``[targets, dim]`` float, the user embedding before each target.
            batch: the batch ``u`` was computed from.
            rng: decides the random negatives.
        """
        options = self._options
        total = self._losses(u, batch, rng, self._uses_shown).sum()
        for distance in range(1, options.positions_ahead):
            index, ahead = targets_ahead(batch, self._store, self._vectors, distance)
            if len(index):
                losses_ahead = self._losses(u.index_select(0, index), ahead, rng, False)
                total = total + options.ahead_decay**distance * losses_ahead.sum()
        return total / len(u)

    def _losses(
        self, u: Tensor, batch: Targets, rng: np.random.Generator, uses_shown: bool
    ) -> Tensor:
        """Return the loss of each target, ``[targets]``."""
        options = self._options
        if self._is_tied:
            target = batch.items.index_select(0, batch.targets)
        else:
            target = self._outputs.gather(batch.target_rows)
        if options.loss == "l2":
            return losses.l2(u, target)
        whole = options.loss in ("softmax", "mrr") and self._sampler.whole_catalogue
        if whole:
            scores = self._score_catalogue(u, batch)
            positive = scores.gather(1, batch.target_rows.unsqueeze(1)).squeeze(1)
        else:
            positive = (u * target).sum(1)
            if self._terms is not None:
                asked = batch.target_rows.cpu().numpy()[:, None]
                positive = self._with_terms(positive.unsqueeze(1), batch, asked).squeeze(1)
        shown = self._score_shown(u, batch) if uses_shown else None
        if options.loss == "softmax":
            if whole:
                loss = losses.catalogue_softmax(positive, scores)
            else:
                loss = losses.softmax(positive, *self._score_pool(u, batch, rng))
            if shown is not None:
                loss = loss + options.impression_weight * losses.softmax(positive, *shown)
            return loss
        if options.loss == "mrr":
            if whole:
                rows = torch.arange(scores.shape[1], device=self._device)
                loss = _reciprocal_rank(positive, scores, rows != batch.target_rows.unsqueeze(1))
            else:
                loss = _reciprocal_rank(positive, *self._score_pool(u, batch, rng))
            if shown is not None:
                loss = loss + options.impression_weight * _reciprocal_rank(positive, *shown)
            return loss
        pool, pool_mask, _ = self._score_pool(u, batch, rng)
        if shown is not None:
            pool = torch.cat([pool, shown[0]], dim=1)
            pool_mask = torch.cat([pool_mask, shown[1]], dim=1)
        if options.loss == "hinge":
            return losses.hinge(positive, pool, pool_mask, options.margin)
        pairwise = losses.nce if options.loss == "nce" else losses.bpr
        return pairwise(positive, pool, pool_mask)

    def _score_catalogue(self, u: Tensor, batch: Targets) -> Tensor:
        scores = u @ self._outputs.all().T
        if self._terms is None:
            return scores
        return self._terms.of_catalogue(scores, self._sessions(batch), batch.interactions)

    def _score_pool(
        self, u: Tensor, batch: Targets, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        pool = self._sampler.draw(batch.pool_targets, rng)
        if self._sampler.whole_catalogue:
            vectors = self._outputs.all()
        else:
            vectors = self._outputs.gather(pool.rows)
        rows = torch.from_numpy(pool.rows).to(self._device)
        mask = rows != batch.target_rows.unsqueeze(1)
        scores = u @ vectors.T
        log_expected = torch.from_numpy(pool.log_expected).to(self._device)
        if self._terms is None:
            return scores, mask, log_expected
        scores = self._with_terms(scores, batch, pool.rows)
        if self._sampler.whole_catalogue:
            return scores, mask, log_expected
        return self._with_remembered(u, batch, pool.rows, scores, mask, log_expected)

    def _with_remembered(
        self,
        u: Tensor,
        batch: Targets,
        pool: NDArray[np.int64],
        scores: Tensor,
        mask: Tensor,
        log_expected: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Join each target's remembered items to its pool; they are certain to be there."""
        assert self._terms is not None
        own = self._terms.support(self._sessions(batch), batch.interactions, _REMEMBERED_NEGATIVES)
        mask = mask & torch.from_numpy(~contained(pool, own, len(self._outputs))).to(self._device)
        own_scores = torch.einsum("nsd,nd->ns", self._outputs.gather(own), u)
        own_scores = self._with_terms(own_scores, batch, own)
        own_rows = torch.from_numpy(own).to(self._device)
        own_mask = (own_rows >= 0) & (own_rows != batch.target_rows.unsqueeze(1))
        log_expected = log_expected.expand(len(u), -1)
        return (
            torch.cat([scores, own_scores], dim=1),
            torch.cat([mask, own_mask], dim=1),
            torch.cat([log_expected, torch.zeros_like(own_scores)], dim=1),
        )

    def _score_shown(self, u: Tensor, batch: Targets) -> tuple[Tensor, Tensor]:
        shown = shown_negatives(self._store, batch.interactions, self._options.max_impressions)
        scores, mask = score_shown(u, shown, self._outputs, self._device)
        if self._terms is not None:
            scores = self._with_terms(scores, batch, shown.padded())
        return scores, mask

    def _with_terms(self, dots: Tensor, batch: Targets, rows: NDArray[np.int64]) -> Tensor:
        assert self._terms is not None
        return self._terms.of_items(dots, self._sessions(batch), batch.interactions, rows)

    def _sessions(self, batch: Targets) -> NDArray[np.int64]:
        offsets = self._store.session_offsets
        return np.searchsorted(offsets, batch.interactions, side="right") - 1


def score_shown(
    u: Tensor, shown: ShownItems, outputs: ItemVectors, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Score shown items against their interaction's user embedding.

    Args:
        u: ``[n, dim]`` float.
        shown: the items; ``shown.interactions`` is ``n``.
        outputs: the vectors that score them.
        device: of ``u``.

    Returns:
        Scores ``[n, shown.width]``, and a bool mask of the same shape that is false on padding.
    """
    owner = torch.from_numpy(shown.owner).to(device)
    place = torch.from_numpy(shown.place).to(device)
    vectors = outputs.gather(shown.rows)
    scores = u.new_zeros(shown.interactions, shown.width)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[owner, place] = True
    # A batched product of matrix and vector is five times slower on a CPU.
    scores = scores.index_put((owner, place), (vectors * u.index_select(0, owner)).sum(1))
    return scores, mask


def _reciprocal_rank(
    positive: Tensor, negatives: Tensor, mask: Tensor, log_expected: Tensor | None = None
) -> Tensor:
    """Return the MRR's loss with a little likelihood, which alone reaches targets far down."""
    likelihood = losses.softmax(positive, negatives, mask, log_expected)
    return losses.approximate_mrr(positive, negatives, mask, log_expected) + (
        _LIKELIHOOD_SHARE * likelihood
    )
