"""Scores and orders the candidates of many requests in one compiled pass.

A score is the dot product in float32 (HierTCN Eq. 12), mixed with the memory and freshness terms
where the release has them (models/scoring_terms.py). Equal scores keep the candidates' order. A
request's result does not depend on which others it is ranked with. Runs without the GIL.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiertcn.items.hashing import compiled


class TermWeights(NamedTuple):
    """The terms of ``n`` requests with up to ``c`` candidates; without, all axes but n are empty.

    Attributes:
        dot, log, session: float32 ``[n]``, see ``hiertcn.export.term_gate.Mixture``.
        memory: float32 ``[n, features]``, weights of the memory features.
        features: float32 ``[features, n, c]``, those of the candidates.
        session_feature: which of the features is that of the running session, -1 for none.
        live: float32 ``[n, windows]``, weights of the live counts.
        counts: float32 ``[windows, items]``, the live counts.
    """

    dot: NDArray[np.float32]
    log: NDArray[np.float32]
    session: NDArray[np.float32]
    memory: NDArray[np.float32]
    features: NDArray[np.float32]
    session_feature: int
    live: NDArray[np.float32]
    counts: NDArray[np.float32]


def without_terms(requests: int) -> TermWeights:
    """The weights of requests that are ranked by dot product alone."""
    nothing = np.zeros((requests, 0), np.float32)
    return TermWeights(
        dot=np.ones(requests, np.float32),
        log=np.zeros(requests, np.float32),
        session=np.zeros(requests, np.float32),
        memory=nothing,
        features=np.zeros((0, requests, 0), np.float32),
        session_feature=-1,
        live=nothing,
        counts=nothing.T,
    )


def padded(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The rows of each request as int64 ``[n, c]``, -1 behind the shorter ones."""
    together = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int64)
    for place, mine in enumerate(rows):
        together[place, : len(mine)] = mine
    return together


def rank_together(
    dots: NDArray[np.float32],
    rows: NDArray[np.int64],
    counts: Sequence[int],
    weights: TermWeights,
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return each request's best candidates, best first; NaN never wins.

    Args:
        dots: float32 ``[n, c]``, dot products; anything where ``rows`` is negative.
        rows: int64 ``[n, c]``, item rows; negative ones are passed over.
        counts: ``[n]``, how many each request wants.
        weights: the terms.

    Returns:
        places int64 ``[n, most]`` among the candidates, scores float32 ``[n, most]``, and how many
        of them there are, int64 ``[n]``; ``most`` is the largest count.
    """
    wanted = np.minimum(np.asarray(counts, np.int64), rows.shape[1])
    most = int(wanted.max(initial=0))
    places = np.empty((len(rows), most), np.int64)
    scores = np.empty((len(rows), most), np.float32)
    found = np.zeros(len(rows), np.int64)
    if most:
        _rank(dots, rows, wanted, weights, places, scores, found)
    return places, scores, found


@compiled
def drop_repeats(
    rows: NDArray[np.int64], offsets: NDArray[np.int64], stamps: NDArray[np.int64], stamp: int
) -> None:
    """Set rows that repeat an earlier one of the same request to -1.

    Args:
        rows: int64 ``[total]``, those of one request after another.
        offsets: int64 ``[n + 1]``, where each request's begin.
        stamps: int64 ``[items]``, scratch whose values are all below ``stamp``.
        stamp: the first of ``n`` numbers used to mark what was seen.
    """
    for request in range(len(offsets) - 1):
        mark = stamp + request
        for place in range(offsets[request], offsets[request + 1]):
            row = rows[place]
            if row >= 0:
                if stamps[row] == mark:
                    rows[place] = -1
                else:
                    stamps[row] = mark


@compiled
def _rank(
    dots: NDArray[np.float32],
    rows: NDArray[np.int64],
    wanted: NDArray[np.int64],
    weights: TermWeights,
    places: NDArray[np.int64],
    scores: NDArray[np.float32],
    found: NDArray[np.int64],
) -> None:
    features, windows = weights.features.shape[0], weights.counts.shape[0]
    for request in range(len(rows)):
        held = 0
        for place in range(rows.shape[1]):
            row = rows[request, place]
            if row < 0:
                continue
            score = weights.dot[request] * dots[request, place]
            if features + windows > 0:
                mixed = np.float32(0.0)
                for feature in range(features):
                    mixed += (
                        weights.memory[request, feature] * weights.features[feature, request, place]
                    )
                # Items newer than the counts have none.
                for window in range(windows if row < weights.counts.shape[1] else 0):
                    mixed += weights.live[request, window] * weights.counts[window, row]
                if mixed > 0.0:
                    score += weights.log[request] * np.log1p(mixed)
                if weights.session_feature >= 0:
                    score += (
                        weights.session[request]
                        * weights.features[weights.session_feature, request, place]
                    )
            if np.isnan(score):
                score = np.float32(-np.inf)
            # The best so far are kept in order: few of many candidates ever enter.
            at = held
            if held == wanted[request]:
                at -= 1
                if at < 0 or not score > scores[request, at]:
                    continue
            else:
                held += 1
            while at > 0 and scores[request, at - 1] < score:
                scores[request, at] = scores[request, at - 1]
                places[request, at] = places[request, at - 1]
                at -= 1
            scores[request, at] = score
            places[request, at] = place
        found[request] = held
