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

A batch holds item rows and no embeddings. Planning costs some 100 bytes a session and one heap
operation a user per epoch. Does not shard over workers or ranks.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.sessions.store import SessionStore, ranges


@dataclass(frozen=True)
class SessionBatch:
    """One step of the generator: ``pieces`` of sessions (whole ones, but for long sessions).

    Pieces are ordered by slot, then lane: slot ``k`` (the ``k``-th piece of each lane in this step)
    is ``slot_offsets[k]:slot_offsets[k + 1]``. Rows are packed in that order.

    Shapes:
        lane: ``[pieces]`` int64, distinct within a slot.
        session: ``[pieces]`` int64, the session's number in the store.
        reset: ``[pieces]`` bool, the lane starts a new user with this piece.
        closes: ``[pieces]`` bool, the session ends with this piece.
        lengths: ``[pieces]`` int64, rows per piece, all >= 1, summing to ``n``.
        slot_offsets: ``[slots + 1]`` int64.
        item_rows: ``[n + extra]`` int32; the ``extra`` rows at the end are earlier items of cut
            sessions that only ``member_rows`` points to.
        interactions: ``[n]`` int64, each row's place in the store's columns.
        timestamps_us: ``[n]`` int64, microseconds since the epoch.
        is_target: ``[n]`` bool, false for context.
        member_rows: ``[members]`` int64, indices into ``item_rows`` of all items of the sessions
            that close, one closing piece after another.
        member_lengths: ``[closing pieces]`` int64.
    """

    lane: NDArray[np.int64]
    session: NDArray[np.int64]
    reset: NDArray[np.bool_]
    closes: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    slot_offsets: NDArray[np.int64]
    item_rows: NDArray[np.int32]
    interactions: NDArray[np.int64]
    timestamps_us: NDArray[np.int64]
    is_target: NDArray[np.bool_]
    member_rows: NDArray[np.int64]
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

    Raises:
        InputError: a size is not positive, or no session is left.
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
    ) -> None:
        for name, value, least in (
            ("lanes", lanes, 1),
            ("sessions_per_step", sessions_per_step, 1),
            ("max_length", max_length, 1),
            ("context", context, 0),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; expected a whole number >= {least}")
        self.store = store
        self.lanes, self.sessions_per_step = lanes, sessions_per_step
        self.max_length, self.context, self.seed = max_length, context, seed
        self._pieces = _cut_pieces(store, max_length, end_us)
        if self._pieces.total == 0:
            raise InputError(
                f"no session starts before {end_us} us since 1970; expected at least one to train "
                "on: use a longer log or a later validation start"
            )

    @property
    def interactions(self) -> int:
        """Interactions predicted per epoch: each kept one exactly once."""
        return int((self._pieces.stop - self._pieces.start).sum())

    def steps(self, epoch: int) -> int:
        """Return how many batches the epoch has."""
        return len(self._plan(epoch).step_offsets) - 1

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[SessionBatch]:
        """Yield the epoch's batches from ``first_step`` on, as an uninterrupted run would."""
        plan = self._plan(epoch)
        for step in range(first_step, len(plan.step_offsets) - 1):
            chosen = slice(plan.step_offsets[step], plan.step_offsets[step + 1])
            yield self._batch(plan.piece[chosen], plan.lane[chosen], plan.slot[chosen])

    def _plan(self, epoch: int) -> "_Plan":
        pieces = self._pieces
        order = np.random.default_rng((self.seed, epoch)).permutation(len(pieces.user_offsets) - 1)
        counts = np.diff(pieces.user_offsets)[order]
        lane_of_user = _fewest_sessions_first(counts, self.lanes)

        by_lane = np.argsort(lane_of_user, kind="stable")
        counts = counts[by_lane]
        piece = ranges(pieces.user_offsets[order[by_lane]], counts)
        lane = np.repeat(lane_of_user[by_lane], counts)
        lane_starts = np.searchsorted(lane, np.arange(self.lanes))
        place = np.arange(len(lane)) - lane_starts[lane]
        step, slot = np.divmod(place, self.sessions_per_step)

        by_step = np.lexsort((lane, slot, step))
        bounds = np.searchsorted(step[by_step], np.arange(int(step.max()) + 2))
        return _Plan(piece[by_step], lane[by_step], slot[by_step], bounds)

    def _batch(
        self, piece: NDArray[np.int64], lane: NDArray[np.int64], slot: NDArray[np.int64]
    ) -> SessionBatch:
        pieces, store = self._pieces, self.store
        start, stop = pieces.start[piece], pieces.stop[piece]
        session = pieces.session[piece]
        session_start = np.asarray(store.session_offsets[session])
        closes = stop == store.session_offsets[session + 1]
        input_start = np.maximum(start - self.context, session_start)
        lengths = stop - input_start
        interactions = ranges(input_start, lengths)
        is_target = interactions >= np.repeat(start, lengths)

        # Rows of a whole session are its own members; only a cut one must bring more.
        row_offsets = np.cumsum(lengths) - lengths
        extra_counts = np.where(closes, input_start - session_start, 0)
        extra = ranges(session_start, extra_counts)
        extra_offsets = len(interactions) + np.cumsum(extra_counts) - extra_counts
        member_starts = np.stack([extra_offsets, row_offsets], axis=1)[closes].ravel()
        member_counts = np.stack([extra_counts, lengths], axis=1)[closes]
        return SessionBatch(
            lane=lane,
            session=session,
            reset=pieces.first_of_user[piece],
            closes=closes,
            lengths=lengths,
            slot_offsets=np.searchsorted(slot, np.arange(int(slot[-1]) + 2)),
            item_rows=np.concatenate([store.item_rows[interactions], store.item_rows[extra]]),
            interactions=interactions,
            timestamps_us=store.timestamps_us[interactions],
            is_target=is_target,
            member_rows=ranges(member_starts, member_counts.ravel()),
            member_lengths=member_counts.sum(axis=1),
        )


@dataclass(frozen=True)
class _Pieces:
    """Interactions ``start[i]:stop[i]`` of session ``session[i]``; a user's pieces are adjacent."""

    session: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    first_of_user: NDArray[np.bool_]
    user_offsets: NDArray[np.int64]

    @property
    def total(self) -> int:
        return len(self.session)


@dataclass(frozen=True)
class _Plan:
    piece: NDArray[np.int64]
    lane: NDArray[np.int64]
    slot: NDArray[np.int64]
    step_offsets: NDArray[np.int64]


def _cut_pieces(store: SessionStore, max_length: int, end_us: int | None) -> _Pieces:
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
    return _Pieces(session, start, stop, first_of_user, piece_offsets)


def _fewest_sessions_first(counts: NDArray[np.int64], lanes: int) -> NDArray[np.int64]:
    """Assign users, in order, to the lane with the fewest sessions (the lowest one of equals)."""
    heap = [(0, lane) for lane in range(lanes)]
    chosen = np.empty(len(counts), np.int64)
    for user, count in enumerate(counts.tolist()):
        held, lane = heap[0]
        chosen[user] = lane
        heapq.heapreplace(heap, (held + count, lane))
    return chosen
