"""int8 serves only where it ranks as float32 does, and depends on no other session of a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.export import int8
from hiertcn.export.int8 import quantize_tcn, top_agreement
from hiertcn.export.open_sessions import OpenSessions, draw_open_sessions
from hiertcn.export.session import open_session
from hiertcn.export.tensors import SESSION_ITEMS, SESSION_LENGTH, USER_STATE
from hiertcn.items.table import ItemTable
from models.hiertcn_serving import GruStep
from tests.session_logs import random_users, write_store, write_table

ITEMS, DIM = 400, 6


def sessions(count: int = 80, dim: int = DIM, hidden: int = 8, seed: int = 0) -> OpenSessions:
    rng = np.random.default_rng(seed)
    return OpenSessions(
        session_items=rng.normal(size=(count, 5, dim)).astype(np.float32),
        session_length=rng.integers(0, 6, (count, 1)).astype(np.int32),
        user_state=rng.normal(size=(count, hidden)).astype(np.float32),
    )


def copy_of(exported: Any, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(exported.files["tcn"].read_bytes())
    return path


def run(path: Path, given: OpenSessions, part: slice) -> np.ndarray:
    feed = {
        SESSION_ITEMS.name: given.session_items[part],
        SESSION_LENGTH.name: given.session_length[part],
        USER_STATE.name: given.user_state[part],
    }
    found: np.ndarray = open_session(path).run(None, feed)[0]
    return found


def test_a_model_that_agrees_is_served_and_no_session_depends_on_its_batch(
    exported_model: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = copy_of(exported_model(0), tmp_path), sessions()
    before = run(path, asked, slice(None))
    table = write_table(tmp_path / "table", ITEMS, DIM)
    monkeypatch.setattr(int8, "AGREEMENT", 0.5)
    proof = quantize_tcn(path, asked, table)
    assert proof.is_served and 0.5 <= proof.agreement <= 1 and proof.sessions == 40
    assert path.stat().st_size == proof.int8_bytes
    after = run(path, asked, slice(None))
    assert not np.array_equal(after, before)
    assert proof.agreement == pytest.approx(top_agreement(before[1::2], after[1::2], table))
    for place in range(0, 80, 7):
        np.testing.assert_array_equal(run(path, asked, slice(place, place + 1))[0], after[place])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "table"]


def test_a_model_that_disagrees_leaves_the_float32_one(
    exported_model: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of(exported_model(0), tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(int8, "AGREEMENT", 1.01)
    proof = quantize_tcn(path, sessions(), write_table(tmp_path / "table", ITEMS, DIM))
    assert not proof.is_served
    assert path.read_bytes() == before


def test_too_few_sessions_are_refused(exported_model: Callable[[int], Any], tmp_path: Path) -> None:
    path = copy_of(exported_model(0), tmp_path)
    table = write_table(tmp_path / "table", ITEMS, DIM)
    with pytest.raises(InputError, match="1 session"):
        quantize_tcn(path, sessions(1), table)


@given(seed=st.integers(0, 99), top=st.integers(1, 30), items=st.integers(1, 50))
def test_agreement_is_the_share_of_the_best_items_in_common(
    seed: int, top: int, items: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(items, 3)).astype(np.float32)
    one, other = (rng.normal(size=(4, 3)).astype(np.float32) for _ in range(2))
    table = ItemTable(Path(), vectors, "of the test")
    best = [np.argsort(-(each @ vectors.T), axis=1)[:, :top] for each in (one, other)]
    expected = [len({*a} & {*b}) / min(top, items) for a, b in zip(*best, strict=True)]
    assert top_agreement(one, other, table, top) == pytest.approx(np.mean(expected))


def test_drawn_sessions_are_those_of_the_store(
    exported_model: Callable[[int], Any], tmp_path: Path
) -> None:
    users = random_users(np.random.default_rng(3), users=30, items=40)
    store = write_store(tmp_path, users, 40)
    table = write_table(tmp_path / "table", 40, DIM)
    model = exported_model(0).model
    start = model.start_state.detach()
    step = GruStep(model).eval()
    drawn = draw_open_sessions(store, table, step, start.numpy(), users=99, seed=1)
    assert len(drawn) == 30
    vectors = torch.from_numpy(np.asarray(table.vectors, np.float32))
    expected = []
    for past in users:
        state = start[None]
        for session in past[:-1][-8:]:
            with torch.inference_mode():
                state = step(state, vectors[session].mean(dim=0, keepdim=True))
        expected.append((state[0, -1].numpy(), past[-1]))
    unmatched = list(range(30))
    for place in range(30):
        length = int(drawn.session_length[place, 0])
        user = next(
            user
            for user in unmatched
            if np.allclose(drawn.user_state[place], expected[user][0], atol=1e-5)
            and len(expected[user][1]) >= length
            and np.array_equal(
                drawn.session_items[place, :length],
                vectors[expected[user][1][:length]].numpy()[::-1],
            )
        )
        # Users of one session share the start state; a session not begun fits any of them.
        if length or len(users[user]) > 1:
            unmatched.remove(user)
        assert not drawn.session_items[place, length:].any()
    assert int(drawn.session_length.max()) > 1
