"""Measure a row of the item-to-item benchmark: choose on validation, ask the test cut once.

What was measured is kept as JSON with its ranks, so a run that was stopped, or asked for more rows,
continues where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.item_embeddings_data import Phase, RetrievalCase
from benchmarks.item_embeddings_methods import Method, Options, Prior, Scores, priors
from hiertcn.evaluation.bootstrap import resampled_means
from hiertcn.files import read_json, write_json

CUTOFFS: Final = (1, 10, 50, 100)
COLUMNS: Final = (*(f"hit rate@{k}" for k in CUTOFFS), "MRR")

_QUERIES_PER_SLICE: Final = 512
_INTERVAL: Final = (0.025, 0.975)

Cases = Callable[[Phase], RetrievalCase]
"""Loads a cut when it is needed."""


@dataclass(frozen=True, kw_only=True)
class RowRanks:
    """A measured row.

    Attributes:
        ranks: int64 [n], of the answers to the test questions, from 1.
        plain_ranks: the same without the popularity prior.
        facts: what was chosen and what it took.
    """

    ranks: NDArray[np.int64]
    plain_ranks: NDArray[np.int64]
    facts: Mapping[str, Any]


def answer_ranks(
    scores: Scores, case: RetrievalCase, prior: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return each answer's rank among all items but the query; a tie never helps. int64 [n].

    Args:
        scores: of the method.
        case: the questions.
        prior: float32 [items], added to every query's scores.
    """
    ranks = np.empty(len(case.queries), np.int64)
    for start in range(0, len(ranks), _QUERIES_PER_SLICE):
        part = slice(start, start + _QUERIES_PER_SLICE)
        queries, answers = case.queries[part], case.answers[part]
        found = scores(queries) + prior
        here = np.arange(len(queries))
        found[here, queries] = -np.inf
        ranks[part] = (found >= found[here, answers][:, None]).sum(axis=1)
    return ranks


def metric_values(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what `COLUMNS` are means of, float64 [n, 5]."""
    return np.column_stack([*(ranks <= k for k in CUTOFFS), 1.0 / ranks]).astype(np.float64)


def intervals(
    values: NDArray[np.float64], queries: NDArray[np.int64], seed: int = 0
) -> NDArray[np.float64]:
    """Return the 95% bootstrap intervals of the columns' means, float64 [2, columns].

    Questions with one query are alike, so queries are drawn, each with all its questions.
    """
    means = resampled_means(values, queries, seed=seed)
    bounds: NDArray[np.float64] = np.quantile(means, _INTERVAL, axis=0)
    return bounds


def measure(name: str, method: Method, cases: Cases, output: Path) -> RowRanks:
    """Return a row's ranks, from the folder ``output`` if they were measured there before."""
    test = cases("test")
    slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    options = [dict(choice) for choice in method.options(test.name)]
    described = [name, options, list(method.prior_weights), len(test.queries), test.first_date]
    identity = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]
    folder = output / f"{test.name}-{slug}-{identity}"
    if not (folder / "row.json").exists():
        _measure(method, options, cases, folder)
    return RowRanks(
        ranks=np.load(folder / "ranks.npy"),
        plain_ranks=np.load(folder / "plain_ranks.npy"),
        facts=read_json(folder / "row.json"),
    )


def _measure(method: Method, options: list[dict[str, Any]], cases: Cases, folder: Path) -> None:
    test = cases("test")
    chosen, prior, tried = options[0], Prior(weight=0.0, half_life_days=1.0), []
    best = -1.0
    if len(options) > 1 or len(priors(method, test.name)) > 1:
        validation = cases("validation")
        for number, choice in enumerate(options):
            scores = _built(method, validation, choice, folder / f"validation-{number}")
            for candidate in priors(method, test.name):
                ranks = answer_ranks(scores, validation, candidate.of_items(validation))
                mrr = float((1.0 / ranks).mean())
                tried.append({"options": choice, "prior": asdict(candidate), "mrr": mrr})
                if mrr > best:
                    best, chosen, prior = mrr, choice, candidate
    started, busy = time.perf_counter(), time.process_time()
    scores = _built(method, test, chosen, folder / "test")
    facts = {
        "options": chosen,
        "prior": asdict(prior),
        "validation": tried,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
    }
    plain = answer_ranks(scores, test, np.zeros(len(test.index), np.float32))
    np.save(folder / "ranks.npy", answer_ranks(scores, test, prior.of_items(test)))
    np.save(folder / "plain_ranks.npy", plain)
    write_json(folder / "row.json", facts)


def _built(method: Method, case: RetrievalCase, options: Options, folder: Path) -> Scores:
    folder.mkdir(parents=True, exist_ok=True)
    return method.build(case, options, folder)
