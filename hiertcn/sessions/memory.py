"""What counting remembers about a request: sparse features of items from the user's own history.

Five non-negative numbers for an item, zero for nearly all of them:

- ``transitions``: how often it followed the last items of the running session (of the history,
  where the session is still empty), from a `TransitionTable`;
- ``own_transitions``: how often it followed them, or the session's start, earlier in this user's
  own history, as a share (of one more, so that little evidence stays little);
- ``past_items``: the share of the user's earlier sessions that it has, newer sessions weighing
  more;
- ``session_items``: 1 if it was interacted with in the running session;
- ``familiar_transitions``: its ``transitions`` again, if the user had it in an earlier session:
  what follows and is familiar is likelier than the sum of both.

A learned gate (models/scoring_terms.py) mixes them into the scores. Training, evaluation and the
sidecar call the same function on the same histories, so their scores agree. A request costs about
20 microseconds beside reading the answer.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiertcn.items.hashing import compiled
from hiertcn.sessions.store import SessionStore, ranges
from hiertcn.sessions.transitions import TransitionTable

FEATURES: Final = (
    "transitions",
    "own_transitions",
    "past_items",
    "session_items",
    "familiar_transitions",
)
HISTORY: Final = 200
"""Newest interactions of a user that are remembered."""

_CONTEXT: Final = 12
_CONTEXT_DECAY: Final = 0.3
_OWN_CONTEXT: Final = 3
_OWN_REACH: Final = 4
_SESSION_DECAY: Final = 0.8


@dataclass(frozen=True, kw_only=True)
class Histories:
    """The newest interactions of each request's user, oldest first, one request after another.

    Attributes:
        rows: int32 ``[h]``, item rows; those past the catalogue, or -1, keep their place only.
        sessions: int64 ``[h]``, a number that grows from session to session of one request.
        offsets: int64 ``[n + 1]``.
        running: int64 ``[n]``, interactions of the running session, which are each request's last.
    """

    rows: NDArray[np.int32]
    sessions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    running: NDArray[np.int64]

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
    )


class MemoryFeatures:
    """Computes the features of items for histories.

    Args:
        table: the transitions; its length is the catalogue's.
    """

    def __init__(self, table: TransitionTable) -> None:
        self._table = table
        self._scratch = np.zeros((len(FEATURES), len(table)), np.float32)

    @property
    def items(self) -> int:
        """Length of the catalogue."""
        return len(self._table)

    def of_catalogue(self, histories: Histories) -> NDArray[np.float32]:
        """Return the features of all items for ``n`` histories: ``[features, n, items]``."""
        out = np.zeros((len(FEATURES), len(histories), self.items), np.float32)
        _fill_catalogue(out, *self._inputs(histories))
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
                and those past the table, get zeros.
        """
        shared = rows.ndim == 1
        asked = np.ascontiguousarray(rows[None] if shared else rows, np.int64)
        out = np.zeros((len(FEATURES), len(histories), asked.shape[1]), np.float32)
        _fill_items(out, self._scratch, asked, shared, *self._inputs(histories))
        return out

    def support(self, histories: Histories, most: int) -> NDArray[np.int64]:
        """Return the items with any feature above zero, int64 ``[n, most]``, -1 where fewer.

        Where there are more than ``most``, those with the largest sum of features are kept.
        """
        out = np.full((len(histories), most), -1, np.int64)
        _find_support(out, self._scratch, *self._inputs(histories))
        return out

    def _inputs(self, histories: Histories) -> "tuple[_Histories, _Table]":
        table = self._table
        return (
            _Histories(histories.rows, histories.sessions, histories.offsets, histories.running),
            _Table(table.offsets, table.followers, table.weights, table.totals),
        )


class _Histories(NamedTuple):
    """`Histories` as compiled code takes it."""

    rows: NDArray[np.int32]
    sessions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    running: NDArray[np.int64]


class _Table(NamedTuple):
    """`TransitionTable` as compiled code takes it."""

    offsets: NDArray[np.int64]
    followers: NDArray[np.int32]
    weights: NDArray[np.float32]
    totals: NDArray[np.float32]


@compiled
def _add_features(
    request: int,
    histories: _Histories,
    table: _Table,
    features: NDArray[np.float32],
) -> None:
    """Add one request's features to ``features [5, items]``."""
    rows, sessions = histories.rows, histories.sessions
    items = len(table.totals)
    first, end = histories.offsets[request], histories.offsets[request + 1]
    session_start = end - histories.running[request]

    context_start = session_start if session_start < end else first
    context_start = max(context_start, end - _CONTEXT)
    weight_sum, weight = 0.0, 1.0
    for _ in range(context_start, end):
        weight_sum += weight
        weight *= _CONTEXT_DECAY
    weight = 1.0
    for place in range(end - 1, context_start - 1, -1):
        item = rows[place]
        if 0 <= item < items:
            total = table.totals[item]
            if total > 0.0:
                share = weight / (weight_sum * total)
                for entry in range(table.offsets[item], table.offsets[item + 1]):
                    features[0, table.followers[entry]] += share * table.weights[entry]
        weight *= _CONTEXT_DECAY

    # Twice: what is added is a share of the sum.
    own_sum = 0.0
    for adds in (False, True):
        weight = 1.0
        for back in range(1, _OWN_CONTEXT + 1):
            at_start = end - back < session_start
            item = np.int32(-1) if at_start else rows[end - back]
            for place in range(first, session_start if at_start else end - back):
                if at_start:
                    if place > first and sessions[place] == sessions[place - 1]:
                        continue
                    begin = place
                else:
                    if rows[place] != item:
                        continue
                    begin = place + 1
                followed = weight
                for follower_place in range(begin, min(begin + _OWN_REACH, end)):
                    if sessions[follower_place] != sessions[place]:
                        break
                    follower = rows[follower_place]
                    if 0 <= follower < items:
                        if adds:
                            features[1, follower] += followed / (own_sum + 1.0)
                        else:
                            own_sum += followed
                    followed *= 0.5
            if at_start:
                break
            weight *= _CONTEXT_DECAY

    past = 0.0
    for place in range(first, session_start):
        if 0 <= rows[place] < items:
            past += _SESSION_DECAY ** _sessions_ago(sessions, place, session_start)
    for place in range(first, session_start):
        item = rows[place]
        if 0 <= item < items:
            ago = _sessions_ago(sessions, place, session_start)
            features[2, item] += _SESSION_DECAY**ago / past
            features[4, item] = features[0, item]
    for place in range(session_start, end):
        item = rows[place]
        if 0 <= item < items:
            features[3, item] = 1.0


@compiled
def _sessions_ago(sessions: NDArray[np.int64], place: int, session_start: int) -> int:
    return int(sessions[session_start - 1] - sessions[place])


@compiled
def _clear_features(
    request: int,
    histories: _Histories,
    table: _Table,
    features: NDArray[np.float32],
) -> None:
    """Set back to zero what `_add_features` may have touched."""
    items = features.shape[1]
    first, end = histories.offsets[request], histories.offsets[request + 1]
    for place in range(first, end):
        item = histories.rows[place]
        if 0 <= item < items:
            features[:, item] = 0.0
            if place >= end - _CONTEXT:
                for entry in range(table.offsets[item], table.offsets[item + 1]):
                    features[0, table.followers[entry]] = 0.0


@compiled
def _fill_catalogue(
    out: NDArray[np.float32],
    histories: _Histories,
    table: _Table,
) -> None:
    for request in range(len(histories.running)):
        _add_features(request, histories, table, out[:, request])


@compiled
def _fill_items(
    out: NDArray[np.float32],
    scratch: NDArray[np.float32],
    asked: NDArray[np.int64],
    shared: bool,
    histories: _Histories,
    table: _Table,
) -> None:
    for request in range(len(histories.running)):
        _add_features(request, histories, table, scratch)
        mine = asked[0] if shared else asked[request]
        for column in range(len(mine)):
            if 0 <= mine[column] < scratch.shape[1]:
                for feature in range(len(scratch)):
                    out[feature, request, column] = scratch[feature, mine[column]]
        _clear_features(request, histories, table, scratch)


@compiled
def _find_support(
    out: NDArray[np.int64],
    scratch: NDArray[np.float32],
    histories: _Histories,
    table: _Table,
) -> None:
    for request in range(len(histories.running)):
        _add_features(request, histories, table, scratch)
        first, end = histories.offsets[request], histories.offsets[request + 1]
        found = [np.int64(0) for _ in range(0)]
        sums = [np.float32(0) for _ in range(0)]
        items = scratch.shape[1]
        for place in range(first, end):
            item = np.int64(histories.rows[place])
            if 0 <= item < items:
                total = scratch[:, item].sum()
                if total > 0:
                    found.append(item)
                    sums.append(total)
                    scratch[:, item] = 0.0
        for place in range(max(first, end - _CONTEXT), end):
            item = np.int64(histories.rows[place])
            if 0 <= item < items:
                for entry in range(table.offsets[item], table.offsets[item + 1]):
                    follower = np.int64(table.followers[entry])
                    total = scratch[0, follower]
                    if total > 0:
                        found.append(follower)
                        sums.append(total)
                        scratch[0, follower] = 0.0
        if len(found):
            order = np.argsort(-np.array(sums), kind="mergesort")
            for place in range(min(out.shape[1], len(found))):
                out[request, place] = found[order[place]]
