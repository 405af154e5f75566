import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.evaluation.evaluate import evaluate
from hiertcn.evaluation.pools import impression_pools, slices_within
from hiertcn.evaluation.protocol import build_requests
from hiertcn.evaluation.results import EvaluationResult, kfp_metrics
from tests.evaluation.stores import ArrayRanker, nested_users, store_of

ITEMS = 8


def slow_evaluation(users, table, known_items, source):
    """1 / rank and the session position of every interaction, one at a time."""
    found, at = [], 0
    for user in users:
        for session in user:
            for position, (item, _, shown) in enumerate(session):
                pool = set(range(ITEMS))
                if shown and source == "auto":
                    pool = {*shown, item}
                score = {row: table[at, row] if row < known_items else -math.inf for row in pool}
                rank = 1 + sum(score[row] >= score[item] for row in pool if row != item)
                if score[item] == -math.inf:
                    rank = len(pool)
                found.append((1 / rank, rank / len(pool), position))
                at += 1
    return found


@settings(max_examples=60)
@given(
    nested_users(items=ITEMS),
    st.integers(0, 10_000),
    st.integers(1, ITEMS),
    st.sampled_from(["auto", "catalogue"]),
)
def test_evaluation_equals_the_slow_reference(users, seed, known_items, source):
    store = store_of(users, items=ITEMS)
    requests = build_requests(store, 0)
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 3, size=(len(store.item_rows), ITEMS))
    result = evaluate(
        [ArrayRanker("new", table), ArrayRanker("old", table[:, :known_items])],
        store,
        requests,
        items=ITEMS,
        candidates=source,
        resamples=0,
    )
    for name, known in (("new", ITEMS), ("old", known_items)):
        expected = slow_evaluation(users, table, known, source)
        groups = {
            "ALL": expected,
            "FIRST": [row for row in expected if row[2] == 0],
            "LATER": [row for row in expected if row[2] > 0],
        }
        for group, rows in groups.items():
            metrics = result.ranker(name).groups[group]
            assert metrics.requests == len(rows)
            if rows:
                assert metrics.mrr == pytest.approx(np.mean([row[0] for row in rows]))
                assert metrics.mrp == pytest.approx(np.mean([row[1] for row in rows]))
                assert metrics.recall[1] == pytest.approx(np.mean([row[0] == 1 for row in rows]))
        for place in result.ranker(name).by_position:
            at_place = [row[0] for row in expected if row[2] + 1 == place.position]
            assert (place.requests, place.mrr) == (len(at_place), pytest.approx(np.mean(at_place)))
        assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))).to_dict() == (
            result.to_dict()
        )


@given(nested_users(items=ITEMS))
def test_pool_is_the_set_of_what_was_shown_and_the_target(users):
    store = store_of(users)
    requests = build_requests(store, 0)
    pools = impression_pools(store, requests)
    at = 0
    for user in users:
        for session in user:
            for item, _, shown in session:
                row = pools.candidates[at]
                assert row[row >= 0].tolist() == sorted({*shown, item})
                assert row[pools.target_column[at]] == item
                assert pools.size[at] == len({*shown, item})
                assert (row[pools.size[at] :] == -1).all()
                at += 1


def test_unknown_impressions_are_not_candidates():
    store = store_of([[[(2, 0, [-1, 5, -1])]]])
    pools = impression_pools(store, build_requests(store, 0))
    assert pools.candidates.tolist() == [[2, 5]]


def test_sources_of_candidates_are_counted():
    users = [[[(0, 0, [0, 1, 2]), (1, 1, []), (2, 2, [2])]]]
    store = store_of(users, items=ITEMS)
    ranker = ArrayRanker("any", np.random.default_rng(0).random((3, ITEMS)))
    result = evaluate([ranker], store, build_requests(store, 0), items=ITEMS)
    assert (result.impression_pools, result.catalogue_pools) == (2, 1)
    assert result.single_candidate_pools == 1
    assert result.mean_pool_size == pytest.approx((3 + 8 + 1) / 3)
    assert (result.first_us, result.last_us) == (0, 2)
    with pytest.raises(InputError, match="1 of 3 requests have no impressions"):
        evaluate([ranker], store, build_requests(store, 0), items=ITEMS, candidates="impressions")
    bare = store_of(users, items=ITEMS, impressions=False)
    result = evaluate([ranker], bare, build_requests(bare, 0), items=ITEMS)
    assert (result.impression_pools, result.catalogue_pools) == (0, 3)


def test_an_older_table_ranks_new_items_last_and_is_never_asked_about_them():
    # The target is item 5, which only the newer ranker knows; everything else scores equally.
    users = [[[(5, 0, [4, 5, 6]), (5, 1, [])]]]
    store = store_of(users, items=ITEMS)
    table = np.zeros((2, ITEMS))
    table[:, 5] = 1
    result = evaluate(
        [ArrayRanker("new", table), ArrayRanker("old", table[:, :5])],
        store,
        build_requests(store, 0),
        items=ITEMS,
    )
    assert result.ranker("new").value("recall@1") == 1
    assert result.ranker("old").value("mrr") == pytest.approx((1 / 3 + 1 / 8) / 2)
    assert result.ranker("old").unknown_targets == 2
    assert result.ranker("old").known_items == 5


def test_rows_beyond_the_catalogue_do_not_count():
    store = store_of([[[(0, 0, [])]]], items=2, impressions=False)
    table = np.array([[0.5, 0.1, 9.0, 9.0]])
    result = evaluate([ArrayRanker("wide", table)], store, build_requests(store, 0), items=2)
    assert result.ranker("wide").value("mrr") == 1


def test_nan_scores_are_counted_and_rank_last():
    users = [[[(0, 0, [0, 1]), (0, 1, [])]]]
    store = store_of(users, items=4)
    table = np.full((2, 4), np.nan)
    result = evaluate([ArrayRanker("broken", table)], store, build_requests(store, 0), items=4)
    assert result.ranker("broken").nan_scores == 2 + 4
    assert result.ranker("broken").value("mrp") == 1


def test_rankers_get_at_most_512_requests():
    store = store_of([[[(1, 0, [1, 2])] * 700, [(1, 0, [])] * 700]], items=4)
    ranker = ArrayRanker("any", np.zeros((1400, 4)))
    evaluate([ranker], store, build_requests(store, 0), items=4, resamples=0)
    assert ranker.largest_call == 512


@given(st.lists(st.integers(1, 500), max_size=2000), st.integers(1, 50_000))
def test_slices_stay_within_the_budget(widths, budget):
    width = np.array(widths, dtype=np.int64)
    parts = list(slices_within(width, budget))
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(len(width)))
    for part in parts:
        size = part.stop - part.start
        assert size <= 512
        assert size == 1 or size * width[part].max() <= budget


def test_no_requests_are_an_undefined_result_not_an_error():
    store = store_of([[[(1, 0, [])]]], items=4)
    requests = build_requests(store, 10)
    result = evaluate([ArrayRanker("any", np.zeros((1, 4)))], store, requests, items=4)
    assert result.requests == 0
    assert math.isnan(result.ranker("any").value("mrr"))
    assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))).requests == 0
    assert kfp_metrics(result) == {"requests": 0.0}


def test_metrics_for_kfp_are_flat_numbers():
    store = store_of([[[(1, 0, [])]]], items=4)
    ranker = ArrayRanker("any", np.array([[0.0, 1, 2, 3]]))
    flat = kfp_metrics(evaluate([ranker], store, build_requests(store, 0), items=4))
    assert flat["any mrr"] == pytest.approx(1 / 3)
    assert flat["any recall@5"] == 1
    assert flat["requests"] == 1


def test_seed_decides_the_intervals():
    users = [[[(user % 4, 0, []), (1, 1, [])]] for user in range(30)]
    store = store_of(users, items=4)
    ranker = ArrayRanker("any", np.random.default_rng(0).random((60, 4)))
    first, same, other = (
        evaluate([ranker], store, build_requests(store, 0), items=4, seed=seed)
        .ranker("any")
        .groups["ALL"]
        .interval("mrr")
        for seed in (1, 1, 2)
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("names", "items", "told"),
    [
        ([], 4, "no ranker to evaluate"),
        (["one", "one"], 4, "two rankers are called 'one'"),
        (["one"], 1, "request 0 asks for item row 1, which is outside the catalogue of 1 items"),
    ],
)
def test_bad_arguments_are_named(names, items, told):
    store = store_of([[[(1, 0, [])]]], items=4)
    rankers = [ArrayRanker(name, np.zeros((1, 4))) for name in names]
    with pytest.raises(InputError, match=told):
        evaluate(rankers, store, build_requests(store, 0), items=items)


def test_unknown_source_of_candidates_is_named():
    store = store_of([[[(1, 0, [])]]], items=4)
    ranker = ArrayRanker("one", np.zeros((1, 4)))
    with pytest.raises(InputError, match="candidates is 'everything'; expected 'auto'"):
        evaluate([ranker], store, build_requests(store, 0), items=4, candidates="everything")


def test_scores_of_another_shape_are_refused():
    class Wide(ArrayRanker):
        def score(self, requests, candidates):
            return np.zeros((len(requests), 9), dtype=np.float32)

    store = store_of([[[(1, 0, [])]]], items=4)
    with pytest.raises(ValueError, match=r"'wide' returned scores of shape \(1, 9\), expected"):
        evaluate([Wide("wide", np.zeros((1, 4)))], store, build_requests(store, 0), items=4)


def test_a_result_of_another_kind_is_refused():
    with pytest.raises(InputError, match="has no field 'mean_pool_size'"):
        EvaluationResult.from_dict({"requests": 1})
