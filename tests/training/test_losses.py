"""Each objective against numbers worked out with pencil and a table of logarithms."""

import math

import numpy as np
import pytest
import torch

from hiertcn.training import losses

POSITIVE = torch.tensor([0.0, math.log(3.0)])
NEGATIVES = torch.tensor([[0.0, math.log(2.0), 9.0], [0.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_l2():
    u, target = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[4.0, 5.0], [0.0, 2.0]])
    assert losses.l2(u, target).tolist() == [5.0, 2.0]


def test_nce():
    # Row 0: -log s(0) - log s(-0) - log s(-log 2) = log 2 + log 2 + log 3.
    # Row 1: -log s(log 3) + 3 log 2 = log(4/3) + 3 log 2.
    expected = [2 * math.log(2) + math.log(3), math.log(4 / 3) + 3 * math.log(2)]
    assert losses.nce(POSITIVE, NEGATIVES, MASK).tolist() == pytest.approx(expected)


def test_bpr():
    # Row 0: -log s(0) - log s(-log 2) = log 2 + log 3. Row 1: -3 log s(log 3) = 3 log(4/3).
    expected = [math.log(2) + math.log(3), 3 * math.log(4 / 3)]
    assert losses.bpr(POSITIVE, NEGATIVES, MASK).tolist() == pytest.approx(expected)


def test_hinge():
    # Row 0: max(0, 1 + 0) + max(0, 1 + log 2). Row 1: 1 - log 3 < 0, so nothing.
    expected = [2 + math.log(2), 0.0]
    assert losses.hinge(POSITIVE, NEGATIVES, MASK, 1.0).tolist() == pytest.approx(expected)
    wider = losses.hinge(POSITIVE, NEGATIVES, MASK, 2.0)
    assert wider.tolist() == pytest.approx([4 + math.log(2), 3 * (2 - math.log(3))])


def test_softmax():
    # Row 0: -log(1 / (1 + 1 + 2)) = log 4. Row 1: -log(3 / (3 + 3)) = log 2.
    loss = losses.softmax(POSITIVE, NEGATIVES, MASK)
    assert loss.tolist() == pytest.approx([math.log(4), math.log(2)])


def test_softmax_with_log_q():
    # A negative stands for 1 / E of its like: row 0 is 1 + 1/0.5 + 2/4, row 1 3 + 2 + 1/4 + 5.
    log_expected = torch.tensor([0.5, 4.0, 0.2]).log()
    loss = losses.softmax(POSITIVE, NEGATIVES, MASK, log_expected)
    assert loss.tolist() == pytest.approx([math.log(3.5), math.log(10.25 / 3)])


def test_a_target_without_negatives_costs_nothing_and_has_a_gradient():
    positive = torch.tensor([1.5], requires_grad=True)
    negatives = torch.ones(1, 2, requires_grad=True)
    loss = losses.softmax(positive, negatives, torch.zeros(1, 2, dtype=torch.bool))
    loss.sum().backward()
    assert loss.item() == 0.0
    assert positive.grad.tolist() == [0.0] and negatives.grad.tolist() == [[0.0, 0.0]]


def test_catalogue_softmax_is_cross_entropy():
    torch.manual_seed(0)
    scores, target = torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])
    loss = losses.catalogue_softmax(scores[torch.arange(5), target], scores)
    expected = torch.nn.functional.cross_entropy(scores, target, reduction="none")
    torch.testing.assert_close(loss, expected)


def test_log_q_estimates_the_catalogue_without_bias():
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.normal(size=12))
    share = np.arange(1, 13) / 78
    target, draws = 4, 40_000
    drawn = rng.choice(12, size=(draws, 5), p=share)
    negatives = scores[torch.from_numpy(drawn)]
    log_expected = torch.from_numpy(np.log(5 * share))[torch.from_numpy(drawn)]
    mask = torch.from_numpy(drawn != target)
    loss = losses.softmax(scores[target].expand(draws), negatives, mask, log_expected)
    partition = (loss + scores[target]).exp().mean().item()
    assert partition == pytest.approx(scores.exp().sum().item(), rel=0.02)


def test_approximate_mrr():
    # Row 0: 1 + s(0) + s(log 2) = 1 + 1/2 + 2/3. Row 1: 1 + 3 s(-log 3) = 1 + 3/4.
    expected = [-1 / (1 + 1 / 2 + 2 / 3), -1 / (1 + 3 / 4)]
    found = losses.approximate_mrr(POSITIVE, NEGATIVES, MASK, temperature=1.0)
    assert found.tolist() == pytest.approx(expected)
    # Each negative stands for two: 1 + 2 s(0) + 2 s(log 2).
    drawn = torch.full((3,), math.log(0.5))
    doubled = losses.approximate_mrr(POSITIVE, NEGATIVES, MASK, drawn, temperature=1.0)
    assert doubled.tolist() == pytest.approx([-1 / (1 + 1 + 4 / 3), -1 / (1 + 3 / 2)])


def test_approximate_mrr_becomes_the_reciprocal_rank():
    scores = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    positive, everything = scores[:, 0], torch.ones(20, 29, dtype=torch.bool)
    ranks = 1 + (scores[:, 1:] > scores[:, :1]).sum(1)
    cold = losses.approximate_mrr(positive, scores[:, 1:], everything, temperature=1e-6)
    torch.testing.assert_close(cold, -1.0 / ranks)
