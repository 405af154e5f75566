"""Session stores made from nested lists, and rankers made from arrays."""

from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from hiertcn.sessions.store import SessionStore, StoreMeta

# One interaction: (item row, time in microseconds, rows shown).
Interaction = tuple[int, int, list[int]]


def store_of(
    users: list[list[list[Interaction]]],
    *,
    items: int = 100,
    impressions: bool = True,
    directory: Path = Path("in-memory"),
) -> SessionStore:
    sessions = [session for user in users for session in user]
    interactions = [interaction for session in sessions for interaction in session]
    shown = [row for _, _, rows in interactions for row in rows]
    columns = {
        "item_rows": np.array([item for item, _, _ in interactions], dtype=np.int32),
        "timestamps_us": np.array([at for _, at, _ in interactions], dtype=np.int64),
        "session_offsets": _offsets([len(session) for session in sessions]),
        "user_offsets": _offsets([len(user) for user in users]),
    }
    if impressions:
        columns["impression_rows"] = np.array(shown, dtype=np.int32)
        columns["impression_offsets"] = _offsets([len(rows) for _, _, rows in interactions])
    meta = StoreMeta(
        users=len(users),
        sessions=len(sessions),
        interactions=len(interactions),
        items=items,
        impressions=len(shown) if impressions else None,
        gap_us=1_800_000_000,
        watermark_us=max((at for _, at, _ in interactions), default=0),
    )
    return SessionStore(directory, meta, columns)


@st.composite
def nested_users(draw: st.DrawFn, *, items: int = 8) -> list[list[list[Interaction]]]:
    """Up to five users with up to four sessions, in time order, on few items."""
    item = st.integers(0, items - 1)
    users = []
    for _ in range(draw(st.integers(1, 5))):
        now, user = 0, []
        for _ in range(draw(st.integers(1, 4))):
            session = []
            for _ in range(draw(st.integers(1, 4))):
                now += draw(st.integers(0, 10))
                session.append((draw(item), now, draw(st.lists(item, max_size=6))))
            user.append(session)
        users.append(user)
    return users


class ArrayRanker:
    """Scores item ``i`` of request ``r`` with ``table[r.interaction, i]``, whatever came before."""

    def __init__(self, name: str, table: np.ndarray) -> None:
        self.name = name
        self.items = table.shape[1]
        self.table = table.astype(np.float32)
        self.largest_call = 0

    def score(self, requests, candidates):
        self.largest_call = max(self.largest_call, len(requests))
        rows = self.table[requests.interaction]
        if candidates is None:
            return rows
        assert candidates.dtype == np.int32
        assert candidates.max() < self.items, "asked for a row that the ranker does not know"
        # A pad gets the best score of all: it must be ignored.
        return np.where(
            candidates >= 0, np.take_along_axis(rows, np.maximum(candidates, 0), 1), np.inf
        )


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
