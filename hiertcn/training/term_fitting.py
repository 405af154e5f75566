"""Fits a model's scoring terms on sessions that its network never saw.

Trained together with the network, on the network's own sessions, the terms would learn to trust it:
there it remembers what was popular at the hour and who went on to what, and on tomorrow's sessions
it does not. On a news log the joint fit ranked a third worse than live popularity alone. So the
network is trained first, without terms, and then, frozen, it is one more ingredient of the mixture,
weighed where it has to predict (stacked generalisation; Wolpert 1992). The transition table must
not have counted those sessions either.

The terms have some fifty parameters, so a few thousand interactions are enough and the fit takes
seconds.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from hiertcn.sessions.split import Split
from hiertcn.sessions.store import SessionStore, ranges
from hiertcn.sessions.transitions import TransitionTable, count_transitions
from hiertcn.training.item_vectors import ItemVectors
from hiertcn.training.objective import Objective
from hiertcn.training.options import Loss, TrainOptions
from hiertcn.training.session_model import SessionModel
from hiertcn.training.term_scores import term_scores, terms_of
from hiertcn.training.user_embeddings import embed_before

_STEPS: Final = 150
_TARGETS_PER_STEP: Final = 256
_LEARNING_RATE: Final = 0.06
_MOST_TARGETS: Final = 20_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Targets:
    items: Tensor
    targets: Tensor
    target_rows: Tensor
    interactions: NDArray[np.int64]
    pool_targets: NDArray[np.int64]


def fit_on_validation(
    model: SessionModel,
    store: SessionStore,
    vectors: ItemVectors,
    split: Split,
    options: TrainOptions,
    device: torch.device | str = "cpu",
) -> None:
    """Fit the terms of ``model``, if it has any, on the split's validation sessions.

    Transitions are counted on the sessions before them. Arguments are `fit_terms`'s.
    """
    if terms_of(model) is None:
        return
    starts = store.session_starts_us()
    sessions = np.flatnonzero(
        (starts >= split.validation_start_us) & (starts < split.test_start_us)
    )
    if len(sessions) == 0:
        _log.warning("no session to fit the scoring terms on; they keep their start weights")
        return
    first = store.session_offsets[sessions]
    lengths = store.session_offsets[sessions + 1] - first
    fit_terms(
        model,
        store,
        vectors,
        count_transitions(store, len(vectors), end_us=split.validation_start_us),
        np.repeat(sessions, lengths),
        ranges(first, lengths),
        options,
        device,
    )


def fit_terms(
    model: SessionModel,
    store: SessionStore,
    vectors: ItemVectors,
    transitions: TransitionTable,
    session: NDArray[np.int64],
    interaction: NDArray[np.int64],
    options: TrainOptions,
    device: torch.device | str = "cpu",
) -> float:
    """Fit the terms of ``model`` in place, and return the loss of the last steps.

    The loss is the training objective's over the terms alone (over the catalogue, or over a pool
    and what was shown): first the likelihood, which finds its way from anywhere, then the smoothed
    MRR. The network and the item vectors stay as they are.

    Args:
        model: with scoring terms; ends in evaluation mode.
        store: the histories.
        vectors: what the model was trained with.
        transitions: counted without the sessions fitted on.
        session: int64 ``[n]``, the session of each interaction to fit on.
        interaction: int64 ``[n]``, places in the store's columns; items past the vectors are
            passed over.
        options: the training's; decides the negatives and the seed.
        device: where to compute.
    """
    terms = terms_of(model)
    assert isinstance(terms, nn.Module)
    cast(nn.Module, model).eval()
    rng = np.random.default_rng((options.seed, 2))
    known = np.flatnonzero(np.asarray(store.item_rows[interaction]) < len(vectors))
    if len(known) > _MOST_TARGETS:
        known = np.sort(rng.choice(known, _MOST_TARGETS, replace=False))
    session, interaction = session[known], interaction[known]
    u = torch.cat(
        [
            embed_before(model, store, vectors, session[part], interaction[part], device)
            for part in _slices(len(interaction), 2048)
        ]
    ).clone()
    rows = np.asarray(store.item_rows[interaction]).astype(np.int64)
    scores = term_scores(model, store, transitions, device=device)
    counts = np.bincount(rows, minlength=len(vectors))

    def objective(loss: Loss) -> Objective:
        fitted = replace(options, loss=loss, positions_ahead=1)
        return Objective(store, vectors, counts, fitted, torch.device(device), scores)

    stages = [objective("softmax")] * _STEPS + [objective("mrr")] * _STEPS
    terms.reset_parameters()
    optimizer = torch.optim.Adam(terms.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.01, total_iters=len(stages)
    )
    recent = []
    with _frozen(vectors):
        for stage in tqdm(stages, desc="fit terms", unit="step", mininterval=2):
            chosen = _draw(len(rows), rng)
            batch = _Targets(
                items=vectors.outputs.gather(rows[chosen]),
                targets=torch.arange(len(chosen), device=device),
                target_rows=torch.from_numpy(rows[chosen]).to(device),
                interactions=interaction[chosen],
                pool_targets=rows[chosen],
            )
            loss = stage(u[torch.from_numpy(chosen).to(device)], batch, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            recent.append(float(loss.detach()))
    loss_at_end = float(np.mean(recent[-_STEPS // 10 :]))
    _log.info("fitted the scoring terms on %d interactions, loss %.4f", len(rows), loss_at_end)
    return loss_at_end


@contextmanager
def _frozen(vectors: ItemVectors) -> Iterator[None]:
    """Ask for no gradients of trained vectors meanwhile: of a whole catalogue they cost most."""
    vectors.requires_grad_(False)
    try:
        yield
    finally:
        vectors.requires_grad_(True)


def _draw(count: int, rng: np.random.Generator) -> NDArray[Any]:
    if count <= _TARGETS_PER_STEP:
        return np.arange(count)
    return np.sort(rng.choice(count, _TARGETS_PER_STEP, replace=False))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]
