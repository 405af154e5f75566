"""Open sessions drawn from a session store, for whoever judges an exported model on real input."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hiertcn.export.tensors import SESSION_ITEMS, SESSION_LENGTH, USER_STATE
from hiertcn.items.table import ItemTable
from hiertcn.sessions.store import SessionStore

_MOST_ITEMS: Final = 32
_MOST_PAST: Final = 8
_BATCH: Final = 64


@dataclass(frozen=True, eq=False)
class OpenSessions:
    """Open sessions of real users, as the TCN takes them.

    Attributes:
        session_items: float32 [n, length, dim], newest first.
        session_length: int32 [n, 1].
        user_state: float32 [n, hidden].
    """

    session_items: NDArray[np.float32]
    session_length: NDArray[np.int32]
    user_state: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.session_length)

    def batches(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Feeds of at most 64 sessions."""
        for first in range(0, len(self), _BATCH):
            part = slice(first, first + _BATCH)
            yield {
                SESSION_ITEMS.name: self.session_items[part],
                SESSION_LENGTH.name: self.session_length[part],
                USER_STATE.name: self.user_state[part],
            }

    def halves(self) -> tuple["OpenSessions", "OpenSessions"]:
        """Every second one, and the others."""
        parts = [
            OpenSessions(self.session_items[n::2], self.session_length[n::2], self.user_state[n::2])
            for n in (0, 1)
        ]
        return parts[0], parts[1]


def draw_open_sessions(
    store: SessionStore,
    table: ItemTable,
    gru_step: nn.Module,
    start_state: NDArray[np.float32],
    *,
    users: int = 1024,
    seed: int = 0,
) -> OpenSessions:
    """Draw users, fold their last eight sessions before the newest, and cut that somewhere.

    Args:
        store: the session store.
        table: the item table that serves.
        gru_step: ``models.hiertcn_serving.GruStep``.
        start_state: float32 [layers, hidden].
        users: at most this many; one session of each.
        seed: of users and places.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(store.meta.users)[:users]
    newest = store.user_offsets[drawn + 1] - 1
    states = torch.from_numpy(np.repeat(start_state[None], len(drawn), axis=0).copy())
    with torch.inference_mode():
        for back in range(_MOST_PAST, 0, -1):
            has = np.flatnonzero(newest - back >= store.user_offsets[drawn])
            if len(has):
                means = np.stack([_vectors(store, table, s).mean(0) for s in newest[has] - back])
                states[has] = gru_step(states[has], torch.from_numpy(means))
    lengths = np.array(
        [rng.integers(0, 1 + min(_MOST_ITEMS, _size(store, session))) for session in newest]
    )
    width = max(1, int(lengths.max(initial=1)))
    items = np.zeros((len(drawn), width, table.vectors.shape[1]), np.float32)
    for place, (session, length) in enumerate(zip(newest, lengths, strict=True)):
        items[place, :length] = _vectors(store, table, session)[:length][::-1]
    return OpenSessions(
        session_items=items,
        session_length=lengths.astype(np.int32)[:, None],
        user_state=states[:, -1].numpy(),
    )


def _size(store: SessionStore, session: int) -> int:
    return int(store.session_offsets[session + 1] - store.session_offsets[session])


def _vectors(store: SessionStore, table: ItemTable, session: int) -> NDArray[np.float32]:
    part = slice(*store.session_offsets[session : session + 2])
    return np.asarray(table.vectors[store.item_rows[part]], np.float32)
