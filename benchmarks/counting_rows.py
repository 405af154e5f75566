"""The counting baselines' rows under the evaluation protocol: tuned on validation, tested once.

    python -m benchmarks.counting_rows --data DATA --output RESULTS [--case NAME ...]

Each method's hyper-parameters are chosen by MRR on a fixed sample of the validation requests, with
first items of a session drawn more often and weighed back: one at a time in the order listed, every
value of its small grid, in two sweeps. The mask (last item, or ``xs``, the whole running session)
is one of them; a method with a reminder starts from the choice of the one without. The method is
then fitted once on training and validation and ranks every test request.

``RESULTS/<case>/`` gets ``chosen.json``, ``rows.json`` and each method's ranks, int64
``[requests]`` in the case's order, so that other methods can be compared over the same resamples.
What is there is not chosen again, nor tested again while its choice stands: a run that was stopped
goes on where it was.

MV and MaxItem need an item table and have no row here.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.protocol_data import CASES, ProtocolCase, load_case
from benchmarks.protocol_ranks import MISS, Mask, intervals, metrics, rank
from hiertcn.evaluation.protocol import Requests
from hiertcn.files import read_json, write_json
from hiertcn.sessions.store import SessionStore
from models.counting import (
    STAN,
    VSKNN,
    VSTAN,
    CountingRanker,
    ItemKNN,
    LivePopularity,
    Markov,
    PersonalPopularity,
    Popularity,
    Reminder,
)
from models.counting.neighbours import Neighbourhood

Values = dict[str, Any]

_MINUTE_US: Final = 60_000_000
_SWEEPS: Final = 2
_SAMPLE_SEED: Final = 1
_MASK: Final[dict[str, list[Any]]] = {"mask": ["session", "last-item"]}


@dataclass(frozen=True)
class Method:
    """A row of the table: how to build the ranker, and what to choose from.

    The search starts from the choice of ``base``, a method listed earlier, and from the first
    value of each other grid.
    """

    build: Callable[[SessionStore, int, Values], CountingRanker]
    grid: Mapping[str, list[Any]]
    base: str | None = None


def main() -> None:
    """Tune, test, print and store the rows of every asked case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real logs")
    parser.add_argument("--output", type=Path, default=Path("counting_rows"))
    parser.add_argument("--case", action="append", choices=CASES, help="default: every case")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: every method")
    parser.add_argument("--sample", type=int, default=2000, help="validation requests to choose on")
    arguments = parser.parse_args()
    for name in arguments.case or CASES:
        output = arguments.output / name
        output.mkdir(parents=True, exist_ok=True)
        methods = arguments.method or list(METHODS)
        chosen = _choose(
            load_case(arguments.data, name, "validation"), methods, arguments.sample, output
        )
        chosen = {method: chosen[method] for method in methods}
        _test(load_case(arguments.data, name, "test"), chosen, output)


def _choose(case: ProtocolCase, methods: list[str], sample: int, output: Path) -> dict[str, Values]:
    requests, weights = _sample(case.requests, sample)
    stored = output / "chosen.json"
    chosen: dict[str, Values] = read_json(stored) if stored.exists() else {}
    bases = [base for name in methods if (base := METHODS[name].base)]
    for name in METHODS:
        if name in chosen or name not in [*methods, *bases]:
            continue
        began = time.monotonic()
        method = METHODS[name]
        start = chosen[method.base] if method.base else {}
        values, mrr, tried = tune(method, case, requests, weights, start)
        chosen[name] = values
        write_json(stored, chosen)
        print(
            f"{case.name}: {name} reaches MRR {mrr:.4f} on validation, {tried} settings in "
            f"{time.monotonic() - began:.0f} s: {values}",
            flush=True,
        )
    return chosen


def _sample(requests: Requests, size: int) -> tuple[Requests, NDArray[np.float64]]:
    """Return at most ``size`` requests, a quarter of them first items, and each one's weight."""
    rng = np.random.default_rng(_SAMPLE_SEED)
    first = requests.position == 0
    chosen, weights = [], []
    for group, share in ((first, 0.25), (~first, 0.75)):
        members = np.flatnonzero(group)
        drawn = rng.permutation(members)[: int(share * size)]
        chosen.append(drawn)
        weights.append(np.full(len(drawn), len(members) / (len(requests) * max(len(drawn), 1))))
    order = np.argsort(np.concatenate(chosen))
    return requests.take(np.concatenate(chosen)[order]), np.concatenate(weights)[order]


def tune(
    method: Method,
    case: ProtocolCase,
    requests: Requests,
    weights: NDArray[np.float64],
    start: Values,
) -> tuple[Values, float, int]:
    """Return the values with the highest MRR, that MRR, and how many settings were tried.

    Args:
        method: what to choose from.
        case: of the validation phase.
        requests: of the case.
        weights: float64 ``[n]``, of each request in the MRR; they add up to 1.
        start: values to start from.
    """
    seen: dict[str, float] = {}

    def mrr(values: Values) -> float:
        key = repr(values)
        if key not in seen:
            ranker = method.build(case.store, case.items, values).fit(case.fit)
            ranks = rank(ranker, case, cast(Mask, values["mask"]), requests)
            seen[key] = float(weights @ np.where(ranks == MISS, 0.0, 1.0 / ranks))
        return seen[key]

    best = {**{field: values[0] for field, values in method.grid.items()}, **start}
    for _ in range(_SWEEPS):
        before = dict(best)
        for field, values in method.grid.items():
            # max keeps the first of equals: the value held so far.
            others = [value for value in values if value != best[field]]
            tries = [{**best, field: value} for value in [best[field], *others]]
            best = max(tries, key=mrr)
        if best == before:
            break
    return best, mrr(best), len(seen)


def _test(case: ProtocolCase, chosen: dict[str, Values], output: Path) -> None:
    print(f"\n**{case.name}** ({len(case.requests):,} test events, {case.items:,} items)")
    print(
        "| method | ALL R@20 | ALL MRR | FIRST R@20 | FIRST MRR | LATER R@20 | LATER MRR | "
        "ms alone | ms of 256 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    stored = output / "rows.json"
    rows: dict[str, Any] = read_json(stored)["rows"] if stored.exists() else {}
    for name, values in chosen.items():
        ranks_file = output / f"{_file_name(name)}.npy"
        if rows.get(name, {}).get("values") != values or not ranks_file.exists():
            rows[name] = _row(METHODS[name], name, values, case, ranks_file)
            write_json(stored, {"case": case.name, "rows": rows})
        print(_line(name, rows[name]), flush=True)


def _row(
    method: Method, name: str, values: Values, case: ProtocolCase, ranks_file: Path
) -> dict[str, Any]:
    ranker = method.build(case.store, case.items, values)
    began = time.monotonic()
    ranker.fit(case.fit)
    fitted = time.monotonic()
    ranks = rank(ranker, case, cast(Mask, values["mask"]))
    ranked = time.monotonic()
    np.save(ranks_file, ranks)
    bounds = intervals({name: ranks}, case)
    return {
        "values": values,
        "metrics": metrics(ranks, case),
        "mrr_intervals": {group: of_method[name] for group, of_method in bounds.items()},
        "fit_seconds": fitted - began,
        "rank_seconds": ranked - fitted,
        "score_ms_alone": _score_ms(ranker, case, 1),
        "score_ms_batched": _score_ms(ranker, case, 256),
    }


def _score_ms(ranker: CountingRanker, case: ProtocolCase, together: int) -> float:
    """Return CPU milliseconds a request over a fixed sample, ``together`` requests a call."""
    rng = np.random.default_rng(_SAMPLE_SEED)
    count = min(2048 if together > 1 else 512, len(case.requests))
    asked = case.requests.take(rng.choice(len(case.requests), count, replace=False))
    began = time.process_time()
    for requests in asked.slices(together):
        ranker.score(requests, None)
    return 1000 * (time.process_time() - began) / count


def _line(name: str, row: Values) -> str:
    label = name + (", xs" if row["values"]["mask"] == "session" else "")
    cells = [label]
    for group in ("ALL", "FIRST", "LATER"):
        figures = row["metrics"][group]
        low, high = row["mrr_intervals"][group]
        cells += [f"{figures['recall@20']:.3f}", f"{figures['mrr']:.4f} [{low:.4f}, {high:.4f}]"]
    cells += [f"{row['score_ms_alone']:.2f}", f"{row['score_ms_batched']:.2f}"]
    return f"| {' | '.join(cells)} |"


def _file_name(method: str) -> str:
    return method.replace(" + ", "-").replace(" ", "-").lower()


def _neighbourhood(values: Values) -> Neighbourhood:
    fields = ("k", "sample", "last", "extend")
    return Neighbourhood(**{field: values[field] for field in fields if field in values})


def _reminder(values: Values) -> Reminder | None:
    if "reminder_weight" not in values:
        return None
    return Reminder(
        weight=values["reminder_weight"],
        first_weight=values["reminder_first_weight"],
        boost=values["reminder_boost"],
        decay=values["reminder_decay"],
    )


def _own(values: Values, *fields: str) -> Values:
    """Return the values that are a ranker's own keyword arguments."""
    return {field: values[field] for field in fields}


def _markov(store: SessionStore, items: int, values: Values) -> Markov:
    own = _own(values, "steps", "step_decay", "last", "decay", "across")
    return Markov(store, items, **own, reminder=_reminder(values))


def _item_knn(store: SessionStore, items: int, values: Values) -> ItemKNN:
    own = _own(values, "shrinkage", "alpha", "last", "decay", "lag_decay")
    return ItemKNN(store, items, **own, reminder=_reminder(values))


def _vsknn(store: SessionStore, items: int, values: Values) -> VSKNN:
    own = _own(values, "weighting", "weighting_score", "cosine", "idf")
    near = _neighbourhood({**values, "last": values["items"]})
    return VSKNN(store, items, **own, neighbourhood=near, reminder=_reminder(values))


def _stan(store: SessionStore, items: int, values: Values) -> STAN:
    own = _own(values, "position", "recency_days", "closeness")
    near = _neighbourhood(values)
    return STAN(store, items, **own, neighbourhood=near, reminder=_reminder(values))


def _vstan(store: SessionStore, items: int, values: Values) -> VSTAN:
    own = _own(values, "position", "recency_days", "closeness", "found_by", "idf")
    near = _neighbourhood(values)
    return VSTAN(store, items, **own, neighbourhood=near, reminder=_reminder(values))


_RECENT: Final = (
    ("15 min", 15),
    ("1 h", 60),
    ("6 h", 360),
    ("24 h", 1440),
    ("30 days", 43200),
)
_REMINDER: Final[dict[str, list[Any]]] = {
    "reminder_weight": [0.05, 0.0, 0.02, 0.1, 0.2, 0.4],
    "reminder_first_weight": [0.5, 0.0, 0.1, 0.2, 1.0, 2.0, 5.0],
    "reminder_boost": [0.5, 0.0, 0.25, 1.0, 2.0],
    "reminder_decay": [0.999, 1.0, 0.9995, 0.998, 0.995, 0.99, 0.97],
}
_MARKOV: Final[dict[str, list[Any]]] = {
    **_MASK,
    "across": [True, False],
    "decay": [0.4, 0.05, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8],
    "steps": [5, 1, 2, 3, 10, 20],
    "step_decay": [0.5, 0.3, 0.7, 0.9],
    "last": [10, 3, 5, 20],
}
_ITEM_KNN: Final[dict[str, list[Any]]] = {
    **_MASK,
    "decay": [0.4, 0.1, 0.2, 0.3, 0.5, 0.6, 0.8],
    "lag_decay": [0.7, 0.3, 0.5, 0.8, 0.9, 1.0],
    "alpha": [0.75, 0.5, 0.9, 1.0],
    "shrinkage": [5.0, 0.0, 2.0, 20.0],
    "last": [10, 3, 5, 20],
}
_EXTEND: Final[dict[str, list[Any]]] = {"extend": [10, 1, 3, 5, 20, 40]}
_VSKNN: Final[dict[str, list[Any]]] = {
    **_MASK,
    "weighting": ["quadratic", "same", "linear", "div", "log"],
    "weighting_score": ["quadratic", "same", "linear", "div", "log"],
    "items": [None, 1, 2, 3, 5, 10, 20],
    # The method as published: a dot product, and no idf.
    "cosine": [False],
    "idf": [0.0],
    "k": [500, 100, 200, 1000],
    "sample": [2000, 500, 5000],
}
_VSKNN_EXTENDED: Final[dict[str, list[Any]]] = {
    **_EXTEND,
    "cosine": [False, True],
    "idf": [0.0, 1.0, 5.0],
    **_REMINDER,
}
_STAN: Final[dict[str, list[Any]]] = {
    **_MASK,
    "position": [1.02, 0.3, 0.5, 2.0, 4.0, 8.0],
    "closeness": [2.05, 0.3, 0.5, 1.0, 5.0, 10.0, None],
    "recency_days": [5.0, 0.1, 0.25, 1.0, 30.0, None],
    "k": [500, 1000],
    "sample": [2000, 5000],
}
_VSTAN: Final[dict[str, list[Any]]] = {
    "found_by": [1.02, 0.3, 0.5, 2.0, 5.0, 20.0],
    "idf": [0.0, 0.2, 1.0, 5.0],
    "closeness": _STAN["closeness"],
    "position": _STAN["position"],
}

METHODS: Final[dict[str, Method]] = {
    "popularity": Method(lambda store, items, _: Popularity(store, items), _MASK),
    **{
        f"recent popularity, {text}": Method(
            lambda store, items, _, minutes=minutes: Popularity(  # type: ignore[misc]
                store, items, window_us=minutes * _MINUTE_US
            ),
            _MASK,
        )
        for text, minutes in _RECENT
    },
    **{
        f"live popularity, {text}": Method(
            lambda store, items, _, minutes=minutes: LivePopularity(  # type: ignore[misc]
                store, items, window_us=minutes * _MINUTE_US
            ),
            _MASK,
        )
        for text, minutes in (("15 min", 15), ("1 h", 60), ("6 h", 360))
    },
    "personal popularity": Method(lambda store, items, _: PersonalPopularity(store, items), _MASK),
    "Markov, first order": Method(lambda store, items, _: Markov(store, items), _MASK),
    "Markov, decayed": Method(_markov, _MARKOV),
    "Markov, decayed + reminder": Method(_markov, _REMINDER, "Markov, decayed"),
    "item-kNN": Method(_item_knn, _ITEM_KNN),
    "item-kNN + reminder": Method(_item_knn, _REMINDER, "item-kNN"),
    "V-SKNN": Method(_vsknn, _VSKNN),
    "V-SKNN ext + reminder": Method(_vsknn, _VSKNN_EXTENDED, "V-SKNN"),
    "STAN": Method(_stan, _STAN),
    "STAN ext + reminder": Method(_stan, {**_EXTEND, **_REMINDER}, "STAN"),
    "VSTAN": Method(_vstan, _VSTAN, "STAN"),
    "VSTAN ext + reminder": Method(_vstan, {**_EXTEND, **_REMINDER}, "VSTAN"),
}


if __name__ == "__main__":
    main()
