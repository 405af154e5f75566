"""Ranks for requests whose user embeddings are known, and gives the answers.

Listed candidates are scored and ordered together, one pass for all requests. The catalogue is
searched for each request by itself: on the event loop's thread where it is small, on a thread of
its own otherwise.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.ranking.candidate_ranking import rank_together, without_terms
from hiertcn.serving.ranking.item_filters import Allowed
from hiertcn.serving.ranking.listed import ListedCandidates, request_histories
from hiertcn.serving.ranking.ranking import (
    Ranked,
    rank_candidates_by_popularity,
    rank_catalogue,
    rank_catalogue_by_popularity,
    rank_scored,
    rank_searched,
)
from hiertcn.serving.ranking.requests import Recommendation, RecommendationRequest, fail
from hiertcn.serving.ranking.scoring_terms import RequestTerms
from hiertcn.serving.releases.serving_release import ServingRelease

SMALL_CATALOGUE: Final = 20_000
"""Items up to which a search runs on the event loop's thread."""

_MOST_LIVE: Final = 1000
"""Items of a large catalogue that are considered only because they are live."""


class Answers:
    """Answers requests.

    Args:
        metrics: where outcomes are counted.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._searcher = ThreadPoolExecutor(1, thread_name_prefix="search")

    async def passing(self, release: ServingRelease, filters: Sequence[AttributeFilter]) -> Allowed:
        """What passes the filters of a request.

        Raises:
            InputError: a filter does not fit the release's item attributes.
        """
        found = release.filters.kept(filters)
        if found is None and len(release.items) <= SMALL_CATALOGUE:
            found = release.filters.allowed(filters)
        elif found is None:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._searcher, release.filters.allowed, filters)
        return release.with_new_items(found, filters)

    def terms(self, release: ServingRelease, request: RecommendationRequest) -> RequestTerms | None:
        """The scoring terms of a request to the catalogue, None of a release without them.

        They share scratch memory with those of the next request.
        """
        if release.terms is None:
            return None
        histories = request_histories(release, [request])
        return release.terms.at(histories, release.live.at(request.timestamp_us))

    def give_listed(
        self,
        release: ServingRelease,
        listed: ListedCandidates,
        embeddings: NDArray[np.float32],
        *,
        fallback: bool,
    ) -> None:
        """Rank the listed candidates.

        Args:
            release: the release.
            listed: the candidates of ``n`` requests, which may be none.
            embeddings: float32 ``[n, dim]``, the users'.
            fallback: what the answers say of themselves.
        """
        if not listed.requests:
            return
        rows = listed.rows
        dots = release.table.dots(rows, np.ascontiguousarray(embeddings))
        weights = (
            without_terms(len(rows))
            if listed.terms is None
            else listed.terms.weights(release.live.at(listed.requests[0].timestamp_us))
        )
        counts = [request.k for request in listed.requests]
        places, scores, found = rank_together(dots, rows, counts, weights)
        best = [rows[place, places[place, :many]] for place, many in enumerate(found.tolist())]
        item_ids = release.items.ids(np.concatenate(best))
        at = 0
        for place, request in enumerate(listed.requests):
            many = len(best[place])
            self.give(
                release,
                request,
                item_ids[at : at + many],
                scores[place, :many].tolist(),
                fallback=fallback,
            )
            at += many

    async def give_searched(
        self,
        release: ServingRelease,
        request: RecommendationRequest,
        query: NDArray[np.float32],
        terms: RequestTerms | None,
        *,
        fallback: bool = False,
    ) -> None:
        """Rank the catalogue; an error is the request's answer.

        Args:
            release: the release.
            request: the request, what it excludes looked up.
            query: float32 ``[dim]``, the user's embedding.
            terms: the request's, None for the dot products alone.
            fallback: what the answer says of itself.
        """
        began = time.perf_counter()
        try:
            ranked = await self._search(release, request, query, terms)
            self._metrics.stages.ended("rank", began, [request.trace])
            item_ids = release.items.ids(ranked.places) if len(ranked.places) else []
            self.give(release, request, item_ids, ranked.scores.tolist(), fallback=fallback)
        except Exception as error:
            fail([request], error)

    def give_by_popularity(self, release: ServingRelease, request: RecommendationRequest) -> None:
        """Rank by what is live and popular, whoever asks."""
        k, now_us = request.k, request.timestamp_us
        if request.rows is not None:
            rows = request.rows[request.rows >= 0]
            ranked = rank_candidates_by_popularity(release, rows, k, now_us)
            best = rows[ranked.places]
        else:
            ranked = rank_catalogue_by_popularity(
                release, request.excluded, k, now_us, request.allowed
            )
            best = ranked.places
        item_ids = release.items.ids(best) if len(best) else []
        self.give(release, request, item_ids, ranked.scores.tolist(), fallback=True)

    def give(
        self,
        release: ServingRelease,
        request: RecommendationRequest,
        item_ids: list[str],
        scores: list[float],
        *,
        fallback: bool = False,
    ) -> None:
        """Answer with items and their scores, best first, unless the request has its answer."""
        if request.answer.done():
            return
        if request.unknown:
            self._metrics.unknown_items.labels("Recommend").inc(len(request.unknown))
        request.answer.set_result(
            Recommendation(
                release=release.number,
                item_ids=item_ids,
                scores=scores,
                unknown_items=list(request.unknown),
                fallback=fallback,
            )
        )

    def close(self) -> None:
        """End the search thread."""
        self._searcher.shutdown(wait=False)

    async def _search(
        self,
        release: ServingRelease,
        request: RecommendationRequest,
        query: NDArray[np.float32],
        terms: RequestTerms | None,
    ) -> Ranked:
        excluded, k, allowed = request.excluded, request.k, request.allowed
        is_small = len(release.items) <= SMALL_CATALOGUE
        search: Callable[..., Ranked] = rank_catalogue
        arguments: tuple[Any, ...] = (release, query, excluded, k)
        if terms is not None or allowed is not None:
            dots = release.neighbors.scores(query) if is_small else None
            if dots is not None:
                return rank_scored(dots, excluded, k, terms, allowed)
        if terms is not None:
            # The terms share scratch memory, so their part never leaves this thread.
            search, arguments = rank_searched, (*arguments, terms.support(_MOST_LIVE))
        if is_small:
            return search(*arguments, allowed)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._searcher, partial(search, *arguments, allowed))
