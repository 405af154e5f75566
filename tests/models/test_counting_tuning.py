"""The benchmark's search for hyper-parameters, and that a stopped run goes on where it was."""

import json

import numpy as np
import pytest

from benchmarks import counting_rows
from benchmarks.counting_rows import METHODS, Method, tune
from benchmarks.protocol_data import ProtocolCase
from benchmarks.protocol_ranks import rank
from hiertcn.evaluation.protocol import Requests
from models.counting import Markov, Popularity
from tests.models.test_counting import ITEMS, TRAINING, everything_of

GRID = {"mask": ["last-item", "session"], "last": [1, 4], "decay": [0.1, 0.9]}


def markov(store, items, values):
    return Markov(store, items, last=values["last"], decay=values["decay"])


@pytest.fixture
def case():
    return ProtocolCase(
        name="tiny",
        phase="validation",
        fit=TRAINING,
        store=TRAINING,
        requests=everything_of(TRAINING),
        items=ITEMS,
        popularity=Popularity(TRAINING, ITEMS).fit(TRAINING).counts,
    )


def mrr(case, values):
    ranker = markov(case.store, case.items, values).fit(case.fit)
    return (1 / rank(ranker, case, values["mask"])).mean()


def test_no_single_change_improves_what_was_chosen(case):
    weights = np.full(len(case.requests), 1 / len(case.requests))
    best, reached, tried = tune(Method(markov, GRID), case, case.requests, weights, {})
    assert reached == pytest.approx(mrr(case, best))
    assert tried <= 8
    for field, values in GRID.items():
        assert reached >= max(mrr(case, {**best, field: value}) for value in values) - 1e-12


def test_search_starts_from_the_base_method(case):
    weights = np.full(len(case.requests), 1 / len(case.requests))
    start = {"mask": "session", "last": 4, "decay": 0.5}
    best, _, _ = tune(Method(markov, {"decay": [0.5]}), case, case.requests, weights, start)
    assert best == start


def test_sample_is_weighed_back():
    count = 1000
    zeros = np.zeros(count, np.int64)
    position = np.where(np.arange(count) < 50, 0, 3)
    requests = Requests(
        user=zeros,
        session=zeros,
        interaction=np.arange(count),
        position=position,
        target_row=zeros.astype(np.int32),
    )
    drawn, weights = counting_rows._sample(requests, 100)
    first = drawn.position == 0
    assert first.sum() == 25 and len(drawn) == 100
    assert len(np.unique(drawn.interaction)) == 100
    assert weights[first].sum() == pytest.approx(0.05)
    assert weights.sum() == pytest.approx(1)


def test_a_stopped_run_goes_on(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(counting_rows, "load_case", lambda data, name, phase: case)
    command = [
        "rows",
        "--data",
        str(tmp_path),
        "--output",
        str(tmp_path),
        "--case",
        "online_retail",
    ]
    monkeypatch.setattr("sys.argv", [*command, "--method", "popularity"])
    counting_rows.main()
    folder = tmp_path / "online_retail"
    ranks = folder / "popularity.npy"
    assert len(np.load(ranks)) == len(case.requests)
    written = ranks.stat().st_mtime_ns
    before = json.loads((folder / "rows.json").read_text())["rows"]["popularity"]

    monkeypatch.setattr("sys.argv", [*command, "--method", "popularity", "--method", "STAN"])
    counting_rows.main()
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert list(rows) == ["popularity", "STAN"]
    assert rows["popularity"] == before and ranks.stat().st_mtime_ns == written
    assert "| STAN" in capsys.readouterr().out


def test_every_method_builds_from_the_start_of_its_grid(case):
    values = {}
    for name, method in METHODS.items():
        values[name] = {
            **{field: options[0] for field, options in method.grid.items()},
            **(values[method.base] if method.base else {}),
        }
        ranker = method.build(case.store, case.items, values[name]).fit(case.fit)
        assert ("reminder" in ranker.name) == ("reminder" in name)
        assert ("ext" in ranker.name.split()) == ("ext" in name.split())
