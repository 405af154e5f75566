import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import build_requests
from hiertcn.items.table import ItemTable
from hiertcn.sessions.batches import SessionBatches
from hiertcn.sessions.split import split_by_time
from hiertcn.sessions.store import SessionStore, StoreMeta
from hiertcn.training.hiertcn import train_hiertcn
from hiertcn.training.item_vectors import TrainedVectors, as_vectors
from hiertcn.training.lanes import to_tensors
from hiertcn.training.options import TrainOptions
from hiertcn.training.user_embeddings import embed_before
from hiertcn.training.whole_history import HistoryModel, history_store
from models.hiertcn import HierTCN, HierTCNConfig
from models.network_ranker import NetworkRanker
from models.sequence.gru import GRUConfig
from models.sequence.hierarchical import HierGRUConfig, HRNNConfig
from models.sequence.networks import (
    build_network,
    count_parameters,
    load_network,
    matched_config,
    network_config,
    save_network,
)
from models.sequence.sasrec import SASRecConfig
from models.sequence.tcn import FlatTCNConfig
from tests.session_logs import random_users, write_store, write_table

ITEMS, DIM = 20, 6
PIECE = 4
CONFIGS = {
    "GRU": GRUConfig(item_dim=DIM, hidden=7, layers=2),
    "TCN": FlatTCNConfig(item_dim=DIM, filters=8, blocks=2, kernel=2),
    "HierGRU": HierGRUConfig(item_dim=DIM, hidden=7, layers=2),
    "HRNN-Init": HRNNConfig(item_dim=DIM, hidden=7, layers=2),
    "HRNN-All": HRNNConfig(item_dim=DIM, hidden=7, layers=2, feeds_every_position=True),
    "GRU with a linear head": GRUConfig(
        item_dim=DIM, hidden=7, layers=2, head="linear", dropout=0.1, input_dropout=0.1
    ),
    "SASRec": SASRecConfig(item_dim=DIM, hidden=8, heads=2, piece=PIECE, context=3),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    users = random_users(np.random.default_rng(5), users=12, items=ITEMS)
    return write_store(directory, users, ITEMS), write_table(directory / "table", ITEMS, DIM)


@pytest.fixture(params=CONFIGS)
def network(request):
    torch.manual_seed(0)
    return build_network(CONFIGS[request.param]).eval()


def every_request(store):
    return build_requests(store)


def embed(network, store, table, requests):
    return embed_before(network, store, table, requests.session, requests.interaction)


def with_items(store, rows):
    """The same histories with other items."""
    columns = {
        "item_rows": rows.astype(np.int32),
        "timestamps_us": store.timestamps_us,
        "session_offsets": store.session_offsets,
        "user_offsets": store.user_offsets,
    }
    return SessionStore(store.directory, store.meta, columns)


def of_lists(users):
    """A store in memory: ``users[u]`` is a list of sessions of item rows; starts are distinct."""
    sessions = [session for user in users for session in user]
    rows = np.array([row for session in sessions for row in session], np.int32)
    session_offsets = np.cumsum([0, *map(len, sessions)])
    user_offsets = np.cumsum([0, *map(len, users)])
    columns = {
        "item_rows": rows,
        "timestamps_us": np.arange(len(rows)) * 1_000_000,
        "session_offsets": session_offsets,
        "user_offsets": user_offsets,
    }
    meta = StoreMeta(
        users=len(users),
        sessions=len(sessions),
        interactions=len(rows),
        items=ITEMS,
        impressions=None,
        gap_us=1,
        watermark_us=len(rows) * 1_000_000,
    )
    return SessionStore(None, meta, columns)


def random_vectors():
    torch.manual_seed(7)
    return TrainedVectors(torch.randn(ITEMS, DIM))


def test_no_output_depends_on_later_items_or_on_the_target(log, network):
    store, table = log
    requests = every_request(store)
    before = embed(network, store, table, requests)
    rng = np.random.default_rng(1)
    changed = 0
    for asked in rng.permutation(len(requests))[:12]:
        rows = store.item_rows.copy()
        rows[requests.interaction[asked] :] = rng.integers(0, ITEMS, len(rows))[
            requests.interaction[asked] :
        ]
        after = embed(network, with_items(store, rows), table, requests)
        torch.testing.assert_close(after[: asked + 1], before[: asked + 1], **CLOSE)
        changed += not torch.allclose(after[asked + 1 :], before[asked + 1 :], atol=1e-4)
    assert changed > 6


def test_the_item_just_seen_and_the_session_before_matter(log, network):
    store, table = log
    requests = every_request(store)
    before = embed(network, store, table, requests)
    later = np.flatnonzero(requests.position > 0)
    first = np.flatnonzero(
        (requests.position == 0) & (requests.interaction > requests.history_start(store))
    )
    for chosen in (later, first):
        rows = store.item_rows.copy()
        rows[requests.interaction[chosen[0]] - 1] = (
            rows[requests.interaction[chosen[0]] - 1] + 5
        ) % ITEMS
        after = embed(network, with_items(store, rows), table, requests)
        assert not torch.allclose(after[chosen[0]], before[chosen[0]], atol=1e-5)


def test_a_session_start_changes_the_prediction(network):
    one = of_lists([[[1, 2, 3, 4]]])
    two = of_lists([[[1, 2], [3, 4]]])
    table = random_vectors()
    u = [embed(network, store, table, every_request(store)) for store in (one, two)]
    torch.testing.assert_close(u[0][:2], u[1][:2], **CLOSE)
    assert not torch.allclose(u[0][2], u[1][2], atol=1e-4)


def test_scores_do_not_depend_on_the_other_requests(log, network):
    store, table = log
    requests = every_request(store)
    together = embed(network, store, table, requests)
    for i in range(0, len(requests), 7):
        alone = embed(network, store, table, requests.take(slice(i, i + 1)))
        torch.testing.assert_close(alone[0], together[i], **CLOSE)
    shuffled = np.random.default_rng(1).permutation(len(requests))[:40]
    torch.testing.assert_close(
        embed(network, store, table, requests.take(shuffled)), together[shuffled], **CLOSE
    )


def test_unknown_items_are_skipped(network, tmp_path):
    known, unknown = 10, 15
    users = [[[1, 2, unknown], [unknown, 3, 4, 5], [unknown, unknown], [6, unknown, 7]], [[8, 9]]]
    table = write_table(tmp_path / "table", known, DIM)
    store = of_lists(users)
    requests = every_request(store)
    u = embed(network, store, table, requests)
    for i in range(len(requests)):
        # The same request where the unknown items never were.
        user, place = int(requests.user[i]), int(requests.interaction[i])
        history, at = [], 0
        for place_of_session, session in enumerate(users[user], store.user_offsets[user]):
            first = store.session_offsets[place_of_session]
            kept = [row for at, row in enumerate(session, first) if (row < known and at < place)]
            if requests.session[i] == place_of_session:
                history.append([*kept, 0])
                at = len(kept)
                break
            if kept:
                history.append(kept)
        clean = of_lists([history])
        last = build_requests(clean).take(np.array([sum(map(len, history)) - 1]))
        assert last.position[0] == at
        torch.testing.assert_close(embed(network, clean, table, last)[0], u[i], **CLOSE)


@pytest.mark.parametrize("sessions_per_step", [1, 3])
def test_training_sees_what_evaluation_sees(log, network, sessions_per_step):
    store, table = log
    end_us = int(np.sort(store.session_starts_us())[-8])
    batched, flat = store, isinstance(network, HistoryModel)
    if flat:
        batched = network.learn_from(store, end_us)
    batches = SessionBatches(
        batched,
        lanes=3,
        sessions_per_step=sessions_per_step,
        max_length=PIECE,
        context=network.receptive_field,
        end_us=end_us,
    )
    requests = every_request(store)
    expected = embed(network, store, table, requests)
    state = network.initial_state(3)
    seen = []
    with torch.no_grad():
        for batch in batches.epoch(0):
            tensors = to_tensors(batch, as_vectors(table))
            u, state = network(tensors, state)
            torch.testing.assert_close(u, expected[tensors.interactions], **CLOSE)
            seen += tensors.interactions.tolist()
    learnt = np.repeat(store.session_starts_us() < end_us, np.diff(store.session_offsets))
    assert sorted(seen) == np.flatnonzero(learnt).tolist()


def test_a_flat_network_refuses_a_store_it_was_not_told_of(log):
    store, table = log
    network = build_network(CONFIGS["SASRec"])
    batch = next(SessionBatches(store, lanes=2, sessions_per_step=1).epoch(0))
    with pytest.raises(InputError, match="learn_from"):
        network(to_tensors(batch, as_vectors(table)), network.initial_state(2))


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_a_history_store_joins_what_is_learnt(lengths, limit):
    store = of_lists([[[0] * length for length in user] for user in lengths])
    end_us = limit * 1_000_000
    joined = history_store(store, end_us)
    assert joined.item_rows is store.item_rows
    expected = []
    for user in range(len(lengths)):
        sessions = range(store.user_offsets[user], store.user_offsets[user + 1])
        for learnt in (True, False):
            part = [s for s in sessions if (store.session_starts_us()[s] < end_us) == learnt]
            if part:
                expected.append((user, *store.session_offsets[[part[0], part[-1] + 1]].tolist()))
    found = [
        (int(joined.user_of_session(np.array([s]))[0]), *joined.session_offsets[s : s + 2].tolist())
        for s in range(joined.meta.sessions)
    ]
    assert found == expected


def test_save_and_load_keep_scores(log, network, tmp_path):
    store, table = log
    save_network(network, tmp_path)
    loaded = load_network(tmp_path)
    assert loaded.config == network.config
    requests = every_request(store).take(slice(0, 60))
    scores = NetworkRanker(network, store, table).score(requests, None)
    np.testing.assert_array_equal(NetworkRanker(loaded, store, table).score(requests, None), scores)
    candidates = np.random.default_rng(0).integers(-1, ITEMS, (60, 5)).astype(np.int32)
    some = NetworkRanker(loaded, store, table).score(requests, candidates)
    asked = candidates >= 0
    expected = np.take_along_axis(scores, np.maximum(candidates, 0), 1)
    np.testing.assert_allclose(some[asked], expected[asked], atol=1e-4)
    assert np.isneginf(some[~asked]).all()


@pytest.fixture(scope="module")
def learnable(tmp_path_factory):
    directory = tmp_path_factory.mktemp("learnable")
    users = random_users(np.random.default_rng(2), users=50, items=ITEMS)
    store = write_store(directory, users, ITEMS)
    return store, write_table(directory / "table", ITEMS, DIM), split_by_time(store, 0.2, 0.2)


LEARNING = TrainOptions(
    item_vectors="learned",
    lanes=2,
    sessions_per_step=2,
    max_length=PIECE,
    learning_rate=2e-2,
    schedule="cosine",
    warmup_steps=5,
    max_epochs=5,
    device="cpu",
)


def test_every_network_learns(learnable, network, tmp_path):
    store, _, split = learnable
    summary = train_hiertcn(network, *learnable, tmp_path, LEARNING)
    assert summary.validation_mrr > 0.3
    trained = ItemTable.open(tmp_path / "item_table")
    requests = build_requests(store, split.test_start_us)
    scores = NetworkRanker(load_network(tmp_path), store, trained).score(requests, None)
    np.testing.assert_array_equal(
        NetworkRanker(network, store, trained).score(requests, None), scores
    )


@pytest.mark.parametrize("name", ["GRU", "HRNN-All", "SASRec"])
def test_a_network_trained_twice_from_one_seed_is_the_same(learnable, name, tmp_path):
    config = dataclasses.replace(CONFIGS[name], dropout=0.2)
    options = dataclasses.replace(LEARNING, max_epochs=1)
    weights = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        torch.manual_seed(1)
        train_hiertcn(build_network(config), *learnable, folder, options)
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_without_validation_the_last_weights_are_kept(log, tmp_path):
    store, table = log
    split = split_by_time(store, 0.2, 0.2)
    options = TrainOptions(
        lanes=6, max_epochs=3, validation_requests=0, learning_rate=1e-2, device="cpu"
    )
    network = build_network(CONFIGS["HRNN-All"])
    summary = train_hiertcn(network, store, table, split, tmp_path, options)
    assert summary.best_step == summary.steps and summary.stopped == "3 epochs done"
    assert summary.validation_mrr == 0.0


def test_a_cosine_schedule_ends_near_zero(log, tmp_path):
    store, table = log
    split = split_by_time(store, 0.2, 0.2)
    moved = {}
    for schedule in ("plateau", "cosine"):
        options = TrainOptions(
            lanes=2,
            sessions_per_step=1,
            max_steps=12,
            learning_rate=1e-2,
            schedule=schedule,
            warmup_steps=0,
            validation_requests=0,
            device="cpu",
        )
        torch.manual_seed(0)
        network, weights = build_network(CONFIGS["HierGRU"]), []
        network.register_forward_hook(
            lambda module, *_, weights=weights: weights.append(module.head[-1].bias.tolist())
        )
        train_hiertcn(network, store, table, split, tmp_path / schedule, options)
        moved[schedule] = np.abs(np.diff(weights, axis=0)).mean(1)
    assert moved["cosine"][0] == pytest.approx(moved["plateau"][0], rel=0.1)
    assert moved["cosine"][-1] < 0.2 * moved["plateau"][-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_widths_match_a_number_of_parameters(name):
    config = dataclasses.replace(CONFIGS[name], item_dim=64)
    wanted = sum(weights.numel() for weights in HierTCN(HierTCNConfig(item_dim=64)).parameters())
    matched = matched_config(config, wanted)
    count = sum(weights.numel() for weights in build_network(matched).parameters())
    assert count == count_parameters(matched)
    assert abs(count - wanted) <= 0.05 * wanted
    with pytest.raises(InputError, match="within 5%"):
        matched_config(config, 100)


def test_configurations_are_checked(network):
    config = network.config
    assert network_config(config.to_dict()) == config
    with pytest.raises(InputError, match="item_dim"):
        dataclasses.replace(config, item_dim=0)
    with pytest.raises(InputError, match="dropout"):
        dataclasses.replace(config, dropout=1.0)
    with pytest.raises(InputError, match="depth"):
        network_config({**config.to_dict(), "depth": 3})
    with pytest.raises(InputError, match="network is 'LSTM'"):
        network_config({"network": "LSTM"})
    with pytest.raises(InputError, match="input_dropout is 1"):
        GRUConfig(item_dim=8, input_dropout=1)
    with pytest.raises(InputError, match=r"GRUConfig\.head is .deep.; expected one of perceptron"):
        GRUConfig(item_dim=8, head="deep")
    with pytest.raises(InputError, match="heads"):
        SASRecConfig(item_dim=4, hidden=9, heads=2)
