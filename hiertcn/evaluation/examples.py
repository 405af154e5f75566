"""A few users with what they did and what each ranker would recommend: the paper's Figure 5.

The users are drawn by a seed among those asked about who had at least two sessions before; of each
the last request is shown. Items are texts (an id, with a title where there is one), so an example
can be read without the session store.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiertcn.evaluation.protocol import Requests, SessionColumns
from hiertcn.evaluation.ranking import Ranking

Labels = Callable[[NDArray[np.int64]], Sequence[str]]
"""Returns a text for each index, int64 [n]."""

FEWEST_SESSIONS = 3
"""Sessions that a user of an example has at least, the running one included."""


def _row_texts(rows: NDArray[np.int64]) -> Sequence[str]:
    return [f"#{row}" for row in rows.tolist()]


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """How many examples to show, and what their users and items are called.

    Attributes:
        users: how many users; 0 for none.
        top: recommendations of each ranker.
        sessions: the last sessions shown, the running one included.
        interactions: the last interactions shown of each session.
        item_labels: texts of item rows.
        user_labels: texts of user indices.
    """

    users: int = 0
    top: int = 10
    sessions: int = 5
    interactions: int = 12
    item_labels: Labels = field(default=_row_texts)
    user_labels: Labels = field(default=_row_texts)


@dataclass(frozen=True, kw_only=True)
class Recommendations:
    """What one ranker would recommend.

    Attributes:
        ranker: its name.
        items: its best candidates, best first.
        target_place: place of the target among ``items``, from 0; None if it is not there.
        target_rank: rank of the target, with ties against the ranker.
    """

    ranker: str
    items: tuple[str, ...]
    target_place: int | None
    target_rank: int


@dataclass(frozen=True, kw_only=True)
class PastSession:
    """A session before the request.

    Attributes:
        start_us: microseconds since the epoch, UTC.
        left_out: earlier interactions of the session that are not shown.
        items: the last items, in order.
        running: whether the target belongs to this session.
    """

    start_us: int
    left_out: int
    items: tuple[str, ...]
    running: bool


@dataclass(frozen=True, kw_only=True)
class Example:
    """One user at one moment.

    Attributes:
        user: who.
        time_us: when the target was interacted with, microseconds since the epoch, UTC.
        target: the item that the user went on to.
        earlier_sessions: sessions before those shown.
        sessions: the last sessions, oldest first; the running one may have no item yet.
        recommendations: of each ranker.
    """

    user: str
    time_us: int
    target: str
    earlier_sessions: int
    sessions: tuple[PastSession, ...]
    recommendations: tuple[Recommendations, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Example":
        """Read what `to_dict` wrote."""
        return cls(
            **{name: values[name] for name in ("user", "time_us", "target", "earlier_sessions")},
            sessions=tuple(
                PastSession(**{**session, "items": tuple(session["items"])})
                for session in values["sessions"]
            ),
            recommendations=tuple(
                Recommendations(**{**found, "items": tuple(found["items"])})
                for found in values["recommendations"]
            ),
        )


def choose_examples(
    store: SessionColumns, requests: Requests, users: int, seed: int = 0
) -> NDArray[np.int64]:
    """Return the last request of some users with at least `FEWEST_SESSIONS` sessions.

    Returns:
        int64 [at most ``users``], indices of requests, ascending.
    """
    first = np.asarray(store.user_offsets)[requests.user]
    eligible = np.flatnonzero(requests.session - first >= FEWEST_SESSIONS - 1)
    owners = requests.user[eligible]
    # Requests are in the order of the store: a user's last one stands before the next user's.
    last = eligible[np.append(owners[1:] != owners[:-1], True)] if len(owners) else eligible
    drawn = np.random.default_rng(seed).permutation(len(last))[:users]
    return np.sort(last[drawn])


def make_examples(
    names: Sequence[str],
    ranking: Ranking,
    store: SessionColumns,
    requests: Requests,
    options: ExampleOptions,
    seed: int = 0,
) -> tuple[Example, ...]:
    """Return the examples, see the module.

    Args:
        names: of the rankers.
        ranking: of the requests, already ranked.
        store: what the requests point into.
        requests: the requests that were ranked.
        options: how many, and names.
        seed: draws the users.
    """
    chosen = choose_examples(store, requests, options.users, seed)
    if len(chosen) == 0:
        return ()
    best = ranking.top(chosen, options.top)
    picked = requests.take(chosen)
    users = options.user_labels(picked.user)
    past = [_past_rows(store, picked, at, options) for at in range(len(picked))]
    text = _texts_of(
        options, [best.ravel(), picked.target_row, *(rows for of in past for _, rows in of)]
    )
    examples = []
    for at, request in enumerate(chosen.tolist()):
        target = int(picked.target_row[at])
        running = int(picked.session[at])
        sessions = tuple(
            PastSession(
                start_us=int(store.timestamps_us[store.session_offsets[session]]),
                left_out=max(0, len(rows) - options.interactions),
                items=tuple(text[row] for row in rows[-options.interactions :].tolist()),
                running=session == running,
            )
            for session, rows in past[at]
        )
        recommendations = []
        for index, name in enumerate(names):
            rows = best[index, at][best[index, at] >= 0].tolist()
            recommendations.append(
                Recommendations(
                    ranker=name,
                    items=tuple(text[row] for row in rows),
                    target_place=rows.index(target) if target in rows else None,
                    target_rank=int(ranking.ranks[index, request]),
                )
            )
        examples.append(
            Example(
                user=users[at],
                time_us=int(store.timestamps_us[picked.interaction[at]]),
                target=text[target],
                earlier_sessions=past[at][0][0] - int(store.user_offsets[picked.user[at]]),
                sessions=sessions,
                recommendations=tuple(recommendations),
            )
        )
    return tuple(examples)


def _past_rows(
    store: SessionColumns, requests: Requests, at: int, options: ExampleOptions
) -> list[tuple[int, NDArray[np.int64]]]:
    """Return the last sessions of a request's user, and the item rows that came before it."""
    running = int(requests.session[at])
    first = max(int(store.user_offsets[requests.user[at]]), running - options.sessions + 1)
    past = []
    for session in range(first, running + 1):
        start = int(store.session_offsets[session])
        stop = min(int(store.session_offsets[session + 1]), int(requests.interaction[at]))
        past.append((session, store.item_rows[start:stop].astype(np.int64)))
    return past


def _texts_of(options: ExampleOptions, rows: Sequence[NDArray[Any]]) -> dict[int, str]:
    """Ask once for the texts of all item rows: it may be a scan of the items file."""
    wanted = np.unique(np.concatenate(rows).astype(np.int64))
    wanted = wanted[wanted >= 0]
    return dict(zip(wanted.tolist(), options.item_labels(wanted), strict=True))
