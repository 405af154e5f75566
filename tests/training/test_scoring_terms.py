"""Memory and freshness terms: trained, saved, resumed and ranked with like the rest of a model."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.evaluation.evaluate import evaluate
from hiertcn.evaluation.protocol import build_requests
from hiertcn.sessions.request_features import CONTEXT, FEATURES, sparse
from hiertcn.sessions.split import split_by_time
from hiertcn.sessions.transitions import TransitionTable
from hiertcn.training.hiertcn import TRANSITIONS_FOLDER, train_hiertcn
from hiertcn.training.options import TrainOptions
from models.hiertcn import HierTCN, HierTCNConfig, load_hiertcn
from models.network_ranker import NetworkRanker
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


@pytest.mark.parametrize("names", [FEATURES, FEATURES[:3], ("session_items", "live_1h")])
def test_catalogue_and_asked_items_get_the_same_scores(names):
    torch.manual_seed(0)
    terms = ScoringTerms(names)
    torch.nn.init.normal_(terms.gate.weight)
    features = torch.rand(len(names), 5, ITEMS)
    features[:, torch.rand(5, ITEMS) < 0.6] = 0.0
    context, dots = torch.rand(5, len(CONTEXT)), torch.randn(5, ITEMS)
    whole = terms.of_catalogue(dots, context, sparse(features.numpy()))
    torch.testing.assert_close(whole, terms(dots, context, features))


def test_scores_are_the_documented_mixture():
    terms = ScoringTerms(("past_items", "session_items", "live_1h"))
    torch.nn.init.normal_(terms.gate.weight, generator=torch.Generator().manual_seed(0))
    context, dots = torch.tensor([[1.0, 0.5, 0.0, 1.0]]), torch.tensor([[0.3, -1.0]])
    features = torch.tensor([[[0.2, 0.0]], [[0.0, 1.0]], [[0.1, 0.4]]])
    past, session, live, dot, mixture = terms.gate(context)[0].tolist()
    expected = [
        math.exp(dot) * 0.3
        + math.exp(mixture) * math.log1p(math.exp(past) * 0.2 + math.exp(live) * 0.1),
        math.exp(dot) * -1.0 + math.exp(mixture) * math.log1p(math.exp(live) * 0.4) + session,
    ]
    torch.testing.assert_close(terms(dots, context, features)[0], torch.tensor(expected))


def test_terms_that_do_not_exist_are_named():
    with pytest.raises(InputError, match="live_2h"):
        ScoringTerms(("live_2h",))


def test_a_trained_model_ranks_the_same_after_loading_with_candidates_and_without(log, run):
    store, table, split = log
    output, model, _ = run
    transitions = TransitionTable.open(output / TRANSITIONS_FOLDER)
    requests = build_requests(store, split.test_start_us)
    ranker = NetworkRanker(model, store, table, transitions=transitions)
    scores = ranker.score(requests, None)
    loaded = load_hiertcn(output)
    assert loaded.config == CONFIG
    again = NetworkRanker(loaded, store, table, transitions=transitions)
    np.testing.assert_array_equal(scores, again.score(requests, None))
    rows = np.random.default_rng(0).integers(-1, ITEMS, (len(requests), 7)).astype(np.int32)
    asked = again.score(requests, rows)
    expected = np.take_along_axis(scores, np.maximum(rows, 0), axis=1)
    np.testing.assert_allclose(asked[rows >= 0], expected[rows >= 0], atol=1e-5)
    assert (asked[rows < 0] == -np.inf).all()
    with pytest.raises(InputError, match="no transition table"):
        NetworkRanker(model, store, table)


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
    """Sampled softmax must weigh the terms as the whole catalogue does.

    If remembered items were no negatives, lifting everything that is remembered would cost
    nothing, and the weights would only grow.
    """
    small = dataclasses.replace(OPTIONS, random_negatives=6, in_batch_negatives=2, seed=1)
    whole = dataclasses.replace(small, random_negatives=64)
    config = dataclasses.replace(CONFIG, terms=("transitions", "session_items"))
    sampled, _ = trained(log, tmp_path / "small", small, config)
    exact, _ = trained(log, tmp_path / "whole", whole, config)
    assert sampled.terms is not None and exact.terms is not None
    difference = (sampled.terms.gate.bias - exact.terms.gate.bias).detach().abs().max()
    assert float(difference) < 1.0


def test_terms_lift_what_counting_knows_on_sessions_the_network_never_saw(log, run):
    """A user's own habits, drawn at random, are known to memory and to no network."""
    store, table, split = log
    output, model, _ = run
    requests = build_requests(store, split.test_start_us)
    transitions = TransitionTable.open(output / TRANSITIONS_FOLDER)
    with_terms = NetworkRanker(model, store, table, transitions=transitions)
    plain = HierTCN(dataclasses.replace(CONFIG, terms=()))
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "terms" not in name}
    )
    without = NetworkRanker(plain, store, table)
    ranks = [
        evaluate([ranker], store, requests, items=ITEMS, resamples=0).rankers[0]
        for ranker in (with_terms, without)
    ]
    assert ranks[0].groups["ALL"].mrr > ranks[1].groups["ALL"].mrr
