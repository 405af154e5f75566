"""The queue-based mini-batch generator (HierTCN section 3.6.2), planned with arrays.

``lanes`` queues run side by side. Each user, in an order shuffled by the seed and the epoch, joins
the lane that holds the fewest sessions so far; a step takes the next ``sessions_per_step`` sessions
of every lane. The trainer carries one user state per lane from step to step, so a user's sessions
are seen in order, back-propagation is truncated at the step, and no user is padded to another's
number of sessions. ``reset`` marks a lane's change of user.

Long sessions: a session of more than ``max_length`` interactions is cut into consecutive pieces of
``max_length`` that take one place in the lane each. A piece after the first brings up to
``context`` earlier items of its session along as input without predicting them again; with
``context`` at least the model's receptive field, every prediction is the one the uncut session
would give. Only the last piece closes the session, with the mean over all of it.

Ranks (or worker processes) share the lanes: each owns a consecutive part, numbers its lanes from 0,
and sees the pieces that one process would see in them at the same step. A rank whose lanes end
early yields empty batches until the others are done.

A batch holds item rows and no embeddings. Planning costs some 50 bytes a session and one heap
operation a user per epoch; planning and batches are compiled, and building one runs without the
GIL.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.sessions.lane_plan import LanePlan, cut_pieces, plan_lanes
from hiertcn.sessions.store import SessionStore


@dataclass(frozen=True)
class SessionBatch:
    """One step of the generator: ``pieces`` of sessions (whole ones, but for long sessions).

    Pieces are ordered by slot, then lane: slot ``k`` (the ``k``-th piece of each lane in this step)
    is ``slot_offsets[k]:slot_offsets[k + 1]``. Rows are packed in that order.

    Shapes:
        lane: ``[pieces]`` int64, distinct within a slot.
        slot_offsets: ``[slots + 1]`` int64.
        session: ``[pieces]`` int64, the session's number in the store.
        reset: ``[pieces]`` bool, the lane starts a new user with this piece.
        closes: ``[pieces]`` bool, the session ends with this piece.
        lengths: ``[pieces]`` int64, rows per piece, all >= 1, summing to ``n``.
        item_rows: ``[n + extra]`` int32; the ``extra`` rows at the end are earlier items of cut
            sessions that only ``member_rows`` points to.
        interactions: ``[n]`` int64, each row's place in the store's columns.
        timestamps_us: ``[n]`` int64, microseconds since the epoch.
        gaps_us: ``[n]`` int64, time since the interaction before in the session; 0 for its first.
        session_gaps_us: ``[pieces]`` int64, time from the end of the user's session before to the
            start of this one; -1 for a user's first.
        skipped: ``[pieces]`` int64, items of the session before the piece's first row.
        steps: ``[pieces]`` int64, sessions of the user before the piece's.
        event_types: ``[n]`` int64, see ``SessionStore.event_types``; 0 where the store has none.
        is_target: ``[n]`` bool, false for context.
        targets: ``[targets]`` int64, where ``is_target`` is true.
        inputs: ``[n - pieces]`` int64, all rows but each piece's last.
        member_rows: ``[members]`` int64, indices into ``item_rows`` of all items of the sessions
            that close, one closing piece after another.
        member_owner: ``[members]`` int64, the piece that closes each one's session.
        member_lengths: ``[closing pieces]`` int64.
    """

    lane: NDArray[np.int64]
    slot_offsets: NDArray[np.int64]
    session: NDArray[np.int64]
    reset: NDArray[np.bool_]
    closes: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    item_rows: NDArray[np.int32]
    interactions: NDArray[np.int64]
    timestamps_us: NDArray[np.int64]
    gaps_us: NDArray[np.int64]
    session_gaps_us: NDArray[np.int64]
    skipped: NDArray[np.int64]
    steps: NDArray[np.int64]
    event_types: NDArray[np.int64]
    is_target: NDArray[np.bool_]
    targets: NDArray[np.int64]
    inputs: NDArray[np.int64]
    member_rows: NDArray[np.int64]
    member_owner: NDArray[np.int64]
    member_lengths: NDArray[np.int64]


class SessionBatches:
    """Batches of all sessions that start before ``end_us``, every epoch in another order.

    Args:
        store: the sessions.
        lanes: number of queues, B in the paper.
        sessions_per_step: places a lane has in one step.
        max_length: interactions beyond which a session is cut.
        context: earlier items a later piece of a cut session brings along.
        end_us: sessions starting at or after it are left out; None keeps all. A user's sessions are
            ordered by time, so what is kept is always the beginning of a history.
        seed: with the epoch number, fixes the order of users.
        rank: which part of the lanes, from 0; ``lanes`` then still counts those of all ranks.
        world_size: number of ranks.

    Raises:
        InputError: a size is not positive, a rank would have no lane, or no session is left.
    """

    def __init__(
        self,
        store: SessionStore,
        *,
        lanes: int,
        sessions_per_step: int,
        max_length: int = 200,
        context: int = 0,
        end_us: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value, least in (
            ("lanes", lanes, 1),
            ("sessions_per_step", sessions_per_step, 1),
            ("max_length", max_length, 1),
            ("context", context, 0),
            ("world_size", world_size, 1),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; expected a whole number >= {least}")
        if lanes < world_size:
            raise InputError(
                f"lanes is {lanes} with {world_size} ranks; expected at least one lane a rank"
            )
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank}; expected a whole number from 0 to {world_size - 1}")
        self.store = store
        self._first_lane = rank * lanes // world_size
        self._own_lanes = (rank + 1) * lanes // world_size - self._first_lane
        self._plan_of: tuple[int, LanePlan] | None = None
        self.lanes, self.sessions_per_step = lanes, sessions_per_step
        self.max_length, self.context, self.seed = max_length, context, seed
        self._pieces = cut_pieces(store, max_length, end_us)
        if self._pieces.total == 0:
            raise InputError(
                f"no session starts before {end_us} us since 1970; expected at least one to train "
                "on: use a longer log or a later validation start"
            )

    @property
    def interactions(self) -> int:
        """Interactions predicted per epoch, by all ranks: each kept one exactly once."""
        return int((self._pieces.stop - self._pieces.start).sum())

    @property
    def first_lane(self) -> int:
        """This rank's first lane, as all ranks count them."""
        return self._first_lane

    @property
    def own_lanes(self) -> int:
        """Lanes of this rank."""
        return self._own_lanes

    def steps(self, epoch: int) -> int:
        """Return how many batches the epoch has, the same for every rank."""
        return self._plan(epoch).steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[SessionBatch]:
        """Yield the epoch's batches from ``first_step`` on, as an uninterrupted run would."""
        plan = self._plan(epoch)
        for step in range(first_step, plan.steps):
            yield self._batch(plan, step)

    def _plan(self, epoch: int) -> LanePlan:
        if self._plan_of is None or self._plan_of[0] != epoch:
            self._plan_of = epoch, self._make_plan(epoch)
        return self._plan_of[1]

    def _make_plan(self, epoch: int) -> LanePlan:
        order = np.random.default_rng((self.seed, epoch)).permutation(self._pieces.users)
        return plan_lanes(
            self._pieces,
            order,
            lanes=self.lanes,
            own=range(self._first_lane, self._first_lane + self._own_lanes),
            sessions_per_step=self.sessions_per_step,
        )

    def _batch(self, plan: LanePlan, step: int) -> SessionBatch:
        pieces, store = self._pieces, self.store
        types = store.event_types if store.event_types is not None else _NO_TYPES
        first_place = step * self.sessions_per_step
        offsets = plan.place_offsets[first_place : first_place + self.sessions_per_step + 1]
        if len(offsets) == 0:
            offsets = plan.place_offsets[-1:]
        chosen = slice(offsets[0], offsets[-1])
        return SessionBatch(
            plan.lane[chosen].astype(np.int64),
            offsets - offsets[0],
            *_build(
                plan.piece[chosen],
                pieces.session,
                pieces.start,
                pieces.stop,
                pieces.first_of_user,
                store.session_offsets,
                store.item_rows,
                store.timestamps_us,
                store.user_offsets,
                types,
                self.context,
            ),
        )


_NO_TYPES: Final = np.empty(0, np.uint8)


@compiled
def _build(
    chosen: Any,
    session_of: Any,
    start_of: Any,
    stop_of: Any,
    first_of_user: Any,
    session_offsets: Any,
    all_rows: Any,
    all_times: Any,
    user_offsets: Any,
    all_types: Any,
    context: int,
) -> Any:
    """Return the fields of a :class:`SessionBatch` from ``session`` on."""
    pieces = len(chosen)
    session = np.empty(pieces, np.int64)
    reset = np.empty(pieces, np.bool_)
    closes = np.empty(pieces, np.bool_)
    lengths = np.empty(pieces, np.int64)
    session_gaps = np.empty(pieces, np.int64)
    skipped = np.empty(pieces, np.int64)
    steps = np.empty(pieces, np.int64)
    rows = extra = targets = members = closing = 0
    for k in range(pieces):
        piece = chosen[k]
        session[k] = session_of[piece]
        reset[k] = first_of_user[piece]
        first, end = session_offsets[session[k]], session_offsets[session[k] + 1]
        closes[k] = stop_of[piece] == end
        begin = max(start_of[piece] - context, first)
        lengths[k] = stop_of[piece] - begin
        skipped[k] = begin - first
        user = np.searchsorted(user_offsets, session[k], side="right") - 1
        steps[k] = session[k] - user_offsets[user]
        rows += lengths[k]
        targets += stop_of[piece] - start_of[piece]
        if closes[k]:
            extra += begin - first
            members += end - first
            closing += 1
        head = piece
        while start_of[head] > first:
            head -= 1
        if first_of_user[head]:
            session_gaps[k] = -1
        else:
            session_gaps[k] = all_times[first] - all_times[first - 1]

    item_rows = np.empty(rows + extra, np.int32)
    interactions = np.empty(rows, np.int64)
    timestamps = np.empty(rows, np.int64)
    gaps = np.empty(rows, np.int64)
    types = np.zeros(rows, np.int64)
    is_target = np.empty(rows, np.bool_)
    target_places = np.empty(targets, np.int64)
    inputs = np.empty(rows - pieces, np.int64)
    member_rows = np.empty(members, np.int64)
    member_owner = np.empty(members, np.int64)
    member_lengths = np.empty(closing, np.int64)
    at = target = member = close = 0
    at_extra = rows
    for k in range(pieces):
        piece = chosen[k]
        first = session_offsets[session[k]]
        start, stop = start_of[piece], stop_of[piece]
        begin = stop - lengths[k]
        if closes[k]:
            # Rows of a whole session are its own members; only a cut one must bring more.
            for i in range(first, begin):
                item_rows[at_extra] = all_rows[i]
                member_rows[member] = at_extra
                at_extra += 1
                member += 1
            for i in range(begin, stop):
                member_rows[member] = at + i - begin
                member += 1
            member_lengths[close] = stop - first
            member_owner[member - (stop - first) : member] = k
            close += 1
        for i in range(begin, stop):
            item_rows[at] = all_rows[i]
            interactions[at] = i
            timestamps[at] = all_times[i]
            gaps[at] = all_times[i] - all_times[i - 1] if i > first else 0
            if len(all_types):
                types[at] = all_types[i]
            is_target[at] = i >= start
            if i >= start:
                target_places[target] = at
                target += 1
            if i < stop - 1:
                inputs[at - k] = at
            at += 1
    return (
        session,
        reset,
        closes,
        lengths,
        item_rows,
        interactions,
        timestamps,
        gaps,
        session_gaps,
        skipped,
        steps,
        types,
        is_target,
        target_places,
        inputs,
        member_rows,
        member_owner,
        member_lengths,
    )
