"""The breakdowns of Figures 2 to 4 and the examples of Figure 5."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.evaluation.breakdowns import Breakdown, break_down
from hiertcn.evaluation.evaluate import evaluate
from hiertcn.evaluation.examples import Example, ExampleOptions, choose_examples
from hiertcn.evaluation.item_texts import item_texts
from hiertcn.evaluation.protocol import build_requests
from hiertcn.evaluation.report import write_report
from hiertcn.items.index import IdIndex
from tests.evaluation.stores import ArrayRanker, nested_users, store_of

MINUTE, HOUR, DAY = 60, 3600, 86_400


def interval_of(bin_text):
    """Whole numbers that ``1-2``, ``3`` or ``33+`` stand for."""
    if bin_text.endswith("+"):
        return int(bin_text[:-1]), math.inf
    low, _, high = bin_text.partition("-")
    return int(low), int(high or low)


@settings(max_examples=40)
@given(nested_users(), st.integers(0, 1000))
def test_counted_quantities_equal_the_slow_reference(users, seed):
    store = store_of(users)
    requests = build_requests(store, 0)
    ranks = np.random.default_rng(seed).integers(1, 9, size=(1, len(requests)))
    measured = {"history_interactions": [], "history_sessions": [], "position": []}
    for user in users:
        before = 0
        for number, session in enumerate(user):
            for place in range(len(session)):
                measured["history_interactions"].append(before)
                measured["history_sessions"].append(number)
                measured["position"].append(place + 1)
                before += 1
    pools = np.full(len(requests), 10)
    found = {b.key: b for b in break_down(["one"], ranks, pools, store, requests)}
    for key, amounts in measured.items():
        for place, text in enumerate(found[key].bins):
            low, high = interval_of(text)
            inside = [
                r for r, amount in zip(ranks[0], amounts, strict=True) if low <= amount <= high
            ]
            assert found[key].requests[place] == len(inside)
            means = found[key].values["one"]
            if not inside:
                assert math.isnan(means["mrr"][place])
                continue
            assert means["mrr"][place] == pytest.approx(np.mean([1 / rank for rank in inside]))
            assert means["recall@10"][place] == 1
            assert means["mrp"][place] == pytest.approx(np.mean(inside) / 10)


def test_pauses_are_since_the_end_of_the_previous_session_and_interaction():
    def at(seconds):
        return seconds * 1_000_000

    users = [
        [
            [(0, at(0), []), (1, at(20), [])],
            [(2, at(20 + 2 * HOUR), []), (3, at(20 + 2 * HOUR + 45), [])],
            [(4, at(20 + 2 * HOUR + 45 + 3 * DAY), [])],
        ],
        [[(5, at(0), [])]],
    ]
    store = store_of(users)
    requests = build_requests(store, 0)
    ranks = np.array([[1, 2, 4, 8, 16, 32]])
    found = {b.key: b for b in break_down(["one"], ranks, np.full(6, 100), store, requests)}
    session = dict(zip(found["session_gap"].bins, found["session_gap"].requests, strict=True))
    assert {text: n for text, n in session.items() if n} == {"1 h": 2, "2 d": 1}
    place = found["session_gap"].bins.index("1 h")
    assert found["session_gap"].values["one"]["mrr"][place] == pytest.approx((1 / 4 + 1 / 8) / 2)
    gaps = dict(zip(found["interaction_gap"].bins, found["interaction_gap"].requests, strict=True))
    assert {text: n for text, n in gaps.items() if n} == {
        "10 s": 1,
        "30 min": 1,
        "30 s": 1,
        "1 d": 1,
    }


def random_log(users, sessions, items, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [
            [
                (int(rng.integers(items)), (number * DAY + place * MINUTE) * 1_000_000, [])
                for place in range(int(rng.integers(1, 5)))
            ]
            for number in range(sessions if user % 2 else 1)
        ]
        for user in range(users)
    ]


def test_examples_are_the_last_requests_of_users_with_enough_sessions():
    store = store_of(random_log(20, 4, 30))
    requests = build_requests(store, DAY * 1_000_000)
    chosen = choose_examples(store, requests, 5, seed=1)
    assert len(chosen) == len(set(requests.user[chosen].tolist())) == 5
    assert (requests.user[chosen] % 2 == 1).all()
    for request in chosen:
        of_user = np.flatnonzero(requests.user == requests.user[request])
        assert request == of_user[-1]
        assert requests.session[request] - store.user_offsets[requests.user[request]] == 3
    assert (chosen == choose_examples(store, requests, 5, seed=1)).all()
    assert (chosen != choose_examples(store, requests, 5, seed=2)).any()
    assert len(choose_examples(store, requests, 100)) == 10
    short = store_of(random_log(6, 2, 30))
    assert len(choose_examples(short, build_requests(short, 0), 3)) == 0


@pytest.fixture
def evaluated():
    store = store_of(random_log(20, 4, 30), items=30)
    requests = build_requests(store, DAY * 1_000_000)
    rng = np.random.default_rng(2)
    rankers = [ArrayRanker(name, rng.random((len(store.item_rows), 30))) for name in ("one", "two")]
    options = ExampleOptions(
        users=3,
        sessions=2,
        interactions=2,
        item_labels=lambda rows: [f"item {row} <b>" for row in rows],
        user_labels=lambda users: [f"user {user}" for user in users],
    )
    result = evaluate(rankers, store, requests, items=30, examples=options)
    return store, requests, rankers, result


def test_examples_tell_the_past_and_the_best_items(evaluated):
    store, requests, rankers, result = evaluated
    assert len(result.examples) == 3
    for example, request in zip(
        result.examples, choose_examples(store, requests, 3, seed=0), strict=True
    ):
        at = int(requests.interaction[request])
        assert example.user == f"user {requests.user[request]}"
        assert example.target == f"item {store.item_rows[at]} <b>"
        assert example.earlier_sessions == 2
        before, running = example.sessions
        assert running.running and not before.running
        start = int(requests.session_start()[request])
        assert running.items == tuple(f"item {row} <b>" for row in store.item_rows[start:at][-2:])
        assert running.left_out == max(0, at - start - 2)
        for ranker, found in zip(rankers, example.recommendations, strict=True):
            order = np.argsort(-ranker.table[at])
            assert found.ranker == ranker.name
            assert found.items == tuple(f"item {row} <b>" for row in order[:10])
            rank = int(np.flatnonzero(order == store.item_rows[at])[0]) + 1
            assert found.target_rank == rank
            assert found.target_place == (rank - 1 if rank <= 10 else None)


def test_json_keeps_breakdowns_and_examples(evaluated):
    result = evaluated[-1]
    for kind, values in ((Breakdown, result.breakdowns), (Example, result.examples)):
        for value in values:
            written = json.loads(json.dumps(value.to_dict()))
            assert json.loads(json.dumps(kind.from_dict(written).to_dict())) == written
    assert [b.figure for b in result.breakdowns] == [2, 2, 3, 4, 4]
    assert [kind.from_dict(e.to_dict()) for kind, e in [(Example, result.examples[0])]] == [
        result.examples[0]
    ]


def test_report_shows_breakdowns_examples_and_differences(evaluated, tmp_path):
    write_report(tmp_path / "report.html", evaluation=evaluated[-1], challenger="one")
    page = (tmp_path / "report.html").read_text()
    assert "By history, place and pause" in page
    assert "MRR by time since the user&#39;s previous session" in page
    assert "Recommendations to a few users" in page
    assert "item 1 &lt;b&gt;" in page and "<b>" not in page.split("<h2")[-1]
    assert "one minus each other ranker" in page
    # One chart of MRR with intervals, and two for each of the five quantities.
    assert page.count("<svg") == 11
    write_report(tmp_path / "json.html", evaluation=evaluated[-1].to_dict(), challenger="one")
    assert (tmp_path / "json.html").read_text() == page


def test_an_evaluation_without_requests_has_no_analyses():
    store = store_of([[[(1, 0, [])]]], items=4)
    ranker = ArrayRanker("any", np.zeros((1, 4)))
    requests = build_requests(store, 10)
    options = ExampleOptions(users=2)
    result = evaluate([ranker], store, requests, items=4, examples=options)
    assert result.breakdowns == () and result.examples == ()


def test_items_are_called_by_id_and_title_where_there_is_one(tmp_path):
    index = IdIndex.build(["a", "b", "c"], tmp_path / "index")
    rows = index.rows(["a", "b", "c"])
    assert item_texts(index)(rows) == ["a", "b", "c"]
    assert item_texts(index, tmp_path / "missing.parquet")(rows) == ["a", "b", "c"]
    items = pa.table({"item_id": ["a", "b", "z"], "title": ["Red  mug", None, "not asked"]})
    pq.write_table(items, tmp_path / "items.parquet")
    assert item_texts(index, tmp_path / "items.parquet")(rows) == ["a: Red mug", "b", "c"]
    assert item_texts(index, tmp_path / "items.parquet")(rows[:0]) == []
    long = pa.table({"item_id": ["c"], "name": ["word " * 40]})
    pq.write_table(long, tmp_path / "long.parquet")
    assert len(item_texts(index, tmp_path / "long.parquet")(rows[2:])[0]) <= 63


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"candidates": "sample:7"}, "7 items drawn at random from all 30 items"),
        ({"candidates": "sample:7"}, "the same for every ranker, seed 5"),
        ({"mask": "session"}, "All items of the running session are ranked last by every ranker"),
        ({"mask": "last-item"}, "The item just seen in the running session is ranked last"),
        (
            {"ties": "popularity", "popularity": np.zeros(30, np.int64)},
            "A tie is won by items at least as popular as the target",
        ),
    ],
)
def test_report_tells_how_targets_were_ranked(tmp_path, rules, told):
    store = store_of(random_log(4, 3, 30), items=30)
    ranker = ArrayRanker("HierTCN", np.zeros((len(store.item_rows), 30)))
    result = evaluate([ranker], store, build_requests(store), items=30, seed=5, **rules)
    write_report(tmp_path / "report.html", evaluation=result.to_dict())
    assert told in " ".join((tmp_path / "report.html").read_text().split())
