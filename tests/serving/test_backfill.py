"""Backfill equals a plain loop over each user's sessions in torch."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.items.index import IdIndex
from hiertcn.items.table import ItemTable
from hiertcn.serving.records import backfill
from hiertcn.serving.records.backfill import backfill_states
from hiertcn.serving.records.snapshot import NEVER_US, StateSnapshot
from hiertcn.sessions.store import SessionStore, StoreMeta

GAP_US, ITEMS = 100, 20
Users = list[list[list[tuple[int, int]]]]
"""users -> sessions -> (item row, time)"""


@dataclass(frozen=True)
class Reference:
    """The slow, obvious result for one user."""

    state: np.ndarray
    folded_until_us: int
    opened: list[tuple[int, int]]


def _store(directory: Path, users: Users) -> SessionStore:
    sessions = [session for user in users for session in user]
    interactions = [one for session in sessions for one in session]
    columns = {
        "item_rows": np.array([row for row, _ in interactions], np.int32),
        "timestamps_us": np.array([time for _, time in interactions], np.int64),
        "session_offsets": np.cumsum([0, *map(len, sessions)], dtype=np.int64),
        "user_offsets": np.cumsum([0, *map(len, users)], dtype=np.int64),
    }
    meta = StoreMeta(
        users=len(users),
        sessions=len(sessions),
        interactions=len(interactions),
        items=ITEMS,
        impressions=None,
        gap_us=GAP_US,
        watermark_us=max(time for _, time in interactions),
    )
    directory.mkdir()
    for name, values in columns.items():
        np.save(directory / f"{name}.npy", values)
    (directory / "header.json").write_text(json.dumps(meta.to_dict()))
    IdIndex.build([f"user-{number}" for number in range(len(users))], directory / "users")
    return SessionStore.open(directory)


def _reference(user: list[list[tuple[int, int]]], model, table: ItemTable, watermark_us: int):
    state, folded = model.start_state.detach().unsqueeze(0), NEVER_US
    for session in user:
        if session is user[-1] and session[-1][1] > watermark_us - GAP_US:
            return Reference(state[0].numpy(), folded, session)
        vectors = torch.from_numpy(table.gather(np.array([row for row, _ in session])))
        with torch.no_grad():
            state = model.gru_step(state, vectors.mean(0, keepdim=True))
        folded = session[-1][1]
    return Reference(state[0].numpy(), folded, [])


def _table(directory: Path) -> ItemTable:
    vectors = np.random.default_rng(3).normal(size=(ITEMS, 6)).astype(np.float32)
    return ItemTable.write(directory, vectors, "float32")


@st.composite
def _logs(draw: st.DrawFn) -> Users:
    users = []
    for count in draw(st.lists(st.integers(1, 6), min_size=1, max_size=12)):
        time, sessions = draw(st.integers(0, 500)), []
        for length in draw(st.lists(st.integers(1, 4), min_size=count, max_size=count)):
            session = []
            for _ in range(length):
                session.append((draw(st.integers(0, ITEMS - 1)), time))
                time += draw(st.integers(0, GAP_US))
            sessions.append(session)
            time = session[-1][1] + GAP_US + 1 + draw(st.integers(0, 50))
        users.append(sessions)
    return users


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(users=_logs(), batch=st.integers(1, 5), gather=st.integers(1, 6), history=st.integers(1, 8))
def test_backfill_equals_a_plain_loop(
    exported_model, tmp_path_factory, monkeypatch, users: Users, batch: int, gather: int, history
) -> None:
    # So that blocks and gathers end inside users and sessions, and histories are cut.
    monkeypatch.setattr(backfill, "_GATHER_ROWS", gather)
    monkeypatch.setattr(backfill, "_HISTORY_USERS", batch)
    monkeypatch.setattr(backfill, "HISTORY", history)
    folder = tmp_path_factory.mktemp("backfill")
    store, table = _store(folder / "sessions", users), _table(folder / "table")
    exported = exported_model(0)
    start = np.load(exported.directory / "start_state.npy", allow_pickle=False)
    summary = backfill_states(
        store, table, exported.files["gru_step"], start, folder / "out", batch=batch
    )
    snapshot = StateSnapshot.open(folder / "out")
    assert (snapshot.watermark_us, snapshot.gap_us) == (store.meta.watermark_us, GAP_US)
    opened = 0
    for number, user in enumerate(users):
        expected = _reference(user, exported.model, table, store.meta.watermark_us)
        found = snapshot.lookup(f"user-{number}")
        assert found is not None
        np.testing.assert_allclose(found.state, expected.state, rtol=1e-4, atol=1e-5)
        assert found.folded_until_us == expected.folded_until_us
        everything = [one for session in user for one in session]
        kept = everything[-max(history, len(expected.opened)) :]
        assert found.history_item_rows.tolist() == [row for row, _ in kept]
        assert found.history_timestamps_us.tolist() == [time for _, time in kept]
        carried = found.history_timestamps_us > found.folded_until_us
        assert found.history_timestamps_us[carried].tolist() == [t for _, t in expected.opened]
        opened += bool(expected.opened)
    assert (summary.users, summary.open_sessions) == (len(users), opened)
    assert summary.closed_sessions == store.meta.sessions - opened


def test_the_last_session_is_closed_exactly_at_the_gap(exported_model, tmp_path: Path) -> None:
    """Closed if the last interaction is at or before watermark - gap, open one later."""
    users: Users = [[[(1, 900)]], [[(2, 901)]], [[(3, 1000)]]]
    store, table = _store(tmp_path / "sessions", users), _table(tmp_path / "table")
    exported = exported_model(0)
    start = np.load(exported.directory / "start_state.npy", allow_pickle=False)
    summary = backfill_states(
        store, table, exported.files["gru_step"], start, tmp_path / "out", dtype="float16"
    )
    assert (summary.closed_sessions, summary.open_sessions) == (1, 2)


def test_parts_of_different_runs_are_refused(exported_model, tmp_path: Path) -> None:
    exported = exported_model(0)
    store = _store(tmp_path / "sessions", [[[(1, 900)]]])
    start = np.load(exported.directory / "start_state.npy", allow_pickle=False)
    gru_step = exported.files["gru_step"]
    small = ItemTable.write(tmp_path / "small", np.ones((3, 6), np.float32))
    with pytest.raises(InputError, match="20 items but the item table holds 3"):
        backfill_states(store, small, gru_step, start, tmp_path / "out")
    wide = ItemTable.write(tmp_path / "wide", np.ones((ITEMS, 7), np.float32))
    with pytest.raises(InputError, match=r"session_mean with dims \[6\].*\[7\]"):
        backfill_states(store, wide, gru_step, start, tmp_path / "out")
    with pytest.raises(InputError, match="state with dims"):
        backfill_states(store, _table(tmp_path / "t"), gru_step, start[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
