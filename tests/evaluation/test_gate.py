import json
import math

import pytest

from hiertcn.errors import InputError
from hiertcn.evaluation.gate import GateDecision, decide
from hiertcn.evaluation.metrics import RECALL_AT, Metrics
from hiertcn.evaluation.results import GROUPS, EvaluationResult, RankerResult


def result_of(mrr, *, requests=100, nan_scores=0, mrp=None):
    """An evaluation whose rankers have the given MRR."""

    def ranker(name):
        metrics = Metrics(
            requests=requests,
            users=requests,
            recall=dict.fromkeys(RECALL_AT, mrr[name]),
            mrr=mrr[name],
            mrp=(mrp or mrr)[name],
        )
        return RankerResult(
            name=name,
            groups=dict.fromkeys(GROUPS, metrics),
            nan_scores=nan_scores if name == "HierTCN" else 0,
        )

    return EvaluationResult(
        requests=requests,
        users=requests,
        items=10,
        impression_pools=0,
        catalogue_pools=requests,
        single_candidate_pools=0,
        mean_pool_size=10.0,
        first_us=0,
        last_us=1,
        rankers=tuple(ranker(name) for name in mrr),
    )


@pytest.mark.parametrize(
    ("challenger", "serving", "popularity", "passed"),
    [
        # First release: only popularity counts.
        (0.30, None, 0.20, True),
        (0.20, None, 0.20, True),
        (0.19, None, 0.20, False),
        # Better than both, or within 2% of the serving release.
        (0.30, 0.25, 0.20, True),
        (0.30, 0.30, 0.20, True),
        (0.295, 0.30, 0.20, True),
        # Beyond the tolerance; no tolerance towards popularity.
        (0.2939, 0.30, 0.20, False),
        (0.199, 0.20, 0.20, False),
        (0.30, 0.25, 0.31, False),
        (0.10, 0.30, 0.20, False),
        # Whatever is undefined is refused.
        (math.nan, 0.30, 0.20, False),
        (0.30, math.nan, 0.20, False),
        (0.30, 0.25, math.nan, False),
    ],
)
def test_truth_table(challenger, serving, popularity, passed):
    mrr = {"HierTCN": challenger, "popularity": popularity}
    if serving is not None:
        mrr["release 7"] = serving
    decision = decide(result_of(mrr), serving=None if serving is None else "release 7")
    assert decision.passed is passed
    assert decision.reason.startswith("passed: " if passed else "refused: ")
    assert len(decision.checks) == (1 if serving is None else 2)


def test_reason_names_both_sides_and_the_limit():
    result = result_of({"HierTCN": 0.1, "popularity": 0.05, "release 7": 0.3})
    assert decide(result, serving="release 7").reason == (
        "refused: MRR of HierTCN is 0.1, worse than that of the serving release 7 "
        "(0.3, allowing 0.294)"
    )
    assert decide(result).reason == (
        "passed: MRR of HierTCN is 0.1, not worse than that of the baseline popularity (0.05)"
    )


def test_too_few_requests_are_refused_whatever_the_metrics():
    mrr = {"HierTCN": 0.9, "popularity": 0.1}
    decision = decide(result_of(mrr, requests=0))
    assert not decision.passed
    assert decision.reason == (
        "refused: 0 requests were evaluated and the gate needs at least 1; evaluate a longer range"
    )
    assert not decide(result_of(mrr, requests=99), min_requests=100).passed
    assert decide(result_of(mrr, requests=100), min_requests=100).passed


def test_nan_scores_are_refused():
    decision = decide(result_of({"HierTCN": 0.9, "popularity": 0.1}, nan_scores=3))
    assert not decision.passed
    assert "HierTCN gave 3 NaN scores" in decision.reason


def test_lower_is_better_for_mrp():
    mrr = {"HierTCN": 0.5, "popularity": 0.5, "release 7": 0.5}
    better = {"HierTCN": 0.30, "popularity": 0.40, "release 7": 0.2995}
    worse = {"HierTCN": 0.31, "popularity": 0.40, "release 7": 0.30}
    assert decide(result_of(mrr, mrp=better), serving="release 7", metric="mrp").passed
    assert not decide(result_of(mrr, mrp=worse), serving="release 7", metric="mrp").passed


def test_nothing_to_beat_passes_and_says_so():
    decision = decide(result_of({"HierTCN": 0.5}), baselines=())
    assert decision.passed
    assert decision.reason.endswith("there was nothing to beat")


def test_json_keeps_the_decision():
    for value in (0.1, math.nan):
        decision = decide(result_of({"HierTCN": value, "popularity": 0.2}))
        written = json.dumps(decision.to_dict(), allow_nan=False)
        assert GateDecision.from_dict(json.loads(written)) == decision


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"challenger": "other"}, "ranker 'other' was not evaluated; expected one of HierTCN"),
        ({"serving": "gone"}, "ranker 'gone' was not evaluated"),
        ({"baselines": ("MV",)}, "ranker 'MV' was not evaluated"),
        ({"metric": "auc"}, "metric 'auc' is unknown"),
        ({"tolerance": -0.1}, "tolerance is -0.1; expected"),
        ({"tolerance": 1.0}, "tolerance is 1.0; expected"),
        ({"tolerance": math.nan}, "tolerance is nan; expected"),
    ],
)
def test_bad_arguments_are_named(arguments, told):
    with pytest.raises(InputError, match=told):
        decide(result_of({"HierTCN": 0.5, "popularity": 0.2}), **arguments)
