"""Exact user embeddings at chosen interactions, from whole histories.

Each asked interaction sees everything its user did before it: the closed sessions through one GRU
step each, in order, from the start state, and the running session through the network's receptive
field. Users are folded side by side, the ones with most sessions first, so a step works on those
that still have sessions to go. Nothing is cached between calls; memory follows the interactions of
the largest step, not the length of histories.

Item rows past the table (an older release's table under a newer log) are skipped, as the sidecar
skips unknown items; a session with no known item makes no step.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiertcn.items.table import ItemTable
from hiertcn.sessions.store import SessionStore, ranges
from hiertcn.training.item_vectors import ItemVectors, as_vectors
from hiertcn.training.session_model import FoldsItems, ReadsContext, SessionContext, SessionModel
from hiertcn.training.whole_history import HistoryModel


@torch.inference_mode()
def embed_before(
    model: SessionModel,
    store: SessionStore,
    table: ItemTable | ItemVectors,
    session: NDArray[np.int64],
    interaction: NDArray[np.int64],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return ``u`` just before each interaction.

    Args:
        model: in evaluation mode, on ``device``.
        store: the histories.
        table: the vectors the model was trained with.
        session: int64 ``[n]``, the session of each interaction.
        interaction: int64 ``[n]``, places in the store's columns.
        device: where to compute.

    Returns:
        float32 ``[n, dim]`` on ``device``.
    """
    table = as_vectors(table, device)
    if isinstance(model, HistoryModel):
        return model.embed_requests(store, table, session, interaction)
    sessions, which = np.unique(session, return_inverse=True)
    states = states_before(model, store, table, sessions, device)
    first = np.full(len(sessions), np.iinfo(np.int64).max)
    last = np.zeros(len(sessions), np.int64)
    np.minimum.at(first, which, interaction)
    np.maximum.at(last, which, interaction)
    first = np.maximum(first - model.receptive_field, store.session_offsets[sessions])

    rows = store.item_rows[ranges(first, last - first)]
    owner = np.repeat(np.arange(len(sessions)), last - first)
    known = rows < len(table)
    seen = np.concatenate([[0], np.cumsum(known)])
    offsets = np.concatenate([[0], np.cumsum(last - first)])
    lengths = np.bincount(owner[known], minlength=len(sessions))

    items, lengths_ = table.gather(rows[known]), _tensor(lengths, device)
    if isinstance(model, ReadsContext) and model.reads_context:
        places = ranges(first, last - first)[known]
        context = _context(model, store, sessions, places, first, device)
        u = model.encode(items, lengths_, states[:, -1], context)
    else:
        u = model.encode(items, lengths_, states[:, -1])
    # One output row more than items a session: its start token's.
    position = seen[offsets[which] + interaction - first[which]] - seen[offsets[which]]
    return u.index_select(0, _tensor(seen[offsets[which]] + which + position, device))


@torch.inference_mode()
def states_before(
    model: SessionModel,
    store: SessionStore,
    table: ItemTable | ItemVectors,
    sessions: NDArray[np.int64],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the user state before each session, ``[n, layers, hidden]``.

    Args:
        model: in evaluation mode, on ``device``.
        store: the histories.
        table: the vectors the model was trained with.
        sessions: int64 ``[n]``, distinct sessions.
        device: where to compute.
    """
    table = as_vectors(table, device)
    if len(sessions) == 0:
        return model.initial_state(0)
    owner = store.user_of_session(sessions)
    steps = sessions - store.user_offsets[owner]
    users, which = np.unique(owner, return_inverse=True)
    longest = np.zeros(len(users), np.int64)
    np.maximum.at(longest, which, steps)
    order = np.argsort(-longest, kind="stable")
    place = np.empty(len(users), np.int64)
    place[order] = np.arange(len(users))
    users, longest = users[order], longest[order]

    by_step = np.argsort(steps, kind="stable")
    bounds = np.searchsorted(steps[by_step], np.arange(int(longest[0]) + 2))
    state = model.initial_state(len(users)).clone()
    states = torch.empty(len(sessions), *state.shape[1:], device=state.device)
    for step in range(int(longest[0]) + 1):
        asked = by_step[bounds[step] : bounds[step + 1]]
        if len(asked):
            states[_tensor(asked, device)] = state[_tensor(place[which[asked]], device)]
        active = int(np.searchsorted(-longest, -step))
        if active:
            after, closes = _fold(
                model, state[:active], store, table, store.user_offsets[users[:active]] + step
            )
            if not closes.all():
                after = torch.where(_tensor(closes, device)[:, None, None], after, state[:active])
            state[:active] = after
    return states


def _fold(
    model: SessionModel,
    state: Tensor,
    store: SessionStore,
    table: ItemVectors,
    sessions: NDArray[np.int64],
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Return the states after the sessions, and whether each has a known item and so counts."""
    if not isinstance(model, FoldsItems):
        means, closes = _session_means(store, table, sessions)
        return model.gru_step(state, means), closes
    starts = store.session_offsets[sessions]
    counts = store.session_offsets[sessions + 1] - starts
    places = ranges(starts, counts)
    rows = store.item_rows[places]
    known = rows < len(table)
    lengths = np.bincount(
        np.repeat(np.arange(len(sessions)), counts)[known], minlength=len(sessions)
    )
    items, lengths_ = table.gather(rows[known]), _tensor(lengths, state.device)
    if isinstance(model, ReadsContext) and model.reads_context:
        context = _context(model, store, sessions, places[known], starts, state.device)
        return model.fold_items(state, items, lengths_, context), lengths > 0
    return model.fold_items(state, items, lengths_), lengths > 0


def _context(
    model: ReadsContext,
    store: SessionStore,
    sessions: NDArray[np.int64],
    places: NDArray[np.int64],
    first: NDArray[np.int64],
    device: torch.device | str,
) -> SessionContext:
    """Return what goes with the sessions, of which the interactions at ``places`` are read."""
    starts = store.session_offsets[sessions]
    moments = store.timestamps_us
    is_first = np.isin(places, starts)
    gaps = np.where(is_first, 0, moments[places] - moments[np.maximum(places - 1, 0)])
    owner = store.user_of_session(sessions)
    pauses = moments[starts] - moments[np.maximum(starts - 1, 0)]
    steps = sessions - store.user_offsets[owner]
    types = np.zeros(len(places), np.int64)
    if store.event_types is not None and model.event_types:
        # A later log may name types the model has not learnt, and in another order.
        codes = {name: code for code, name in enumerate(model.event_types, start=1)}
        types = np.array([0, *(codes.get(name, 0) for name in store.meta.event_types)])[
            store.event_types[places]
        ]
    parts = (gaps, np.where(steps == 0, -1, pauses), first - starts, steps, types)
    return SessionContext(*(_tensor(part, device) for part in parts))


def _session_means(
    store: SessionStore, table: ItemVectors, sessions: NDArray[np.int64]
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Return each session's mean vector, and whether it has a known item."""
    starts = store.session_offsets[sessions]
    counts = store.session_offsets[sessions + 1] - starts
    rows = store.item_rows[ranges(starts, counts)]
    known = rows < len(table)
    owner = np.repeat(np.arange(len(sessions)), counts)
    known_counts = np.bincount(owner[known], minlength=len(sessions))
    vectors = table.gather(rows[known])
    sums = vectors.new_zeros(len(sessions), table.dim)
    sums.index_add_(0, _tensor(owner[known], vectors.device), vectors)
    return sums / _tensor(np.maximum(known_counts, 1), vectors.device).unsqueeze(
        1
    ), known_counts > 0


def _tensor(array: NDArray[np.generic], device: torch.device | str) -> Tensor:
    return torch.from_numpy(array).to(device)
