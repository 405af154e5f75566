import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hiertcn.errors import InputError
from hiertcn.evaluation.metrics import (
    METRIC_NAMES,
    Metrics,
    metric_title,
    summarize,
    target_ranks,
)

# Few values, so ties are everywhere, and everything a broken model can return.
SCORE = st.sampled_from([-1.0, 0.0, 0.5, 0.5000001, 2.0, math.nan, math.inf, -math.inf])


def slow_rank(scores, target, is_candidate, popularity=None):
    """1 + others that are larger + others that are equal; what has no score is last."""
    pool = [at for at, yes in enumerate(is_candidate) if yes]
    mine = scores[target]
    if math.isnan(mine) or mine == -math.inf:
        return len(pool)
    rank = 1
    for other in pool:
        if other == target:
            continue
        wins_tie = popularity is None or popularity[other] >= popularity[target]
        if scores[other] > mine or (scores[other] == mine and wins_tie):
            rank += 1
    return rank


@given(st.data())
def test_ranks_equal_the_slow_reference(data):
    batch, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    scores = data.draw(hnp.arrays(np.float32, (batch, count), elements=SCORE.map(np.float32)))
    candidates = data.draw(hnp.arrays(np.int32, (batch, count), elements=st.integers(-1, 5)))
    target = np.array([data.draw(st.integers(0, count - 1)) for _ in range(batch)])
    candidates[np.arange(batch), target] = 3
    valid = candidates >= 0
    ranks = target_ranks(scores, target, valid.sum(axis=1), candidates)
    expected = [slow_rank(scores[row], target[row], valid[row]) for row in range(batch)]
    assert ranks.tolist() == expected
    everything = np.full(batch, count)
    expected = [slow_rank(scores[row], target[row], [True] * count) for row in range(batch)]
    assert target_ranks(scores, target, everything).tolist() == expected


@given(st.data())
def test_ties_are_broken_by_popularity_as_the_slow_reference_does(data):
    batch, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    scores = data.draw(hnp.arrays(np.float32, (batch, count), elements=SCORE.map(np.float32)))
    popularity = data.draw(hnp.arrays(np.int64, (batch, count), elements=st.integers(0, 2)))
    target = np.array([data.draw(st.integers(0, count - 1)) for _ in range(batch)])
    candidates = data.draw(hnp.arrays(np.int32, (batch, count), elements=st.integers(-1, 5)))
    candidates[np.arange(batch), target] = 3
    valid = candidates >= 0
    expected = [slow_rank(scores[r], target[r], valid[r], popularity[r]) for r in range(batch)]
    found = target_ranks(scores, target, valid.sum(axis=1), candidates, popularity)
    assert found.tolist() == expected
    shared = popularity[0]
    expected = [slow_rank(scores[r], target[r], [True] * count, shared) for r in range(batch)]
    found = target_ranks(scores, target, np.full(batch, count), None, shared)
    assert found.tolist() == expected


def slow_metrics(scores, target, pools):
    """Every metric from lists of scores, by the definitions."""
    ranks = [slow_rank(row, at, [True] * len(row)) for row, at in zip(scores, target, strict=True)]
    found = {
        "mrr": [1 / rank for rank in ranks],
        "mrr@20": [1 / rank if rank <= 20 else 0 for rank in ranks],
        "mrp": [rank / pool for rank, pool in zip(ranks, pools, strict=True)],
    }
    for k in (1, 5, 10, 20):
        found[f"recall@{k}"] = [rank <= k for rank in ranks]
        # One relevant item: the ideal gain is 1, so the gain of the target is the NDCG.
        found[f"ndcg@{k}"] = [1 / math.log2(rank + 1) if rank <= k else 0 for rank in ranks]
    return {name: sum(values) / len(values) for name, values in found.items()}


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 8), st.integers(0, 10_000))
def test_every_metric_equals_the_slow_reference_with_ties(batch, count, levels, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, size=(batch, count)).astype(np.float32)
    target = rng.integers(0, count, size=batch)
    pools = np.full(batch, count)
    found = summarize(target_ranks(scores, target, pools), pools, np.arange(batch) % 3)
    expected = slow_metrics(scores.tolist(), target.tolist(), pools.tolist())
    assert set(expected) == set(METRIC_NAMES)
    for name, value in expected.items():
        assert found.value(name) == pytest.approx(value), name
    assert found.users == min(3, batch)


def test_table_worked_by_hand():
    scores = np.array(
        [
            [0.9, 0.1, 0.5, 0.3],  # the target is the best of four: rank 1
            [0.9, 0.1, 0.5, 0.3],  # two are better: rank 3
            [0.7, 0.7, 0.7, 0.1],  # two others are equal: rank 3
            [0.2, 0.1, 9.0, 9.0],  # the last two columns are padding: rank 1 of 2
        ],
        dtype=np.float32,
    )
    candidates = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, -1, -1]], np.int32)
    pools = np.array([4, 4, 4, 2])
    ranks = target_ranks(scores, np.array([0, 3, 1, 0]), pools, candidates)
    assert ranks.tolist() == [1, 3, 3, 1]
    found = summarize(ranks, pools, np.array([7, 7, 8, 9]))
    assert found.recall == {1: 0.5, 5: 1.0, 10: 1.0, 20: 1.0}
    assert found.mrr == pytest.approx((1 + 1 / 3 + 1 / 3 + 1) / 4)
    assert found.mrp == pytest.approx((1 / 4 + 3 / 4 + 3 / 4 + 1 / 2) / 4)
    assert (found.requests, found.users) == (4, 3)


@pytest.mark.parametrize("constant", [0.0, -3.0, math.inf, -math.inf, math.nan])
def test_one_score_for_all_ranks_every_target_last(constant):
    scores = np.full((5, 40), constant, dtype=np.float32)
    ranks = target_ranks(scores, np.arange(5), np.full(5, 40))
    assert ranks.tolist() == [40] * 5


def test_unknown_target_is_last_even_if_nothing_else_has_a_score():
    scores = np.full((1, 3), np.nan, dtype=np.float32)
    assert target_ranks(scores, np.array([-1]), np.array([4])).tolist() == [4]


def test_no_requests_give_undefined_metrics():
    empty = np.array([], dtype=np.int64)
    found = summarize(empty, empty, empty)
    assert found.requests == 0
    assert all(math.isnan(found.value(name)) for name in METRIC_NAMES)


def test_unknown_metric_is_named():
    found = summarize(np.array([1]), np.array([1]), np.array([0]))
    for name in ("recall@7", "recall@", "ndcg@3", "mrr@", ""):
        with pytest.raises(InputError, match=f"metric '{name}' is unknown; expected one of recall"):
            found.value(name)


def test_json_keeps_the_metrics():
    found = summarize(np.array([1, 2]), np.array([3, 3]), np.array([0, 1]), {"mrr": (0.5, 1.0)})
    assert Metrics.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.interval("mrr") == (0.5, 1.0)
    assert math.isnan(found.interval("mrp")[0])
    empty = np.array([], dtype=np.int64)
    assert summarize(empty, empty, empty).to_dict()["mrr"] is None


def test_metrics_of_an_older_release_are_read_and_what_it_lacks_is_undefined():
    written = {
        "requests": 2,
        "users": 2,
        "recall@1": 0.5,
        "recall@5": 1.0,
        "recall@10": 1.0,
        "recall@20": 1.0,
        "mrr": 0.75,
        "mrr_interval": [0.5, None],
        "mrp": 0.5,
    }
    found = Metrics.from_dict(written)
    assert (found.value("recall@1"), found.value("mrr"), found.value("mrp")) == (0.5, 0.75, 0.5)
    assert found.interval("mrr")[0] == 0.5 and math.isnan(found.interval("mrr")[1])
    for name in ("ndcg@10", "mrr@20"):
        assert math.isnan(found.value(name))
    assert Metrics.from_dict(found.to_dict()).to_dict() == found.to_dict()


def test_titles_are_as_in_papers():
    titles = [metric_title(name) for name in ("recall@10", "ndcg@10", "mrr", "mrr@20", "mrp")]
    assert titles == ["Recall@10", "NDCG@10", "MRR", "MRR@20", "MRP"]
