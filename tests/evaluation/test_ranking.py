"""Pools, ties and masks against slow references, one request at a time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.evaluation.evaluate import evaluate
from hiertcn.evaluation.pools import sampled_pools
from hiertcn.evaluation.protocol import build_requests
from hiertcn.evaluation.ranking import Ranking, RankingRules
from tests.evaluation.stores import ArrayRanker, nested_users, store_of

ITEMS = 8


def slow_ranks(users, table, known_items, source, ties, mask, popularity):
    """The rank of every interaction's item, by the definitions."""
    ranks, at = [], 0
    for user in users:
        for session in user:
            for position, (item, _, shown) in enumerate(session):
                pool = {*shown, item} if shown and source == "auto" else set(range(ITEMS))
                seen = [row for row, _, _ in session[:position]]
                seen = {"none": [], "last-item": seen[-1:], "session": seen}[mask]
                score = {
                    row: -math.inf if row in seen or row >= known_items else table[at, row]
                    for row in pool
                }
                rank = len(pool)
                if score[item] > -math.inf:
                    rank = 1 + sum(
                        score[row] > score[item]
                        or (
                            score[row] == score[item]
                            and (ties == "last" or popularity[row] >= popularity[item])
                        )
                        for row in pool - {item}
                    )
                ranks.append(rank)
                at += 1
    return ranks


@settings(max_examples=80)
@given(
    nested_users(items=ITEMS),
    st.integers(0, 10_000),
    st.integers(1, ITEMS),
    st.sampled_from(["auto", "catalogue"]),
    st.sampled_from(["last", "popularity"]),
    st.sampled_from(["none", "last-item", "session"]),
)
def test_ranks_equal_the_slow_reference(users, seed, known_items, source, ties, mask):
    store = store_of(users, items=ITEMS)
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 3, size=(len(store.item_rows), ITEMS))
    table.flags.writeable = False
    popularity = rng.integers(0, 3, size=ITEMS)
    rules = RankingRules(candidates=source, ties=ties, mask=mask, popularity=popularity)
    rankers = [ArrayRanker("new", table), ArrayRanker("old", table[:, :known_items])]
    ranking = Ranking(rankers, store, build_requests(store, 0), ITEMS, rules)
    ranking.rank_all()
    for index, known in enumerate((ITEMS, known_items)):
        expected = slow_ranks(users, table, known, source, ties, mask, popularity)
        assert ranking.ranks[index].tolist() == expected


@settings(max_examples=40)
@given(nested_users(items=ITEMS), st.integers(1, ITEMS - 1), st.integers(0, 100))
def test_a_sample_is_the_target_and_others_drawn_without_replacement(users, size, seed):
    store = store_of(users, items=ITEMS)
    requests = build_requests(store, 0)
    pools = sampled_pools(requests, ITEMS, size, seed)
    assert (pools.size == size + 1).all()
    for row, target, column in zip(
        pools.candidates, requests.target_row, pools.target_column, strict=True
    ):
        assert len(set(row.tolist())) == size + 1
        assert row.tolist() == sorted(row.tolist())
        assert row.min() >= 0 and row.max() < ITEMS
        assert row[column] == target
    # A request's sample does not depend on which others are asked.
    part = sampled_pools(requests.take(slice(1, None)), ITEMS, size, seed)
    assert (part.candidates == pools.candidates[1:]).all()


def test_a_sample_is_uniform_over_the_other_items():
    store = store_of([[[(3, 0, [])] * 4000]], items=10)
    pools = sampled_pools(build_requests(store, 0), 10, 3, seed=5)
    counts = np.bincount(pools.candidates.ravel(), minlength=10)
    assert counts[3] == 4000
    # 4000 draws of 3 of 9: mean 1333, standard deviation 30.
    assert np.abs(np.delete(counts, 3) - 4000 / 3).max() < 130
    other = sampled_pools(build_requests(store, 0), 10, 3, seed=6)
    assert (pools.candidates != other.candidates).any()


def test_sampled_evaluation_is_named_and_larger_than_over_the_catalogue():
    rng = np.random.default_rng(0)
    store = store_of([[[(int(rng.integers(50)), 0, [1, 2])] * 40] * 5], items=50)
    ranker = ArrayRanker("any", rng.random((200, 50)))
    requests = build_requests(store, 0)
    sampled = evaluate([ranker], store, requests, items=50, candidates="sample:9", seed=4)
    assert (sampled.sampled_pools, sampled.sample, sampled.seed) == (200, 9, 4)
    assert (sampled.impression_pools, sampled.catalogue_pools) == (0, 0)
    assert sampled.mean_pool_size == 10
    full = evaluate([ranker], store, requests, items=50, candidates="catalogue")
    assert full.sampled_pools == full.sample == 0
    assert sampled.ranker("any").value("mrr") > full.ranker("any").value("mrr")


def test_a_target_that_was_not_shown_is_added_and_counted():
    store = store_of([[[(0, 0, [1, 2]), (1, 1, [1, 2]), (2, 2, [])]]], items=ITEMS)
    ranker = ArrayRanker("any", np.zeros((3, ITEMS)))
    result = evaluate([ranker], store, build_requests(store, 0), items=ITEMS)
    assert result.targets_added == 1
    assert result.impression_pools == 2


def test_best_candidates_are_in_order_without_masked_and_unknown_ones():
    users = [[[(0, 0, [0, 4, 6]), (5, 1, []), (2, 2, [2, 5, 7, 1])]]]
    store = store_of(users, items=ITEMS)
    table = np.tile(np.array([9, 1, 2, 3, math.nan, 8, 7, 6], dtype=np.float32), (3, 1))
    rankers = [ArrayRanker("new", table), ArrayRanker("old", table[:, :6])]
    rules = RankingRules(mask="session")
    ranking = Ranking(rankers, store, build_requests(store, 0), ITEMS, rules)
    top = ranking.top(np.array([0, 1, 2]), 4)
    assert top[0].tolist() == [[0, 6, -1, -1], [5, 6, 7, 3], [7, 2, 1, -1]]
    assert top[1].tolist() == [[0, -1, -1, -1], [5, 3, 2, 1], [2, 1, -1, -1]]


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"candidates": "sample:0"}, "candidates is 'sample:0'; expected sample:N"),
        ({"candidates": "sample:x"}, "candidates is 'sample:x'; expected sample:N"),
        ({"candidates": "sample:4"}, "the catalogue of 4 items has only 3 beside a target"),
        ({"ties": "first"}, "ties is 'first'; expected one of last, popularity"),
        ({"mask": "all"}, "mask is 'all'; expected one of none, last-item, session"),
        ({"ties": "popularity"}, "ties is 'popularity' but popularity is None"),
        (
            {"ties": "popularity", "popularity": np.zeros(3, np.int64)},
            "popularity has 3 entries; expected one for each of the 4 items",
        ),
    ],
)
def test_bad_rules_are_named(rules, told):
    store = store_of([[[(1, 0, [])]]], items=4)
    ranker = ArrayRanker("one", np.zeros((1, 4)))
    with pytest.raises(InputError, match=told):
        evaluate([ranker], store, build_requests(store, 0), items=4, **rules)
