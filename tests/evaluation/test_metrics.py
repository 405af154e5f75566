import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hiertcn.errors import InputError
from hiertcn.evaluation.metrics import (
    METRIC_NAMES,
    RECALL_AT,
    Metrics,
    mrr_intervals,
    resampled_means,
    summarize,
    target_ranks,
)

# Few values, so ties are everywhere, and everything a broken model can return.
SCORE = st.sampled_from([-1.0, 0.0, 0.5, 0.5000001, 2.0, math.nan, math.inf, -math.inf])


def slow_rank(scores, target, is_candidate):
    """1 + others that are larger + others that are equal; what has no score is last."""
    pool = [at for at, yes in enumerate(is_candidate) if yes]
    mine = scores[target]
    if math.isnan(mine) or mine == -math.inf:
        return len(pool)
    rank = 1
    for other in pool:
        if other != target and scores[other] >= mine:
            rank += 1
    return rank


@settings(deadline=None)
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


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=50))
def test_metrics_equal_the_slow_reference(pairs):
    ranks = [rank for rank, _ in pairs]
    pools = [rank + more for rank, more in pairs]
    found = summarize(np.array(ranks), np.array(pools), np.arange(len(ranks)) % 3)
    for k in RECALL_AT:
        assert found.recall[k] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))
    assert found.mrr == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert found.mrp == pytest.approx(
        sum(rank / pool for rank, pool in zip(ranks, pools, strict=True)) / len(ranks)
    )
    assert found.users == min(3, len(ranks))


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
    assert math.isnan(mrr_intervals(empty[None], empty)[0][0])


def test_unknown_metric_is_named():
    found = summarize(np.array([1]), np.array([1]), np.array([0]))
    for name in ("recall@7", "recall@", "ndcg@10", ""):
        with pytest.raises(InputError, match=f"metric '{name}' is unknown; expected one of recall"):
            found.value(name)


def test_json_keeps_the_metrics():
    found = summarize(np.array([1, 2]), np.array([3, 3]), np.array([0, 1]), (0.5, 1.0))
    assert Metrics.from_dict(found.to_dict()) == found
    empty = np.array([], dtype=np.int64)
    assert summarize(empty, empty, empty).to_dict()["mrr"] is None


def test_interval_covers_the_mean_over_users_and_widens_with_their_correlation():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 10)
    alike = np.repeat(rng.integers(1, 20, size=200), 10)
    mixed = rng.permutation(alike)
    (low, high), (mixed_low, mixed_high) = mrr_intervals(np.stack([alike, mixed]), users)
    assert low < np.mean(1 / alike) < high
    # Ten equal requests of a user tell as much as one: the interval is about sqrt(10) wider.
    assert 2.2 < (high - low) / (mixed_high - mixed_low) < 4.5
    spread = (1 / alike[::10]).std() / np.sqrt(200)
    assert (high - low) == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_resamples_are_paired_reproducible_and_equal_the_slow_reference():
    rng = np.random.default_rng(1)
    users = rng.integers(0, 30, size=300) * 7
    values = rng.random((300, 2))
    values[:, 1] = values[:, 0] + 0.25
    means = resampled_means(values, users, resamples=50, seed=9)
    assert np.allclose(means[:, 1] - means[:, 0], 0.25)
    assert (means == resampled_means(values, users, resamples=50, seed=9)).all()
    names = np.unique(users)
    draw = np.random.default_rng(9).integers(0, len(names), size=len(names))
    pooled = np.concatenate([values[users == names[one], 0] for one in draw])
    assert means[0, 0] == pytest.approx(pooled.mean())


def test_one_user_has_no_interval():
    assert math.isnan(mrr_intervals(np.array([[1, 2, 3]]), np.array([4, 4, 4]))[0][0])
