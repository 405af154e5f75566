"""What counting remembers about a request: sparse features of items, from what led up to it.

Six non-negative numbers for an item, zero for nearly all of them:

- ``transitions``: how often it followed the last items of the running session (of the history,
  where the session is still empty), from a `TransitionTable`;
- ``own_transitions``: how often it followed them, or the session's start, earlier in this user's
  own history, as a share (of one more, so that little evidence stays little);
- ``past_items``: the share of the user's earlier sessions that it has, newer sessions weighing
  more;
- ``session_items``: 1 if it was interacted with in the running session;
- ``familiar_transitions``: its ``transitions`` again, if the user had it in an earlier session:
  what follows and is familiar is likelier than the sum of both;
- ``live_transitions``: how often everybody went on to it from the last items of the running
  session, or began with it, just now (``live_transitions.py``).

A learned gate (models/scoring_terms.py) mixes them into the scores. Training, evaluation and the
sidecar call the same function on the same histories, so their scores agree. A request costs about
20 microseconds beside reading the answer.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import read_only
from hiertcn.sessions.live_transitions import LiveTransitions, no_transitions
from hiertcn.sessions.memory_kernels import (
    HistoryArrays,
    TableArrays,
    fill_catalogue,
    fill_items,
    find_support,
    weigh_items,
)
from hiertcn.sessions.store import SessionStore, ranges
from hiertcn.sessions.transitions import TransitionTable

FEATURES: Final = (
    "transitions",
    "own_transitions",
    "past_items",
    "session_items",
    "familiar_transitions",
    "live_transitions",
)
HISTORY: Final = 200
"""Newest interactions of a user that are remembered."""

_ANY_ROW: Final = np.iinfo(np.int32).max


@dataclass(frozen=True, kw_only=True)
class Histories:
    """The newest interactions of each request's user, oldest first, one request after another.

    Attributes:
        rows: int32 ``[h]``, item rows; -1, and those that are no items, keep their place only.
        sessions: int64 ``[h]``, a number that grows from session to session of one request.
        offsets: int64 ``[n + 1]``.
        running: int64 ``[n]``, interactions of the running session, which are each request's last.
        asked_us: int64 ``[n]``, when each request is made, microseconds since the epoch.
    """

    rows: NDArray[np.int32]
    sessions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    running: NDArray[np.int64]
    asked_us: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.running)


def histories_before(
    store: SessionStore, session: NDArray[np.int64], interaction: NDArray[np.int64]
) -> Histories:
    """Return the histories just before interactions of a store.

    Args:
        store: the sessions.
        session: int64 ``[n]``, the session of each interaction.
        interaction: int64 ``[n]``, places in the store's columns.
    """
    session_start = np.asarray(store.session_offsets[session])
    first = np.asarray(store.session_offsets[store.user_offsets[store.user_of_session(session)]])
    first = np.maximum(first, interaction - HISTORY)
    counts = interaction - first
    places = ranges(first, counts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Histories(
        rows=store.item_rows[places],
        sessions=np.searchsorted(store.session_offsets, places, side="right") - 1,
        offsets=offsets,
        running=np.minimum(interaction - session_start, counts),
        asked_us=np.asarray(store.timestamps_us[interaction], np.int64),
    )


class MemoryFeatures:
    """Computes the features of items for histories.

    Args:
        table: the transitions; its length is the catalogue's.
        live: the newest ones; None where there are none.
        items_past_table: whether rows past the table are items too, which nothing is known to
            follow: the sidecar's, that came after the table was made. Else they are none.
    """

    def __init__(
        self,
        table: TransitionTable,
        live: LiveTransitions | None = None,
        *,
        items_past_table: bool = False,
    ) -> None:
        self._live = no_transitions() if live is None else live
        self._table = TableArrays(
            read_only(table.offsets),
            read_only(table.followers),
            read_only(table.weights),
            read_only(table.totals),
            _ANY_ROW if items_past_table else len(table),
        )

    @property
    def items(self) -> int:
        """Length of the catalogue that the table is of."""
        return len(self._table.totals)

    def of_catalogue(self, histories: Histories) -> NDArray[np.float32]:
        """Return the features of the table's items: float32 ``[features, n, items]``."""
        out = np.zeros((len(FEATURES), len(histories), self.items), np.float32)
        fill_catalogue(out, *self._inputs(histories))
        return out

    def of_items(
        self,
        histories: Histories,
        rows: NDArray[np.integer[Any]],
    ) -> NDArray[np.float32]:
        """Return the features of the asked items, float32 ``[features, n, count]``.

        Args:
            histories: ``n`` of them.
            rows: item rows, ``[n, count]``, or ``[count]`` asked of every history; negative rows,
                and those that are no items, get zeros.
        """
        shared = rows.ndim == 1
        asked = np.ascontiguousarray(rows[None] if shared else rows, np.int64)
        out = np.zeros((len(FEATURES), len(histories), asked.shape[1]), np.float32)
        fill_items(out, asked, shared, *self._inputs(histories))
        return out

    def weighed(
        self, histories: Histories, rows: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return weighted sums of the asked items' features, without the features themselves.

        Args:
            histories: ``n`` of them.
            rows: int64 ``[n, count]``, as in :meth:`of_items`.
            weights: float32 ``[n, features]``.

        Returns:
            The sums, float32 ``[n, count]``, and ``session_items``, float32 ``[n, count]``.
        """
        sums, in_session = np.zeros((2, *rows.shape), np.float32)
        weigh_items(sums, in_session, rows, weights, *self._inputs(histories))
        return sums, in_session

    def support(self, histories: Histories, most: int) -> NDArray[np.int64]:
        """Return the items with any feature above zero, int64 ``[n, most]``, -1 where fewer.

        Where there are more than ``most``, those with the largest sum of features are kept.
        """
        out = np.full((len(histories), most), -1, np.int64)
        find_support(out, *self._inputs(histories))
        return out

    def _inputs(self, histories: Histories) -> tuple[HistoryArrays, TableArrays, LiveTransitions]:
        return (
            HistoryArrays(
                histories.rows,
                histories.sessions,
                histories.offsets,
                histories.running,
                histories.asked_us,
            ),
            self._table,
            self._live,
        )
