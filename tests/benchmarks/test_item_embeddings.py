"""The item-to-item benchmark: what is asked, how ties rank, and that what was measured is kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import benchmarks.item_embeddings_data as data
from benchmarks.item_embeddings_data import VALIDATION, RetrievalCase, load_case
from benchmarks.item_embeddings_methods import ROWS, Method, Prior
from benchmarks.item_embeddings_ranks import answer_ranks, intervals, measure, metric_values
from hiertcn.events.simulate import SimulationOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrieval")


@pytest.fixture(scope="module")
def cases(folder: Path):
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "_SIMULATION", SimulationOptions(users=300, items=40, days=8, seed=0))
    made = {
        phase: load_case(folder / "logs", Path(), "simulator", phase, questions=400)
        for phase in (*VALIDATION, "test")
    }
    patch.undo()
    return made.__getitem__


def test_what_is_asked_met_after_what_is_known(cases) -> None:
    older, newer, test = cases("validation-2"), cases("validation-1"), cases("test")
    assert older.last_date < newer.first_date
    assert newer.last_date < test.first_date
    for case in (older, newer, test):
        newest = np.datetime64(int(case.sessions.timestamps_us.max()), "us")
        assert newest < np.datetime64(case.first_date)
        assert (case.queries != case.answers).all()
        assert (case.popularity[case.queries] > 0).all()
        assert (case.popularity[case.answers] > 0).all()
        assert len(case.queries) <= 400
        whole = case.graph(0.0, top_n=10_000)
        met = {
            (row, int(near))
            for row in range(whole.items)
            for near in whole.indices[whole.indptr[row] : whole.indptr[row + 1]]
        }
        asked = zip(case.queries.tolist(), case.answers.tolist(), strict=True)
        assert [pair in met for pair in asked] == case.met_before.tolist()


def test_ties_never_help_and_the_query_does_not_compete(cases) -> None:
    case: RetrievalCase = cases("test")
    items = len(case.index)

    def equal(rows):
        return np.zeros((len(rows), items), np.float32)

    none, rising = np.zeros(items, np.float32), np.arange(items, dtype=np.float32)

    def ordered(rows):
        return np.tile(rising, (len(rows), 1))

    expected = items - case.answers - (case.queries > case.answers)
    tied, by_prior = answer_ranks(equal, case, [none, rising])
    assert (tied == items - 1).all()
    assert np.array_equal(by_prior, expected)
    assert np.array_equal(answer_ranks(ordered, case, [none])[0], expected)


def test_intervals_hold_the_mean_and_repeat_by_query() -> None:
    ranks = np.array([1, 2, 200, 1, 11])
    values = metric_values(ranks)
    assert values[:, :4].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0] * 4, [1] * 4, [0, 0, 1, 1]]
    low, high = intervals(values, np.arange(5))
    assert ((low <= values.mean(axis=0)) & (values.mean(axis=0) <= high)).all()
    twice = intervals(np.repeat(values, 2, axis=0), np.repeat(np.arange(5), 2))
    np.testing.assert_allclose(twice, [low, high])


def test_a_measured_row_is_chosen_on_validation_and_kept(cases, folder: Path) -> None:
    made: list[str] = []

    def build(case, options, own):
        made.append(f"{case.phase} {options['sign']}")
        scores = np.tile(options["sign"] * case.popularity.astype(np.float32), (1, 1))
        return lambda rows: np.repeat(scores, len(rows), axis=0)

    method = Method(build=build, options=lambda _: ({"sign": -1}, {"sign": 1}))
    first = measure("by count", method, cases, folder / "rows")
    assert first.facts["options"] == {"sign": 1}
    assert made == [
        *(f"validation-{cut} {sign}" for sign in (-1, 1) for cut in (1, 2)),
        "test 1",
    ]
    again = measure("by count", method, cases, folder / "rows")
    assert len(made) == 5
    assert np.array_equal(first.ranks, again.ranks)


@pytest.mark.parametrize("name", ["popularity", "raw features", "co-occurrence neighbours"])
def test_methods_beat_chance(cases, folder: Path, name: str) -> None:
    chance = replace(ROWS["random vectors"], recent_weights=(0.0,), steady_weights=(0.0,))
    random = measure("chance", chance, cases, folder / "rows")
    found = measure(name, ROWS[name], cases, folder / "rows")
    assert (1 / found.ranks).mean() > (1 / random.ranks).mean()


def test_older_events_weigh_less(cases) -> None:
    case = cases("test")
    plain = np.exp(Prior(recent_weight=1.0, half_life_days=1e9).of_items(case))
    spread = 0.01 * case.popularity.mean()
    np.testing.assert_allclose(plain, case.popularity + spread, rtol=1e-3)
    fresh = np.exp(Prior(recent_weight=1.0, half_life_days=1.0).of_items(case))
    assert fresh.sum() < 0.5 * plain.sum()
