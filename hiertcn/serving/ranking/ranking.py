"""Scores and orders the catalogue for a query vector, and anything by popularity.

Scores are dot products in float32 (HierTCN Eq. 12). Equal scores keep the index's order. Given
candidates are ranked by ``candidate_ranking.py``.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiertcn.serving.ranking.item_filters import Allowed
from hiertcn.serving.ranking.scoring_terms import RequestTerms, Support
from hiertcn.serving.releases.serving_release import ServingRelease


class Ranked(NamedTuple):
    """Best first: ``places`` int64 ``[n]`` (item rows, or places among the candidates), scores."""

    places: NDArray[np.int64]
    scores: NDArray[np.float32]


def rank_catalogue(
    release: ServingRelease,
    query: NDArray[np.float32],
    excluded: NDArray[np.int64],
    k: int,
    allowed: Allowed | None = None,
) -> Ranked:
    """The ``k`` best for ``query [dim]`` of the catalogue, or of what is allowed of it.

    Items of ``excluded`` rows are left out.
    """
    found = _search(release, query, k + len(excluded), allowed)
    if found is None:
        return _nothing()
    found_rows, found_scores = found
    rows, scores = found_rows[0], found_scores[0]
    kept = rows >= 0
    if len(excluded):
        kept &= ~np.isin(rows, excluded)
    return Ranked(rows[kept][:k], scores[kept][:k])


def rank_candidates_by_popularity(
    release: ServingRelease, rows: NDArray[np.int64], k: int, timestamp_us: int
) -> Ranked:
    """Order candidates by ``ServingRelease.liveness``; ``places`` index ``rows``."""
    return top(release.liveness(rows, timestamp_us), k) if len(rows) else _nothing()


def rank_catalogue_by_popularity(
    release: ServingRelease,
    excluded: NDArray[np.int64],
    k: int,
    timestamp_us: int,
    allowed: Allowed | None = None,
) -> Ranked:
    """The ``k`` items of most ``ServingRelease.liveness`` of the catalogue or what is allowed."""
    popular = release.popular_rows[: k + len(excluded)]
    live = release.live.at(timestamp_us).rows
    rows = np.concatenate([popular, live[~np.isin(live, popular)]])
    if allowed is not None:
        rows = rows[allowed.passes(rows)]
        if len(rows) < k + len(excluded):
            # Too few of the popular ones pass, so all that pass are compared.
            rows = allowed.rows
    if len(excluded):
        rows = rows[~np.isin(rows, excluded)]
    found = top(release.liveness(rows, timestamp_us), k)
    return Ranked(rows[found.places], found.scores)


def top(scores: NDArray[np.float32], k: int) -> Ranked:
    """The places of the ``k`` highest scores, best first, ties by place; NaN never wins."""
    scores = np.where(np.isnan(scores), -np.inf, scores).astype(np.float32, copy=False)
    order = np.argsort(-scores, kind="stable")[:k]
    return Ranked(order, scores[order])


def rank_scored(
    dots: NDArray[np.float32],
    excluded: NDArray[np.int64],
    k: int,
    terms: RequestTerms | None,
    allowed: Allowed | None = None,
) -> Ranked:
    """The ``k`` best of a catalogue with dot products ``dots [items]`` outside ``excluded``."""
    scores = dots if terms is None else terms.of_all(dots)
    scores[excluded] = -np.inf
    if allowed is not None:
        scores[len(allowed.mask) :] = -np.inf
        scores[: len(allowed.mask)][~allowed.mask] = -np.inf
    if k < len(scores):
        rows = np.argpartition(-scores, k - 1)[:k]
        rows.sort()
    else:
        rows = np.arange(len(scores))
    best = top(scores[rows], k)
    kept = best.scores > -np.inf
    return Ranked(rows[best.places[kept]], best.scores[kept])


def rank_searched(
    release: ServingRelease,
    query: NDArray[np.float32],
    excluded: NDArray[np.int64],
    k: int,
    support: Support,
    allowed: Allowed | None = None,
) -> Ranked:
    """The catalogue's ``k`` best by dot product with ``query [dim]`` and terms, found by search.

    As exact as the search: an item that nothing is added to is among the best only if fewer than
    ``k`` others, and those of ``support`` and ``excluded``, are ahead of it by dot product.
    """
    if allowed is not None:
        passing = allowed.passes(support.rows)
        support = Support(support.rows[passing], support.added[passing], support.dot)
    found = _search(release, query, k + len(excluded) + len(support.rows), allowed)
    if found is None:
        return _nothing()
    found_rows, found_scores = found
    untouched = (found_rows[0] >= 0) & ~np.isin(found_rows[0], support.rows)
    rows = np.concatenate([found_rows[0][untouched], support.rows])
    dots = np.concatenate([found_scores[0][untouched], release.table.gather(support.rows) @ query])
    scores = support.dot * dots
    scores[len(dots) - len(support.rows) :] += support.added
    if len(excluded):
        kept = ~np.isin(rows, excluded)
        rows, scores = rows[kept], scores[kept]
    best = top(scores, k)
    return Ranked(rows[best.places], best.scores)


def _search(
    release: ServingRelease, query: NDArray[np.float32], wanted: int, allowed: Allowed | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    wanted = min(wanted, len(release.items) if allowed is None else allowed.count)
    if wanted == 0:
        return None
    among = None if allowed is None else allowed.mask
    return release.neighbors.search(query[None, :], wanted, among=among)


def _nothing() -> Ranked:
    return Ranked(np.empty(0, np.int64), np.empty(0, np.float32))
