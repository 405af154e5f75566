"""Lets networks that know no hierarchy read a user's whole history as one sequence.

The mini-batch generator then sees one long session per user and cuts it into pieces with context.
Columns stay the store's own, so an interaction keeps its place, its impressions and its target.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hiertcn.sessions.store import (
    IMPRESSION_OFFSETS,
    IMPRESSION_ROWS,
    ITEM_ROWS,
    SESSION_OFFSETS,
    TIMESTAMPS_US,
    USER_OFFSETS,
    SessionStore,
    StoreMeta,
)
from hiertcn.training.item_vectors import ItemVectors


@runtime_checkable
class HistoryModel(Protocol):
    """A :class:`hiertcn.training.session_model.SessionModel` over whole histories."""

    def learn_from(self, store: SessionStore, end_us: int) -> SessionStore:
        """Return the store to make batches of; sessions from ``end_us`` on are not learnt."""

    def embed_requests(
        self,
        store: SessionStore,
        vectors: ItemVectors,
        session: NDArray[np.int64],
        interaction: NDArray[np.int64],
    ) -> Tensor:
        """Return ``u`` just before each interaction, ``[n], [n] -> [n, dim]``."""


def history_store(store: SessionStore, end_us: int) -> SessionStore:
    """Return the same columns with each user's sessions before ``end_us`` as one.

    What a user did in sessions that start at or after ``end_us`` is a second session, which starts
    there too.
    """
    session_offsets = np.asarray(store.session_offsets)
    user_offsets = np.asarray(store.user_offsets)
    learnt = np.concatenate([[0], np.cumsum(store.session_starts_us() < end_us)])
    middle = user_offsets[:-1] + learnt[user_offsets[1:]] - learnt[user_offsets[:-1]]
    # Per user the first session, and the first one that is not learnt.
    bounds = np.column_stack([user_offsets[:-1], middle])
    is_session = np.column_stack([middle > user_offsets[:-1], middle < user_offsets[1:]])
    offsets = np.append(session_offsets[bounds[is_session]], session_offsets[-1:])
    meta = store.meta
    columns: dict[str, NDArray[Any]] = {
        ITEM_ROWS: store.item_rows,
        TIMESTAMPS_US: store.timestamps_us,
        SESSION_OFFSETS: offsets,
        USER_OFFSETS: np.concatenate([[0], np.cumsum(is_session.sum(1))]),
    }
    if store.impression_rows is not None and store.impression_offsets is not None:
        columns[IMPRESSION_ROWS] = store.impression_rows
        columns[IMPRESSION_OFFSETS] = store.impression_offsets
    return SessionStore(
        store.directory,
        StoreMeta(
            users=meta.users,
            sessions=len(offsets) - 1,
            interactions=meta.interactions,
            items=meta.items,
            impressions=meta.impressions,
            gap_us=meta.gap_us,
            watermark_us=meta.watermark_us,
        ),
        columns,
    )
