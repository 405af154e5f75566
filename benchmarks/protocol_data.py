"""Real logs cut as an evaluation protocol for session-aware recommenders demands.

Sessions, cleaning and splits follow docs/evaluation-protocol.md, so that
a figure of ours and a figure of another system can stand in one row. A case is one log with one
split; each has a phase for choosing (``validation``) and one for the single final run (``test``).

Item rows: the catalogue of the fit part comes first, ``0 .. items - 1``, in order of item id; items
outside it follow, so a ranker skips them in a history and misses them as targets.
"""

import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import duckdb
import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.sessions.store import (
    ITEM_ROWS,
    SESSION_OFFSETS,
    TIMESTAMPS_US,
    USER_OFFSETS,
    SessionStore,
    StoreMeta,
)

Phase = Literal["validation", "test"]

CASES: Final = ("online_retail", "online_retail-shuffled", "globo_news-rolling", "globo_news-user")

_SECOND_US: Final = 1_000_000
_HOUR_US: Final = 3600 * _SECOND_US
_GAP_US: Final = 1800 * _SECOND_US
_ROLLING_LIMIT_US: Final = 1_507_636_800 * _SECOND_US
"""2017-10-10 12:00 UTC, the H of the rolling split."""
_FEWEST_ITEM_EVENTS, _FEWEST_SESSION_EVENTS, _FEWEST_SESSIONS = 5, 2, 3
_FEWEST_NATIVE_SESSIONS: Final = 5
_FEWEST_FIT_EVENTS: Final = 3
_SHUFFLE_SEED: Final = 20_171_010


@dataclass(frozen=True, kw_only=True)
class ProtocolCase:
    """One phase of one case.

    Attributes:
        name: of the case.
        phase: ``validation`` or ``test``.
        fit: the sessions to learn from; all their rows may exceed ``items``.
        store: the sessions to ask about with everything before them: histories at request time.
        requests: one per asked event, pointing into ``store``.
        items: the catalogue is the rows ``0 .. items - 1``.
        popularity: int64 ``[items]``, events of each item in ``fit``.
    """

    name: str
    phase: Phase
    fit: SessionStore
    store: SessionStore
    requests: Requests
    items: int
    popularity: NDArray[np.int64]


def load_case(data_root: Path, name: str, phase: Phase) -> ProtocolCase:
    """Read a log below ``data_root`` and cut it.

    Raises:
        InputError: the case or the phase is unknown, or the log is not there.
    """
    if name not in CASES:
        raise InputError(f"the case is {name!r}; expected one of {', '.join(CASES)}")
    if phase not in ("validation", "test"):
        raise InputError(f"the phase is {phase!r}; expected validation or test")
    log = Path(data_root) / name.partition("-")[0]
    if not (log / "events.parquet").exists():
        raise InputError(f"{log / 'events.parquet'} does not exist; expected the log of {name}")
    if name == "globo_news-rolling":
        return _rolling(_read_globo_news(log), phase)
    if name == "globo_news-user":
        events = _clean(_every_eighth_user(_read_globo_news(log)))
        return _per_user(name, events, phase)
    events = _clean(_read_online_retail(log))
    if name.endswith("shuffled"):
        events = _shuffled(events)
    return _per_user(name, events, phase)


@dataclass(frozen=True)
class _Events:
    """Events ordered by user, session, time: int64 ``[n]`` each; ``session`` never decreases."""

    user: NDArray[np.int64]
    session: NDArray[np.int64]
    item: NDArray[np.int64]
    time_us: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user)

    def take(self, kept: NDArray[np.bool_]) -> "_Events":
        return _Events(self.user[kept], self.session[kept], self.item[kept], self.time_us[kept])


def _read_online_retail(log: Path) -> _Events:
    columns = _query(
        f"""
        SELECT user_id, dense_rank() OVER (ORDER BY item_id) AS item, timestamp
        FROM '{log}/events.parquet' SEMI JOIN (
            SELECT item_id FROM '{log}/items.parquet' WHERE is_product
        ) USING (item_id)
        WHERE event_type = 'purchase'
        ORDER BY user_id, timestamp, line_no
        """
    )
    user, time_us = columns["user_id"], columns["timestamp"] * _SECOND_US
    starts = np.ones(len(user), np.bool_)
    starts[1:] = (np.diff(user) != 0) | (np.diff(time_us) > _GAP_US)
    return _Events(user, np.cumsum(starts), columns["item"], time_us)


def _read_globo_news(log: Path) -> _Events:
    columns = _query(
        f"""
        SELECT user_id, session_id, item_id AS item,
            timestamp * 1000000 + coalesce(ts_millis, 0)::BIGINT * 1000 AS time_us
        FROM '{log}/events.parquet'
        ORDER BY user_id, session_start, session_id, time_us
        """
    )
    user, native = columns["user_id"], columns["session_id"]
    starts = np.ones(len(user), np.bool_)
    starts[1:] = (np.diff(user) != 0) | (np.diff(native) != 0)
    return _Events(user, np.cumsum(starts), columns["item"], columns["time_us"])


def _query(query: str) -> dict[str, NDArray[np.int64]]:
    found: dict[str, NDArray[Any]] = duckdb.sql(query).fetchnumpy()
    return {name: np.asarray(column).astype(np.int64) for name, column in found.items()}


def _every_eighth_user(events: _Events) -> _Events:
    users = np.unique(events.user)
    chosen = users[[binascii.crc32(str(user).encode()) % 8 == 0 for user in users.tolist()]]
    enough = _sessions_of_user(events) >= _FEWEST_NATIVE_SESSIONS
    return events.take(enough & np.isin(events.user, chosen))


def _clean(events: _Events) -> _Events:
    """Apply the protocol's filters until nothing changes."""
    while True:
        before = len(events)
        events = events.take(~_repeats(events))
        events = events.take(_count_of(events.item) >= _FEWEST_ITEM_EVENTS)
        events = events.take(_count_of(events.session) >= _FEWEST_SESSION_EVENTS)
        events = events.take(_sessions_of_user(events) >= _FEWEST_SESSIONS)
        if len(events) == before:
            return events


def _repeats(events: _Events) -> NDArray[np.bool_]:
    repeated = np.zeros(len(events), np.bool_)
    repeated[1:] = (np.diff(events.item) == 0) & (np.diff(events.session) == 0)
    return repeated


def _count_of(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each entry's value occurs, int64 ``[n]``."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[index]


def _sessions_of_user(events: _Events) -> NDArray[np.int64]:
    """Return how many sessions each event's user has, int64 ``[n]``."""
    first = np.ones(len(events), np.bool_)
    first[1:] = np.diff(events.session) != 0
    users, sessions = np.unique(events.user[first], return_counts=True)
    return sessions[np.searchsorted(users, events.user)]


def _shuffled(events: _Events) -> _Events:
    """Put every session's items in random order; the times stay where they are."""
    random = np.random.default_rng(_SHUFFLE_SEED).random(len(events))
    order = np.lexsort((random, events.session))
    return _Events(events.user, events.session, events.item[order], events.time_us)


def _per_user(name: str, events: _Events, phase: Phase) -> ProtocolCase:
    """Hold out each user's last session, or for validation the one before."""
    last_session = _last_session_of_user(events)
    if phase == "validation":
        events = events.take(~last_session)
        last_session = _last_session_of_user(events)
    return _case(name, phase, events, asked=last_session, fewest_fit_events=1)


def _rolling(events: _Events, phase: Phase) -> ProtocolCase:
    """Learn from two days, predict the four hours that follow."""
    first = np.ones(len(events), np.bool_)
    first[1:] = np.diff(events.session) != 0
    session_start = events.time_us[first][np.cumsum(first) - 1]
    end_us = _ROLLING_LIMIT_US + (4 * _HOUR_US if phase == "test" else 0)
    events = events.take(
        (session_start >= _ROLLING_LIMIT_US - 48 * _HOUR_US) & (events.time_us < end_us)
    )
    events = events.take(~_repeats(events))
    events = events.take(_count_of(events.session) >= _FEWEST_SESSION_EVENTS)
    asked = events.time_us >= end_us - 4 * _HOUR_US
    return _case("globo_news-rolling", phase, events, asked, fewest_fit_events=_FEWEST_FIT_EVENTS)


def _last_session_of_user(events: _Events) -> NDArray[np.bool_]:
    last = np.ones(len(events), np.bool_)
    last[:-1] = np.diff(events.user) != 0
    return np.isin(events.session, events.session[last])


def _case(
    name: str,
    phase: Phase,
    events: _Events,
    asked: NDArray[np.bool_],
    fewest_fit_events: int,
) -> ProtocolCase:
    fit_items, counts = np.unique(events.item[~asked], return_counts=True)
    catalogue = fit_items[counts >= fewest_fit_events]
    others = np.setdiff1d(events.item, catalogue)
    order = np.argsort(np.concatenate([catalogue, others]), kind="stable")
    found = np.searchsorted(np.sort(np.concatenate([catalogue, others])), events.item)
    rows: NDArray[np.int32] = order[found].astype(np.int32)
    items = len(catalogue) + len(others)

    store = _store(events, rows, items)
    interaction = np.flatnonzero(asked)
    session = np.searchsorted(store.session_offsets, interaction, side="right") - 1
    requests = Requests(
        user=store.user_of_session(session),
        session=session,
        interaction=interaction,
        position=interaction - store.session_offsets[session],
        target_row=rows[interaction],
    )
    return ProtocolCase(
        name=name,
        phase=phase,
        fit=_store(events.take(~asked), rows[~asked], items),
        store=store,
        requests=requests,
        items=len(catalogue),
        popularity=counts[counts >= fewest_fit_events].astype(np.int64),
    )


def _store(events: _Events, rows: NDArray[np.int32], items: int) -> SessionStore:
    first = np.ones(len(events), np.bool_)
    first[1:] = np.diff(events.session) != 0
    session_offsets = np.append(np.flatnonzero(first), len(events))
    users = events.user[first]
    first_of_user = np.ones(len(users), np.bool_)
    first_of_user[1:] = np.diff(users) != 0
    user_offsets = np.append(np.flatnonzero(first_of_user), len(users))
    meta = StoreMeta(
        users=len(user_offsets) - 1,
        sessions=len(users),
        interactions=len(events),
        items=items,
        impressions=None,
        gap_us=_GAP_US,
        watermark_us=int(events.time_us.max()),
    )
    return SessionStore(
        Path("in-memory"),
        meta,
        {
            ITEM_ROWS: rows,
            TIMESTAMPS_US: events.time_us,
            SESSION_OFFSETS: session_offsets,
            USER_OFFSETS: user_offsets,
        },
    )
