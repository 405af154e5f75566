"""Memory and freshness terms: trained, saved, resumed and ranked with like the rest of a model."""

import dataclasses

import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import build_requests
from hiertcn.sessions.request_features import CONTEXT, FEATURES, sparse
from hiertcn.sessions.split import split_by_time
from hiertcn.sessions.transitions import TransitionTable
from hiertcn.training.hiertcn import TRANSITIONS_FOLDER, train_hiertcn
from hiertcn.training.options import TrainOptions
from models.hiertcn import HierTCN, HierTCNConfig, load_hiertcn
from models.hiertcn_ranker import HierTCNRanker
from models.scoring_terms import ScoringTerms
from tests.session_logs import random_users, write_store, write_table

ITEMS, DIM = 30, 9
CONFIG = HierTCNConfig(
    item_dim=DIM,
    hidden=12,
    gru_layers=1,
    tcn_blocks=2,
    kernel=3,
    filters=16,
    terms=FEATURES,
)
OPTIONS = TrainOptions(lanes=4, max_steps=30, random_negatives=64, device="cpu")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    users = random_users(np.random.default_rng(0), users=40, items=ITEMS)
    store = write_store(directory, users, ITEMS)
    return store, write_table(directory / "table", ITEMS, DIM), split_by_time(store, 0.2, 0.2)


def trained(log, output, options=OPTIONS, config=CONFIG):
    torch.manual_seed(0)
    model = HierTCN(config)
    summary = train_hiertcn(model, *log, output, options)
    return model, summary


@pytest.fixture(scope="module")
def run(log, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    return output, *trained(log, output)


def test_catalogue_and_asked_items_get_the_same_terms():
    torch.manual_seed(0)
    terms = ScoringTerms(FEATURES, DIM)
    torch.nn.init.normal_(terms.gate.weight)
    features = torch.rand(len(FEATURES), 5, ITEMS)
    features[:, torch.rand(5, ITEMS) < 0.6] = 0.0
    u, context = torch.randn(5, DIM), torch.rand(5, len(CONTEXT))
    scores = torch.randn(5, ITEMS)
    whole = terms.add_to_catalogue(scores, u, context, sparse(features.numpy()))
    torch.testing.assert_close(whole, scores + terms(u, context, features))


def test_terms_that_do_not_exist_are_named():
    with pytest.raises(InputError, match="live_2h"):
        ScoringTerms(("live_2h",), DIM)


def test_a_trained_model_ranks_the_same_after_loading_with_candidates_and_without(log, run):
    store, table, split = log
    output, model, _ = run
    transitions = TransitionTable.open(output / TRANSITIONS_FOLDER)
    requests = build_requests(store, split.test_start_us)
    ranker = HierTCNRanker(model, store, table, transitions=transitions)
    scores = ranker.score(requests, None)
    loaded = load_hiertcn(output)
    assert loaded.config == CONFIG
    again = HierTCNRanker(loaded, store, table, transitions=transitions)
    np.testing.assert_array_equal(scores, again.score(requests, None))
    rows = np.random.default_rng(0).integers(-1, ITEMS, (len(requests), 7)).astype(np.int32)
    asked = again.score(requests, rows)
    expected = np.take_along_axis(scores, np.maximum(rows, 0), axis=1)
    np.testing.assert_allclose(asked[rows >= 0], expected[rows >= 0], atol=1e-5)
    assert (asked[rows < 0] == -np.inf).all()
    with pytest.raises(InputError, match="no transition table"):
        HierTCNRanker(model, store, table)


def test_the_gate_learns_and_resumes_to_the_same_bits(log, run, tmp_path):
    _, model, summary = run
    assert model.terms is not None
    assert float(model.terms.gate.weight.detach().abs().sum()) > 0.0
    interrupted_output = tmp_path / "half"

    class Killed(Exception):
        pass

    torch.manual_seed(0)
    interrupted = HierTCN(CONFIG)
    steps = []

    def kill(module, arguments, result):
        steps.append(1)
        if len(steps) > 20:
            raise Killed

    hook = interrupted.tcn.register_forward_hook(kill)
    with pytest.raises(Killed):
        train_hiertcn(
            interrupted, *log, interrupted_output, dataclasses.replace(OPTIONS, checkpoint_s=0.0)
        )
    hook.remove()
    resumed, again = trained(
        log, interrupted_output, dataclasses.replace(OPTIONS, checkpoint_s=0.0)
    )
    assert again.steps == summary.steps
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_pool_smaller_than_the_catalogue_holds_what_memory_brings_up(log, tmp_path):
    """Sampled softmax with terms must agree with the whole catalogue where it samples nearly all.

    The gate's weight on transitions would fall to nothing if its own items were never negatives:
    then raising everything that is remembered costs nothing and the weight only grows.
    """
    small = dataclasses.replace(
        OPTIONS, random_negatives=6, in_batch_negatives=2, max_steps=60, seed=1
    )
    whole = dataclasses.replace(small, random_negatives=64)
    config = dataclasses.replace(CONFIG, terms=("transitions", "session_items"))
    sampled, _ = trained(log, tmp_path / "small", small, config)
    exact, _ = trained(log, tmp_path / "whole", whole, config)
    assert sampled.terms is not None and exact.terms is not None
    difference = (sampled.terms.gate.bias - exact.terms.gate.bias).detach().abs().max()
    assert float(difference) < 0.1
