"""HierTCN run over the generator's batches equals HierTCN run over each user alone."""

import numpy as np
import pytest
import torch

from hiertcn.sessions.batches import SessionBatches
from hiertcn.training.lanes import to_tensors
from hiertcn.training.user_embeddings import embed_before, states_before
from models.hiertcn import HierTCN, HierTCNConfig
from tests.session_logs import random_users, write_store, write_table

ITEMS, DIM = 20, 6


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    users = random_users(np.random.default_rng(0), users=12, items=ITEMS, length=25)
    store = write_store(directory, users, ITEMS)
    return store, write_table(directory / "table", ITEMS, DIM)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = HierTCNConfig(item_dim=DIM, hidden=8, gru_layers=2, tcn_blocks=2, kernel=3, filters=10)
    return HierTCN(config).eval()


@torch.inference_mode()
def embeddings_by_user(model, store, table):
    """Return u before every interaction, one user and one session at a time, uncut."""
    out = np.zeros((store.meta.interactions, DIM), np.float32)
    for user in range(store.meta.users):
        state = model.initial_state(1)
        for session in range(store.user_offsets[user], store.user_offsets[user + 1]):
            rows = slice(store.session_offsets[session], store.session_offsets[session + 1])
            items = torch.from_numpy(table.gather(store.item_rows[rows]))
            u = model.encode(items, torch.tensor([len(items)]), state[:, -1])
            out[rows] = u[:-1].numpy()
            state = model.gru_step(state, items.mean(0, keepdim=True))
    return out


@pytest.mark.parametrize(
    ("lanes", "sessions_per_step", "max_length", "seed"),
    [(1, 1, 200, 0), (5, 3, 200, 1), (3, 2, 7, 2), (40, 4, 1, 3)],
)
def test_lanes_and_pieces_change_nothing(log, model, lanes, sessions_per_step, max_length, seed):
    store, table = log
    batches = SessionBatches(
        store,
        lanes=lanes,
        sessions_per_step=sessions_per_step,
        max_length=max_length,
        context=model.receptive_field,
        seed=seed,
    )
    state = model.initial_state(lanes)
    found = np.full((store.meta.interactions, DIM), np.nan, np.float32)
    with torch.inference_mode():
        for batch in batches.epoch(0):
            tensors = to_tensors(batch, table)
            u, state = model(tensors, state)
            found[tensors.interactions] = u.numpy()
            assert np.array_equal(
                tensors.target_rows.numpy(), store.item_rows[tensors.interactions]
            )
    expected = embeddings_by_user(model, store, table)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_offline_scoring_is_the_same_function(log, model):
    store, table = log
    rng = np.random.default_rng(1)
    interactions = rng.integers(store.meta.interactions, size=200)
    sessions = np.searchsorted(store.session_offsets, interactions, side="right") - 1
    u = embed_before(model, store, table, sessions, interactions)
    expected = embeddings_by_user(model, store, table)[interactions]
    np.testing.assert_allclose(u.numpy(), expected, atol=1e-5)


def test_states_follow_sessions_in_order(log, model):
    store, table = log
    sessions = np.random.default_rng(2).permutation(store.meta.sessions)[:15]
    states = states_before(model, store, table, sessions)
    for place, session in enumerate(sessions):
        user = int(store.user_of_session(np.array([session]))[0])
        state = model.initial_state(1)
        for earlier in range(store.user_offsets[user], session):
            rows = slice(store.session_offsets[earlier], store.session_offsets[earlier + 1])
            mean = torch.from_numpy(table.gather(store.item_rows[rows])).mean(0, keepdim=True)
            state = model.gru_step(state, mean)
        torch.testing.assert_close(states[place], state[0], atol=1e-5, rtol=1e-4)


def test_rows_past_an_older_table_are_skipped(log, model, tmp_path):
    store, table = log
    shorter = type(table).write(tmp_path / "shorter", np.asarray(table.vectors)[:10], "float32")
    interactions = np.arange(store.meta.interactions)
    sessions = np.searchsorted(store.session_offsets, interactions, side="right") - 1
    u = embed_before(model, store, shorter, sessions, interactions).numpy()
    user = 3
    state = model.initial_state(1)
    with torch.inference_mode():
        for session in range(store.user_offsets[user], store.user_offsets[user + 1]):
            rows = np.arange(store.session_offsets[session], store.session_offsets[session + 1])
            known = store.item_rows[rows] < 10
            items = torch.from_numpy(shorter.gather(store.item_rows[rows][known]))
            by_hand = model.encode(items, torch.tensor([len(items)]), state[:, -1]).numpy()
            seen = np.cumsum(known) - known
            np.testing.assert_allclose(u[rows], by_hand[seen], atol=1e-5)
            if len(items):
                state = model.gru_step(state, items.mean(0, keepdim=True))
