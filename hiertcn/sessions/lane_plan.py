"""Which piece of which session stands at which place of which lane in an epoch.

Users queue up in a given order, each at the lane that holds the fewest pieces; lanes are then read
side by side. Both loops are compiled: 6 M users with 23 M sessions take seconds.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.sessions.store import SessionStore, ranges

# At this size of step the products fill a CPU's caches and an epoch still has many updates.
_INTERACTIONS_PER_STEP: Final = 512
_FEWEST_LANES, _MOST_LANES = 8, 256


@dataclass(frozen=True)
class Pieces:
    """Interactions ``start[i]:stop[i]`` of session ``session[i]``; a user's pieces are adjacent."""

    session: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    first_of_user: NDArray[np.bool_]
    user_offsets: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Number of pieces."""
        return len(self.session)

    @property
    def users(self) -> int:
        """Number of users that have a piece."""
        return len(self.user_offsets) - 1


@dataclass(frozen=True)
class LanePlan:
    """Pieces by place in their lane (the step and the slot), then lane.

    ``place_offsets [places + 1]``; a place that only other ranks reach is not in it.
    """

    piece: NDArray[np.int64]
    lane: NDArray[np.int32]
    place_offsets: NDArray[np.int64]
    steps: int


def cut_pieces(store: SessionStore, max_length: int, end_us: int | None) -> Pieces:
    """Cut the sessions that start before ``end_us`` into pieces of at most ``max_length``."""
    offsets = np.asarray(store.session_offsets)
    user_offsets = np.asarray(store.user_offsets)
    kept = np.diff(user_offsets)
    if end_us is not None:
        before = np.concatenate([[0], np.cumsum(store.session_starts_us() < end_us)])
        kept = before[user_offsets[1:]] - before[user_offsets[:-1]]
    first = user_offsets[:-1][kept > 0]
    kept = kept[kept > 0]

    session = ranges(first, kept)
    lengths = offsets[session + 1] - offsets[session]
    cuts = -(-lengths // max_length)
    number = ranges(np.zeros_like(cuts), cuts)
    session = np.repeat(session, cuts)
    start = offsets[session] + number * max_length
    stop = np.minimum(start + max_length, offsets[session + 1])

    before_session = np.concatenate([[0], np.cumsum(cuts)])
    piece_offsets = before_session[np.concatenate([[0], np.cumsum(kept)])]
    first_of_user = np.zeros(len(session), bool)
    first_of_user[piece_offsets[:-1]] = True
    return Pieces(session, start, stop, first_of_user, piece_offsets)


def plan_lanes(
    pieces: Pieces,
    order: NDArray[np.int64],
    *,
    lanes: int,
    own: range,
    sessions_per_step: int,
) -> LanePlan:
    """Queue users in ``order`` (int64 ``[users]``) and lay out the lanes ``own`` of all."""
    lane_of_user, held = _fewest_pieces_first(order, pieces.user_offsets, lanes)
    piece, lane, offsets = _lay_out(
        order, pieces.user_offsets, lane_of_user, held[own.start : own.stop], own.start
    )
    return LanePlan(piece, lane, offsets, -(-int(held.max()) // sessions_per_step))


def choose_lanes(store: SessionStore, end_us: int, sessions_per_step: int) -> int:
    """Return how many lanes give a step about 512 interactions of sessions before ``end_us``."""
    lengths = np.diff(store.session_offsets)[store.session_starts_us() < end_us]
    mean = float(lengths.mean()) if len(lengths) else 1.0
    wanted = round(_INTERACTIONS_PER_STEP / (sessions_per_step * mean))
    return min(max(wanted, _FEWEST_LANES), _MOST_LANES)


@compiled
def _fewest_pieces_first(order: Any, user_offsets: Any, lanes: int) -> Any:
    """Assign users, in order, to the lane with the fewest pieces (the lowest one of equals).

    Returns:
        int32 ``[users]`` lane of each user of ``order``, and int64 ``[lanes]`` pieces held.
    """
    chosen = np.empty(len(order), np.int32)
    held = np.zeros(lanes, np.int64)
    heap = np.arange(lanes)
    for place in range(len(order)):
        user = order[place]
        lane = heap[0]
        chosen[place] = lane
        held[lane] += user_offsets[user + 1] - user_offsets[user]
        hole = 0
        while True:
            child = 2 * hole + 1
            if child >= lanes:
                break
            right = child + 1
            if right < lanes:
                one, other = heap[child], heap[right]
                if held[other] < held[one] or (held[other] == held[one] and other < one):
                    child = right
            below = heap[child]
            if held[lane] < held[below] or (held[lane] == held[below] and lane < below):
                break
            heap[hole] = below
            hole = child
        heap[hole] = lane
    return chosen, held


@compiled
def _lay_out(order: Any, user_offsets: Any, lane_of_user: Any, held: Any, first_lane: int) -> Any:
    """Order the pieces of ``len(held)`` lanes from ``first_lane`` on by place, then lane."""
    lanes = len(held)
    # Users of one lane, one lane after another, in their order.
    starts = np.zeros(lanes + 1, np.int64)
    for place in range(len(order)):
        lane = lane_of_user[place] - first_lane
        if 0 <= lane < lanes:
            starts[lane + 1] += 1
    starts = np.cumsum(starts)
    users = np.empty(starts[lanes], np.int64)
    filled = starts[:lanes].copy()
    for place in range(len(order)):
        lane = lane_of_user[place] - first_lane
        if 0 <= lane < lanes:
            users[filled[lane]] = order[place]
            filled[lane] += 1

    places = held.max()
    ending = np.zeros(places + 1, np.int64)
    for lane in range(lanes):
        ending[held[lane]] += 1
    offsets = np.zeros(places + 1, np.int64)
    reaching = lanes
    for place in range(places):
        reaching -= ending[place]
        offsets[place + 1] = offsets[place] + reaching

    total = offsets[places]
    pieces = np.empty(total, np.int64)
    lane_of_piece = np.empty(total, np.int32)
    taken = np.zeros(places, np.int32)
    for lane in range(lanes):
        place = 0
        for k in range(starts[lane], starts[lane + 1]):
            for piece in range(user_offsets[users[k]], user_offsets[users[k] + 1]):
                at = offsets[place] + taken[place]
                taken[place] += 1
                pieces[at] = piece
                lane_of_piece[at] = lane
                place += 1
    return pieces, lane_of_piece, offsets
