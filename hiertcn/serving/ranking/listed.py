"""The candidates that the requests of a batch list: their rows, what is left out, their terms.

Nothing here changes anything: what was found is noted by whoever asked.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hiertcn.items.texts import Texts
from hiertcn.serving.ranking.candidate_ranking import drop_repeats, padded
from hiertcn.serving.ranking.requests import RecommendationRequest
from hiertcn.serving.ranking.scoring_terms import CandidateTerms, histories_of
from hiertcn.serving.records import fold
from hiertcn.serving.releases.serving_release import ServingRelease
from hiertcn.sessions.memory import Histories


@dataclass(frozen=True, slots=True)
class ListedCandidates:
    """The candidates of ``n`` requests.

    Attributes:
        requests: those that list candidates, their records read.
        rows: int64 ``[n, c]``, -1 behind the shorter lists and where one is not to be ranked.
        lengths: how many candidates each request lists.
        unknown: of each request, the listed and excluded items that the release does not know.
        terms: the scoring terms, None where there are none.
    """

    requests: list[RecommendationRequest]
    rows: NDArray[np.int64]
    lengths: list[int]
    unknown: list[dict[str, None]]
    terms: CandidateTerms | None

    @classmethod
    def of(
        cls,
        release: ServingRelease,
        requests: Sequence[RecommendationRequest],
        *,
        with_terms: bool = True,
    ) -> Self:
        """Look up the candidates of those requests that list any."""
        listed = [request for request in requests if request.candidates is not None]
        if not listed:
            return cls([], np.empty((0, 0), np.int64), [], [], None)
        found, unknown = _looked_up(release, [_given(request) for request in listed])
        for request, rows, names in zip(listed, found, unknown, strict=True):
            excluded = excluded_rows(release, request, names)
            if len(excluded):
                rows[np.isin(rows, excluded)] = -1
            if request.allowed is not None:
                # The row of an unknown item is -1, whatever the mask says of its last one.
                rows[~request.allowed.passes(rows)] = -1
        together = padded(found)
        terms = None
        if with_terms and release.terms is not None:
            # Requests that are answered together are of one minute.
            live = release.live.at(listed[0].timestamp_us)
            terms = release.terms.of_candidates(request_histories(release, listed), together, live)
        return cls(listed, together, [len(rows) for rows in found], unknown, terms)


def excluded_rows(
    release: ServingRelease, request: RecommendationRequest, unknown: dict[str, None]
) -> NDArray[np.int64]:
    """Rows that a request wants left out; excluded items without one are noted in ``unknown``."""
    excluded = np.empty(0, np.int64)
    if request.exclude:
        rows = release.item_rows(request.exclude)
        for item_id, row in zip(request.exclude, rows.tolist(), strict=True):
            if row < 0:
                unknown[item_id] = None
        excluded = rows[rows >= 0]
    if request.exclude_seen:
        excluded = np.union1d(excluded, fold.seen_rows(request.user))
    return excluded


def request_histories(
    release: ServingRelease, requests: Sequence[RecommendationRequest]
) -> Histories:
    """The histories of requests whose records are read, as the scoring terms take them."""
    found = [fold.history(request.user) for request in requests]
    return histories_of(
        [rows for rows, _ in found],
        [timestamps_us for _, timestamps_us in found],
        [len(request.cut.open_rows) for request in requests],
        gap_us=release.gap_us,
        asked_us=[request.timestamp_us for request in requests],
    )


def _looked_up(
    release: ServingRelease, lists: Sequence[Texts]
) -> tuple[list[NDArray[np.int64]], list[dict[str, None]]]:
    starts = list(accumulate(map(len, lists), initial=0))
    texts = Texts.joined(lists)
    rows = release.items.rows(texts)
    unknown: list[dict[str, None]] = [{} for _ in lists]
    for place in np.flatnonzero(rows < 0).tolist():
        unknown[bisect_right(starts, place) - 1][texts[place]] = None
    drop_repeats(rows, np.array(starts))
    return [rows[start:end] for start, end in pairwise(starts)], unknown


def _given(request: RecommendationRequest) -> Texts:
    assert request.candidates is not None
    return request.candidates
