import html.parser
import json
import math
import re

import pytest

from hiertcn.errors import InputError
from hiertcn.evaluation.gate import decide
from hiertcn.evaluation.metrics import RECALL_AT, Metrics
from hiertcn.evaluation.report import write_report
from hiertcn.evaluation.results import (
    GROUPS,
    EvaluationResult,
    OracleResult,
    PositionMetric,
    RankerResult,
)

HOSTILE = (
    """<script>alert("1")</script>&'"><img src=http://evil.example/x onerror=alert(2)> $x_1$"""
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Reads a page: every address it names, its text, its tables, and whether tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.ids, self.text, self.bold = [], [], [], [], []
        self.tables, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "strong":
            self.bold.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def metrics(mrr, requests=40):
    return Metrics(
        requests=requests,
        users=9,
        recall=dict.fromkeys(RECALL_AT, mrr),
        mrr=mrr,
        mrp=1 - mrr,
        ndcg=dict.fromkeys(RECALL_AT, mrr),
        mrr_at=mrr,
        intervals={"mrr": (mrr - 0.01, mrr + 0.01)},
    )


def ranker(name, mrr, **fields):
    return RankerResult(
        name=name,
        groups=dict.fromkeys(GROUPS, metrics(mrr)),
        by_position=tuple(
            PositionMetric(position=place, requests=5, mrr=mrr) for place in (1, 2, 10)
        ),
        **{"known_items": 30, **fields},
    )


def evaluation(*rankers, oracle=None, requests=40):
    return EvaluationResult(
        requests=requests,
        users=9,
        items=30,
        impression_pools=requests,
        catalogue_pools=0,
        single_candidate_pools=2,
        mean_pool_size=7.5,
        first_us=1_767_225_600_000_000,
        last_us=1_767_312_000_000_000,
        rankers=rankers,
        oracle=oracle,
    )


def everything(name="HierTCN", serving="release 7"):
    oracle = OracleResult(
        metrics=dict.fromkeys(GROUPS, metrics(0.5)),
        compared_requests=38,
        compared_mrr=0.5,
        ranker_mrr={name: 0.4},
    )
    result = evaluation(
        ranker(name, 0.4),
        ranker(serving, 0.39, known_items=28, unknown_targets=3),
        ranker("popularity", 0.3),
        oracle=oracle,
    )
    return {
        "title": "A release",
        "facts": {"Snapshot": "abc", "Data until": "2026-01-02"},
        "evaluation": result,
        "gate": decide(result, challenger=name, serving=serving),
        "challenger": name,
        "serving": serving,
        "data_statistics": {
            "users": 1234,
            "impressions_per_event": {"mean": 9.75, "std": 8.5},
            "events_per_user": [9.7, 13.4],
        },
        "graph_statistics": {
            "items": 30,
            "isolated_items": 2,
            "degree_quantiles": {"p0": 1, "p50": 7.5},
            "weight_quantiles": {"p0": 0.125, "p50": 2},
            "overlap": {"date": "2026-01-02", "jaccard": 0.25},
            "nothing": None,
        },
        "encoder_curve": {"epochs": [1, 2], "loss": [0.9, 0.4], "hit_rate": [0.1, 0.3]},
        "model_curve": {
            "steps": [100, 200],
            "train_loss": [2.0, 1.0],
            "validation_mrr": [None, 0.4],
        },
    }


def written(path, **parts):
    write_report(path, **parts)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, **everything())
    return path.read_text(encoding="utf-8")


def test_report_shows_every_part(full_report):
    page = Page(full_report)
    text = " ".join("".join(page.text).split())
    for told in (
        "The gate passed this release",
        "Each of 40 interactions by 9 users between 2026-01-01 00:00 UTC and 2026-01-02 00:00 UTC",
        "In 2 of the requests the target was the only candidate",
        "On the 38 requests where both ranked equally many candidates its MRR is 0.5000, of which "
        "HierTCN reaches 80.0%",
        "serving now, knows 28 items, 3 targets unknown",
        "Train loss, 2 to 1",
        "Snapshot abc",
    ):
        assert told in text, told
    rows = {row[0]: row[1:] for table in page.tables for row in table}
    assert rows["Users"] == ["1,234", "65,347", "5,923,659"]
    assert rows["Impressions per event"] == ["9.8 ± 8.5", "–", "9.8 ± 8.6"]
    assert rows["Events per user"] == ["9.7 ± 13.4", "22.2 ± 20.8", "9.7 ± 13.4"]
    assert rows["Sessions"] == ["–", "535,747", "23,354,523"]
    assert rows["Degree"] == ["1", "7.5"]
    assert rows["Overlap: jaccard"] == ["0.25"]
    assert "Nothing" not in rows
    assert page.tags.count("svg") == 6
    assert page.open == []


def test_best_of_each_column_is_bold_and_the_oracle_is_not(full_report):
    page = Page(full_report)
    # Eight metrics of all requests, two of the first and two of the later ones.
    assert page.bold == ["0.4000"] * 7 + ["0.6000"] + ["0.4000"] * 4


def test_report_needs_nothing_from_outside(full_report):
    page = Page(full_report)
    assert [address for address in page.addresses if not address.startswith("#")] == []
    assert "http" not in full_report
    assert "@import" not in full_report
    assert re.findall(r"url\((?!#)", full_report) == []
    assert {"script", "link", "iframe", "img", "object"}.isdisjoint(page.tags)


def test_ids_are_unique_and_every_reference_has_one(full_report):
    page = Page(full_report)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r"url\(#([^)]+)\)", full_report))
    used |= {address[1:] for address in page.addresses}
    assert used <= set(page.ids)


def test_charts_follow_the_pages_colors(full_report):
    for svg in re.findall(r"<svg.*?</svg>", full_report, flags=re.DOTALL):
        assert re.findall(r"#[0-9a-f]{6}\b(?![^\"]*\")", svg) == []
        assert re.findall(r"(?:fill|stroke): #", svg) == []
        assert "var(--ink)" in svg
        assert "<style" not in svg


def test_hostile_text_stays_text(tmp_path):
    parts = everything(name=HOSTILE, serving=HOSTILE + "2")
    parts |= {
        "title": HOSTILE,
        "facts": {HOSTILE: HOSTILE},
        "graph_statistics": {HOSTILE: HOSTILE, "of": {HOSTILE: 1}},
        "data_statistics": {"users": HOSTILE},
        "encoder_curve": {HOSTILE: [1, 2], f"loss {HOSTILE}": [1, 2], "epochs": HOSTILE},
    }
    path = tmp_path / "report.html"
    page = written(path, **parts)
    assert {"script", "img"}.isdisjoint(page.tags)
    assert "".join(page.text).count(HOSTILE) > 10
    assert "<script" not in path.read_text()
    assert [address for address in page.addresses if not address.startswith("#")] == []


@pytest.mark.parametrize("alone", sorted(set(everything()) - {"title", "challenger", "serving"}))
def test_any_part_may_stand_alone(tmp_path, alone):
    page = written(tmp_path / "report.html", **{alone: everything()[alone]})
    assert page.open == []
    assert "nan" not in "".join(page.text).split()


def test_nothing_at_all_is_a_page_that_says_so(tmp_path):
    page = written(tmp_path / "report.html")
    assert "There is nothing to report yet" in "".join(page.text)


def test_undefined_metrics_are_dashes(tmp_path):
    nothing = Metrics(
        requests=0,
        users=0,
        recall=dict.fromkeys(RECALL_AT, math.nan),
        mrr=math.nan,
        mrp=math.nan,
    )
    row = RankerResult(name="HierTCN", groups=dict.fromkeys(GROUPS, nothing))
    result = evaluation(row, requests=0)
    gate = decide(result, baselines=())
    page = written(tmp_path / "report.html", evaluation=result, gate=gate)
    text = " ".join("".join(page.text).split())
    assert "nothing was measured" in text
    assert "The gate refused this release 0 requests were evaluated" in text
    rows = {row[0]: row[1:] for table in page.tables for row in table}
    assert rows["HierTCN"] == ["–"] * 4
    assert page.bold == []


def test_json_in_place_of_dataclasses(tmp_path):
    parts = everything() | {"encoder_curve": None, "model_curve": None}
    write_report(tmp_path / "one.html", **parts)
    parts["evaluation"] = json.loads(json.dumps(parts["evaluation"].to_dict()))
    parts["gate"] = json.loads(json.dumps(parts["gate"].to_dict()))
    write_report(tmp_path / "two.html", **parts)
    assert (tmp_path / "one.html").read_text() == (tmp_path / "two.html").read_text()


def test_curves_of_odd_shapes(tmp_path):
    page = written(
        tmp_path / "report.html",
        encoder_curve={"loss": [1.0, math.nan, 0.5], "note": "text", "empty": []},
        model_curve={
            "steps": [10, 20, 30, 40],
            "train_loss": [4, 3, 2, 1],
            "validation_mrr": [0.4],
        },
    )
    assert page.tags.count("svg") == 3
    assert "Loss, 1 to 0.5" in "".join(page.text)


def test_a_failure_leaves_no_report(tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(InputError, match="the evaluation has no field"):
        write_report(path, evaluation={"requests": 3})
    assert list(tmp_path.iterdir()) == []
