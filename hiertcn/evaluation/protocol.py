"""What is asked of a ranker: one request per interaction of the evaluated sessions.

The paper's task (section 4.2.2): predict the next interaction from everything the user did before
it, ranked against a pool of candidates. A request is an index into the session store, so a request
costs 36 bytes however long the user's history is.

Does not copy histories or impressions, does not choose the time range (sessions/split.py does), and
does not score: rankers (models/baselines.py, models/network_ranker.py) and evaluate.py do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError

MAX_REQUESTS_PER_CALL: Final = 512
"""The most requests that `Ranker.score` is ever given at once."""

_SESSIONS_PER_PASS = 1 << 20


class SessionColumns(Protocol):
    """The columns of a session store (hiertcn/sessions/store.py) that evaluation reads."""

    @property
    def item_rows(self) -> NDArray[np.int32]:
        """Item row of every interaction, by user, then time: int32 [interactions]."""

    @property
    def timestamps_us(self) -> NDArray[np.int64]:
        """Time of every interaction in microseconds since the epoch, UTC: int64 [interactions]."""

    @property
    def session_offsets(self) -> NDArray[np.int64]:
        """First interaction of every session, then the count: int64 [sessions + 1]."""

    @property
    def user_offsets(self) -> NDArray[np.int64]:
        """First session of every user, then the count: int64 [users + 1]."""

    @property
    def impression_rows(self) -> NDArray[np.int32] | None:
        """Item rows shown at every interaction, concatenated, or None if the log has none."""

    @property
    def impression_offsets(self) -> NDArray[np.int64] | None:
        """First impression of every interaction, then the count: int64 [interactions + 1]."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Interactions to predict, one per row, in the order of the store (by user, then time).

    The input of row ``r`` is every interaction of its user before ``interaction[r]``: none for the
    first interaction that a user ever made.

    Attributes:
        user: int64 [n], index into the store's users.
        session: int64 [n], index into the store's sessions.
        interaction: int64 [n], index into ``store.item_rows`` of the interaction to predict.
        position: int64 [n], place of that interaction in its session, from 0.
        target_row: int32 [n], its item row.
    """

    user: NDArray[np.int64]
    session: NDArray[np.int64]
    interaction: NDArray[np.int64]
    position: NDArray[np.int64]
    target_row: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.interaction)

    def take(self, selection: slice | NDArray[np.int64] | NDArray[np.bool_]) -> "Requests":
        """Return the selected requests: a slice, indices, or a mask [n]."""
        return Requests(
            user=self.user[selection],
            session=self.session[selection],
            interaction=self.interaction[selection],
            position=self.position[selection],
            target_row=self.target_row[selection],
        )

    def slices(self, size: int = MAX_REQUESTS_PER_CALL) -> Iterator["Requests"]:
        """Yield consecutive requests, ``size`` at a time; the last slice may be shorter."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def session_start(self) -> NDArray[np.int64]:
        """Return the first interaction of each request's session: int64 [n]."""
        return self.interaction - self.position

    def history_start(self, store: SessionColumns) -> NDArray[np.int64]:
        """Return the first interaction of each request's user: int64 [n].

        The input of request ``r`` is ``store.item_rows[history_start[r] : interaction[r]]``, of
        which the part from ``session_start()[r]`` on is the running session.
        """
        first_session: NDArray[np.int64] = np.asarray(store.user_offsets)[self.user]
        return np.asarray(store.session_offsets)[first_session]


class Ranker(Protocol):
    """Scores items as the next interaction; a larger score is a better rank.

    Implementations see only what came before each request's interaction. They skip history rows
    that they do not know (``row >= items``): an older release ranks the newest day with its own,
    shorter item table.
    """

    @property
    def name(self) -> str:
        """Name of the ranker in every table and in the gate."""

    @property
    def items(self) -> int:
        """Number of item rows that the ranker knows: rows ``0 .. items - 1``."""

    def score(
        self, requests: Requests, candidates: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        """Score candidates for each request.

        Args:
            requests: at most `MAX_REQUESTS_PER_CALL` requests [batch].
            candidates: int32 [batch, count], item rows below ``items``, each row of the array
                padded with -1 (pads may stand anywhere and their scores are ignored); or None for
                all items that the ranker knows.

        Returns:
            float32 [batch, count], or [batch, items] without candidates. -inf and NaN rank last.
        """


def build_requests(
    store: SessionColumns,
    start_us: int | None = None,
    end_us: int | None = None,
    max_requests: int | None = None,
    seed: int = 0,
    users: NDArray[np.int64] | None = None,
) -> Requests:
    """Return one request per interaction of the sessions that start in ``[start_us, end_us)``.

    The paper's warm start (section 4.2.1) gives a time, its cold start the users of a part of
    `sessions.split.UserSplit`.

    A session belongs wholly to the part in which its first interaction falls, as in
    sessions/split.py; what its user did earlier is input, whichever part it belongs to.

    Args:
        store: the session store.
        start_us: microseconds since the epoch, UTC, inclusive; None for no start.
        end_us: microseconds since the epoch, UTC, exclusive; None for no end.
        max_requests: keep a uniform random sample of this many requests; None keeps all.
        seed: seed of that sample.
        users: int64 [k], ask only about these users, in any order; None asks about all.

    Returns:
        The requests in store order; empty if no session starts in the range.

    Raises:
        InputError: the range ends before it starts, ``max_requests`` is not positive, or a user is
            not in the store.
    """
    if start_us is not None and end_us is not None and end_us <= start_us:
        raise InputError(
            f"the evaluated range ends at {end_us} us, which is not after its start {start_us} us; "
            "give an end after the start"
        )
    if max_requests is not None and max_requests < 1:
        raise InputError(
            f"max_requests is {max_requests}; expected a number of at least 1, or none"
        )

    sessions = _sessions_starting_in(store, start_us, end_us)
    if users is not None:
        sessions = sessions[_belongs_to(store, sessions, users)]
    starts = np.asarray(store.session_offsets)[sessions]
    lengths = np.asarray(store.session_offsets)[sessions + 1] - starts
    ends = np.cumsum(lengths)
    count = int(ends[-1]) if len(ends) else 0

    chosen = np.arange(count, dtype=np.int64)
    if max_requests is not None and count > max_requests:
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(count, size=max_requests, replace=False)).astype(np.int64)

    index = np.searchsorted(ends, chosen, side="right")
    position = chosen - (ends - lengths)[index]
    interaction = starts[index] + position
    session = sessions[index]
    # side="right": a user without sessions shares its offset with the next user, who owns them.
    user = np.searchsorted(np.asarray(store.user_offsets), session, side="right") - 1
    return Requests(
        user=user.astype(np.int64),
        session=session,
        interaction=interaction,
        position=position,
        target_row=np.asarray(store.item_rows[interaction], dtype=np.int32),
    )


def _belongs_to(
    store: SessionColumns, sessions: NDArray[np.int64], users: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which sessions are of one of the users, bool like ``sessions``."""
    count = len(store.user_offsets) - 1
    outside = users[(users < 0) | (users >= count)]
    if len(outside):
        raise InputError(f"user {outside[0]} is not in the store; expected 0 to {count - 1}")
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[users] = True
    owner = np.searchsorted(np.asarray(store.user_offsets), sessions, side="right") - 1
    return np.asarray(chosen[owner])


def _sessions_starting_in(
    store: SessionColumns, start_us: int | None, end_us: int | None
) -> NDArray[np.int64]:
    """Return the indices of non-empty sessions whose first interaction is in the range."""
    sessions = len(store.session_offsets) - 1
    found = [np.empty(0, dtype=np.int64)]
    for begin in range(0, sessions, _SESSIONS_PER_PASS):
        stop = min(begin + _SESSIONS_PER_PASS, sessions)
        offsets = np.asarray(store.session_offsets[begin : stop + 1])
        filled = np.flatnonzero(offsets[1:] > offsets[:-1])
        times = np.asarray(store.timestamps_us[offsets[filled]])
        inside = np.ones(len(times), dtype=np.bool_)
        if start_us is not None:
            inside &= times >= start_us
        if end_us is not None:
            inside &= times < end_us
        found.append(filled[inside].astype(np.int64) + begin)
    return np.concatenate(found)
