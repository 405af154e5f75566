"""Measure a row of the item-to-item benchmark: choose on validation, ask the test cut once.

What was measured is kept as JSON with its ranks, so a run that was stopped, or asked for more rows,
continues where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.item_embeddings_data import VALIDATION, Phase, RetrievalCase
from benchmarks.item_embeddings_methods import Method, Options, Scores, priors
from hiertcn.evaluation.bootstrap import resampled_means
from hiertcn.files import read_json, write_json

CUTOFFS: Final = (1, 10, 50, 100)
COLUMNS: Final = (*(f"hit rate@{k}" for k in CUTOFFS), "MRR")

_QUESTIONS_PER_SLICE: Final = 512
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
    scores: Scores, case: RetrievalCase, priors: Sequence[NDArray[np.float32]]
) -> NDArray[np.int64]:
    """Return each answer's rank among all items but the query; a tie never helps.

    Args:
        scores: of the method.
        case: the questions.
        priors: float32 [items] each, added to every query's scores.

    Returns:
        int64 [priors, n], from 1.
    """
    asked = np.stack([case.queries, case.answers], axis=1)
    distinct, question = np.unique(asked, axis=0, return_inverse=True)
    ranks = np.empty((len(priors), len(distinct)), np.int64)
    for start in range(0, len(distinct), _QUESTIONS_PER_SLICE):
        part = slice(start, start + _QUESTIONS_PER_SLICE)
        queries, place = np.unique(distinct[part, 0], return_inverse=True)
        answers = distinct[part, 1]
        plain = scores(queries)
        plain[np.arange(len(queries)), queries] = -np.inf
        for number, prior in enumerate(priors):
            found = (plain + prior)[place]
            of_answer = found[np.arange(len(answers)), answers]
            ranks[number, part] = (found >= of_answer[:, None]).sum(axis=1)
    return ranks[:, question.reshape(-1)]


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
    candidates = [asdict(prior) for prior in priors(method, test.name)]
    described = [name, options, candidates, VALIDATION, len(test.queries), test.first_date]
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
    candidates = priors(method, test.name)
    chosen, prior, tried = options[0], candidates[0], []
    if len(options) > 1 or len(candidates) > 1:
        for number, choice in enumerate(options):
            of_cuts = []
            for phase in VALIDATION:
                cut = cases(phase)
                scores = _built(method, cut, choice, folder / f"{phase}-{number}")
                ranks = answer_ranks(scores, cut, [one.of_items(cut) for one in candidates])
                of_cuts.append((1.0 / ranks).mean(axis=1))
            tried += [
                {"options": choice, "prior": asdict(candidate), "mrr": mrr.tolist()}
                for candidate, mrr in zip(candidates, np.stack(of_cuts, axis=1), strict=True)
            ]
        # Ties go to the first.
        best = int(np.argmax([np.mean(found["mrr"]) for found in tried]))
        chosen = options[best // len(candidates)]
        prior = candidates[best % len(candidates)]
    started, busy = time.perf_counter(), time.process_time()
    scores = _built(method, test, chosen, folder / "test")
    facts = {
        "options": chosen,
        "prior": asdict(prior),
        "validation": tried,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
    }
    none = np.zeros(len(test.index), np.float32)
    ranks, plain = answer_ranks(scores, test, [prior.of_items(test), none])
    np.save(folder / "ranks.npy", ranks)
    np.save(folder / "plain_ranks.npy", plain)
    write_json(folder / "row.json", facts)


def _built(method: Method, case: RetrievalCase, options: Options, folder: Path) -> Scores:
    folder.mkdir(parents=True, exist_ok=True)
    return method.build(case, options, folder)
