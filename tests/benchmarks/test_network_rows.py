import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import network_rows, parameter_counts
from benchmarks.network_rows import SETTINGS, EmbeddedRequests, asked_later, train
from benchmarks.protocol_data import ProtocolCase
from benchmarks.protocol_ranks import rank
from hiertcn.evaluation.protocol import build_requests
from hiertcn.files import read_json
from hiertcn.training.item_vectors import TrainedVectors
from models.network_ranker import NetworkRanker
from models.sequence.networks import build_network
from tests.models.test_sequence_networks import ITEMS, of_lists
from tests.session_logs import random_users

TINY = {"config.item_dim": 8, "config.hidden": 8, "options.max_epochs": 2}


@pytest.fixture(scope="module")
def cases():
    users = random_users(np.random.default_rng(0), users=15, items=ITEMS)
    users = [[*user, [1, 2, 3]] for user in users]
    store = of_lists(users)
    requests = build_requests(store)
    asked = requests.take(np.isin(requests.session, store.user_offsets[1:] - 1))
    fit = of_lists([user[:-1] for user in users])
    fit.timestamps_us = np.setdiff1d(store.timestamps_us, store.timestamps_us[asked.interaction])
    case = ProtocolCase(
        name="tiny",
        phase="validation",
        fit=fit,
        store=store,
        requests=asked,
        items=ITEMS - 1,
        popularity=np.bincount(fit.item_rows, minlength=ITEMS)[: ITEMS - 1],
    )
    return {"validation": case, "test": dataclasses.replace(case, phase="test")}


def test_asked_sessions_come_after_all_that_is_learnt(cases):
    case = cases["validation"]
    # One session of which only the end is asked.
    asked = case.requests.take(np.arange(len(case.requests)) != 0)
    store, limit = asked_later(dataclasses.replace(case, requests=asked))
    later = np.repeat(store.session_starts_us() >= limit, np.diff(store.session_offsets))
    np.testing.assert_array_equal(np.flatnonzero(later), asked.interaction)
    assert store.meta.sessions == case.store.meta.sessions + 1
    np.testing.assert_array_equal(
        store.session_offsets[store.user_offsets],
        case.store.session_offsets[case.store.user_offsets],
    )


def test_requests_embedded_at_once_rank_as_the_ranker(cases):
    case = cases["test"]
    torch.manual_seed(0)
    network = build_network(SETTINGS["HRNN-All"].changed(TINY).config).eval()
    vectors = TrainedVectors(torch.randn(case.items, 8))
    for mask in network_rows.MASKS:
        np.testing.assert_array_equal(
            rank(EmbeddedRequests("HRNN-All", network, vectors, case), case, mask),
            rank(NetworkRanker(network, case.store, vectors), case, mask),
        )


def test_a_row_is_trained_once_and_a_stopped_training_keeps_its_plan(cases, tmp_path, capsys):
    setting = SETTINGS["GRU"].changed(TINY)
    arguments = (setting, 0, tmp_path)
    for case in cases.values():
        row = network_rows._row(case, "GRU", *arguments, max_seconds=0.0)
        expected = json.loads(json.dumps(row))
        assert network_rows._row(case, "GRU", *arguments, max_seconds=0.0) == expected
        assert not (tmp_path / f"GRU-graph-{case.phase}-0-training").exists()
        ranks = np.load(tmp_path / f"GRU-graph-{case.phase}-0-session.npy")
        assert ranks.shape == (len(case.requests),)
    assert row["training"]["validation_mrr"] == [0.0, 0.0]
    assert "GRU, xs" in capsys.readouterr().out

    folder = tmp_path / "stopped"
    _, _, facts = train(cases["test"], setting, 0, folder, max_seconds=1e-9)
    assert facts["epochs"] == 1 and read_json(folder / "plan.json") == {"epochs": 1}
    _, _, facts = train(cases["test"], setting, 0, folder, max_seconds=1000.0)
    assert facts["epochs"] == 1


def test_counts_are_matched(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["parameter_counts"])
    parameter_counts.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        "HierTCN",
        "HierGRU",
        "HRNN-Init",
        "HRNN-All",
        "TCN",
        "GRU",
        "SASRec",
    ]
    ratios = [float(line.split("|")[-2]) for line in lines]
    assert all(abs(ratio - 1.0) <= parameter_counts.TOLERANCE for ratio in ratios)
