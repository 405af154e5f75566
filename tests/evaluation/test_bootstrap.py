import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.evaluation.bootstrap import (
    Difference,
    metric_intervals,
    paired_difference,
    resampled_means,
)
from hiertcn.evaluation.metrics import METRIC_NAMES, metric_values


def slow_resamples(values, users, resamples, seed):
    """Means over drawn users, each with all their values."""
    names = np.unique(users)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(names), size=len(names))
        found.append(np.concatenate([values[users == names[one]] for one in drawn]).mean())
    return np.array(found)


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(2, 9), st.integers(0, 1000))
def test_intervals_of_every_metric_equal_the_slow_reference(count, users_most, seed):
    rng = np.random.default_rng(seed)
    users = rng.integers(0, users_most, size=count) * 5
    users[:2] = (0, 5)
    pools = np.full(count, 30)
    ranks = rng.integers(1, 31, size=(2, count))
    found = metric_intervals(ranks, pools, users, resamples=20, seed=seed)
    for column, metric in enumerate(METRIC_NAMES):
        means = [
            slow_resamples(metric_values(row, pools)[:, column], users, 20, seed) for row in ranks
        ]
        for index in range(2):
            assert found[index].metrics[metric] == pytest.approx(
                tuple(np.quantile(means[index], (0.025, 0.975)))
            )
        difference = found[1].to_first[metric]
        assert (difference.low, difference.high) == pytest.approx(
            tuple(np.quantile(means[0] - means[1], (0.025, 0.975)))
        )
        alone = paired_difference(ranks[0], ranks[1], pools, users, metric, resamples=20, seed=seed)
        assert alone.to_list() == pytest.approx(difference.to_list())
        values = [metric_values(row, pools)[:, column].mean() for row in ranks]
        assert alone.mean == pytest.approx(values[0] - values[1])


def test_interval_covers_the_mean_over_users_and_widens_with_their_correlation():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 10)
    alike = np.repeat(rng.integers(1, 20, size=200), 10)
    mixed = rng.permutation(alike)
    pools = np.full(2000, 20)
    (low, high), (mixed_low, mixed_high) = (
        found.metrics["mrr"] for found in metric_intervals(np.stack([alike, mixed]), pools, users)
    )
    assert low < np.mean(1 / alike) < high
    # Ten equal requests of a user tell as much as one: the interval is about sqrt(10) wider.
    assert 2.2 < (high - low) / (mixed_high - mixed_low) < 4.5
    spread = (1 / alike[::10]).std() / np.sqrt(200)
    assert (high - low) == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_a_small_but_steady_difference_is_seen_only_when_paired():
    rng = np.random.default_rng(3)
    users = np.arange(300)
    pools = np.full(300, 1000)
    ranks = rng.integers(2, 900, size=300)
    better, worse = metric_intervals(np.stack([ranks - 1, ranks]), pools, users)
    assert better.metrics["mrp"][1] > worse.metrics["mrp"][0]
    assert worse.to_first["mrp"].excludes_zero
    assert worse.to_first["mrp"].mean == pytest.approx(-1 / 1000)
    assert not better.to_first["mrp"].excludes_zero


def test_resamples_are_reproducible():
    rng = np.random.default_rng(1)
    users = rng.integers(0, 30, size=300) * 7
    values = rng.random((300, 2))
    values[:, 1] = values[:, 0] + 0.25
    means = resampled_means(values, users, resamples=50, seed=9)
    assert np.allclose(means[:, 1] - means[:, 0], 0.25)
    assert (means == resampled_means(values, users, resamples=50, seed=9)).all()
    assert (means != resampled_means(values, users, resamples=50, seed=8)).any()


def test_one_user_or_no_request_has_no_interval():
    one = np.array([4, 4, 4])
    found = metric_intervals(np.array([[1, 2, 3]]), one, one)[0]
    assert found.metrics == {} and found.to_first == {}
    difference = paired_difference(np.array([1, 2, 3]), np.array([2, 2, 3]), one, one)
    assert difference.mean == pytest.approx(0.5 / 3)
    assert math.isnan(difference.low) and not difference.excludes_zero
    empty = np.empty(0, np.int64)
    assert metric_intervals(empty[None], empty, empty)[0].metrics == {}
    nothing = paired_difference(empty, empty, empty, empty)
    assert nothing.to_list() == [None, None, None]
    assert math.isnan(Difference.from_list(nothing.to_list()).mean)


def test_bad_arguments_are_named():
    some = np.array([1, 2])
    with pytest.raises(InputError, match="metric 'speed' is unknown"):
        paired_difference(some, some, some, some, "speed")
    with pytest.raises(InputError, match="2 ranks, 1 other ranks"):
        paired_difference(some, some[:1], some, some)
    with pytest.raises(InputError, match="resamples is 0"):
        paired_difference(some, some, some, some, resamples=0)
