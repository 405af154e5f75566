"""Scores and orders the candidates of many requests in one compiled pass.

A score is the dot product in float32 (HierTCN Eq. 12), mixed with the memory and freshness terms
where the release has them (models/scoring_terms.py). Equal scores keep the candidates' order. A
request's result does not depend on which others it is ranked with. Runs without the GIL.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled


class TermWeights(NamedTuple):
    """The terms of ``n`` requests with up to ``c`` candidates; without, all axes but n are empty.

    Attributes:
        dot, log, session: float32 ``[n]``, see ``hiertcn.export.term_gate.Mixture``.
        memory: float32 ``[n, c]``, the candidates' memory features, weighted and summed.
        in_session: float32 ``[n, c]``, 1 for items of the running session.
        live: float32 ``[n, windows]``, weights of the live counts.
        counts: float32 ``[items, windows]``, the live counts.
    """

    dot: NDArray[np.float32]
    log: NDArray[np.float32]
    session: NDArray[np.float32]
    memory: NDArray[np.float32]
    in_session: NDArray[np.float32]
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
        in_session=nothing,
        live=nothing,
        counts=np.zeros((0, 0), np.float32),
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
def drop_repeats(rows: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
    """Set rows that repeat an earlier one of the same request to -1.

    Args:
        rows: int64 ``[total]``, those of one request after another.
        offsets: int64 ``[n + 1]``, where each request's begin.
    """
    size = 64
    for request in range(len(offsets) - 1):
        while size < 2 * (offsets[request + 1] - offsets[request]):
            size *= 2
    # Open addressing, at most half full.
    seen = np.empty(size, np.int64)
    for request in range(len(offsets) - 1):
        seen[:] = -1
        for place in range(offsets[request], offsets[request + 1]):
            row = rows[place]
            if row < 0:
                continue
            slot = row & (size - 1)
            while seen[slot] >= 0 and seen[slot] != row:
                slot = (slot + 1) & (size - 1)
            if seen[slot] == row:
                rows[place] = -1
            else:
                seen[slot] = row


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
    mine = np.empty(rows.shape[1], np.float32)
    for request in range(len(rows)):
        # Scored first: reads that do not wait for what was kept overlap.
        _score(request, dots[request], rows[request], weights, mine)
        held = 0
        for place in range(rows.shape[1]):
            if rows[request, place] < 0:
                continue
            score = mine[place]
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


@compiled
def _score(
    request: int,
    dots: NDArray[np.float32],
    rows: NDArray[np.int64],
    weights: TermWeights,
    scores: NDArray[np.float32],
) -> None:
    items, windows = weights.counts.shape
    has_memory = weights.memory.shape[1] > 0
    dot, log, session = weights.dot[request], weights.log[request], weights.session[request]
    for place in range(len(rows)):
        row = rows[place]
        score = dot * dots[place]
        mixed = weights.memory[request, place] if has_memory else np.float32(0.0)
        # Items newer than the counts have none.
        if 0 <= row < items:
            for window in range(windows):
                mixed += weights.live[request, window] * weights.counts[row, window]
        if mixed > 0.0:
            score += log * np.log1p(mixed)
        if has_memory:
            score += session * weights.in_session[request, place]
        scores[place] = np.float32(-np.inf) if np.isnan(score) else score
