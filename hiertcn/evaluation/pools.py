"""The candidates that a target is ranked against: what was shown, a random sample, or everything.

Section 4.2.2: the pool is the impressions of the evaluated step (Pinterest) or all items (XING);
section 3.2 also names a random subset of all items. A pool is a set: an item shown twice counts
once. The target is always in it: a list of impressions without it is united with it, and such
requests are counted. Candidates come in the order of their item row, so their order tells a ranker
nothing about the target.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import MAX_REQUESTS_PER_CALL, Requests, SessionColumns

CandidateSource = str
"""``auto``, ``impressions``, ``catalogue``, or ``sample:N`` with N >= 1."""

SAMPLE_PREFIX: Final = "sample:"


@dataclass(frozen=True, kw_only=True)
class Pools:
    """The candidates of a slice of requests.

    Attributes:
        candidates: int32 [batch, widest], distinct item rows in ascending order, then -1.
        target_column: int64 [batch], where the target stands.
        size: int64 [batch], how many candidates each request has, at least 1.
        target_added: bool [batch], whether the target was not among what was shown.
    """

    candidates: NDArray[np.int32]
    target_column: NDArray[np.int64]
    size: NDArray[np.int64]
    target_added: NDArray[np.bool_]


def sample_size(source: CandidateSource) -> int | None:
    """Return the N of ``sample:N``; None for another source.

    Raises:
        InputError: what follows ``sample:`` is not a whole number of at least 1.
    """
    if not source.startswith(SAMPLE_PREFIX):
        return None
    size = source.removeprefix(SAMPLE_PREFIX)
    if not (size.isascii() and size.isdecimal() and int(size) >= 1):
        raise InputError(
            f"candidates is {source!r}; expected sample:N with a whole number N >= 1, such as "
            "sample:100"
        )
    return int(size)


def impression_counts(store: SessionColumns, requests: Requests) -> NDArray[np.int64]:
    """Return how many known items were logged as shown at each request: int64 [n]."""
    if store.impression_rows is None or store.impression_offsets is None:
        return np.zeros(len(requests), dtype=np.int64)
    offsets = store.impression_offsets
    return np.asarray(offsets[requests.interaction + 1] - offsets[requests.interaction])


def uses_impressions(
    store: SessionColumns, requests: Requests, source: CandidateSource
) -> NDArray[np.bool_]:
    """Return which requests are ranked against their impressions: bool [n].

    The others are ranked against the catalogue, or a sample of it.

    Args:
        store: the session store.
        requests: the requests.
        source: ``auto`` takes the impressions where they are known and the catalogue elsewhere.

    Raises:
        InputError: ``source`` is unknown, or is ``impressions`` where some request has none.
    """
    if source == "catalogue" or sample_size(source) is not None:
        return np.zeros(len(requests), dtype=np.bool_)
    shown = impression_counts(store, requests) > 0
    if source == "auto":
        return shown
    if source != "impressions":
        raise InputError(
            f"candidates is {source!r}; expected 'auto', 'impressions', 'catalogue' or 'sample:N'"
        )
    if not shown.all():
        raise InputError(
            f"{len(shown) - int(shown.sum())} of {len(shown)} requests have no impressions in the "
            "session store; use candidates='auto' or 'catalogue'"
        )
    return shown


def impression_pools(store: SessionColumns, requests: Requests) -> Pools:
    """Return each request's impressions united with its target.

    Raises:
        InputError: the store has no impressions.
    """
    if store.impression_rows is None or store.impression_offsets is None:
        raise InputError(
            "the session store has no impressions to take candidates from; use "
            "candidates='catalogue'"
        )
    count = len(requests)
    shown = impression_counts(store, requests)
    begin = np.asarray(store.impression_offsets[requests.interaction])
    owner = np.repeat(np.arange(count, dtype=np.int64), shown)
    place = np.arange(int(shown.sum()), dtype=np.int64) - np.repeat(np.cumsum(shown) - shown, shown)
    rows = np.asarray(store.impression_rows[np.repeat(begin, shown) + place], dtype=np.int64)
    owner, rows = owner[rows >= 0], rows[rows >= 0]
    target_shown = np.zeros(count, dtype=np.bool_)
    target_shown[owner[rows == requests.target_row[owner]]] = True

    owner = np.concatenate([owner, np.arange(count, dtype=np.int64)])
    rows = np.concatenate([rows, requests.target_row.astype(np.int64)])
    # One sort both orders the candidates and drops repeats; rows fit into 32 bits.
    keys = np.unique((owner << 32) | rows)
    owner, rows = keys >> 32, keys & 0xFFFFFFFF

    size = np.bincount(owner, minlength=count).astype(np.int64)
    column = np.arange(len(keys), dtype=np.int64) - np.repeat(np.cumsum(size) - size, size)
    candidates = np.full((count, int(size.max(initial=1))), -1, dtype=np.int32)
    candidates[owner, column] = rows
    target_column = column[rows == requests.target_row[owner]]
    return Pools(
        candidates=candidates, target_column=target_column, size=size, target_added=~target_shown
    )


def sampled_pools(requests: Requests, items: int, size: int, seed: int) -> Pools:
    """Return each request's target with ``size`` other items, drawn uniformly without replacement.

    A request's sample depends on the seed and its interaction alone: not on the rankers, nor on
    which other requests are asked. Sampled metrics are comparable only with those of the same
    ``size`` and catalogue; they are larger than those over the catalogue, and may order rankers
    differently. The cost is some 20 us a request and 10 ns an item of the sample.

    Args:
        requests: the requests; every target is below ``items``.
        items: size of the catalogue.
        size: how many items beside the target.
        seed: seed of the draw.

    Raises:
        InputError: the catalogue has fewer than ``size`` items beside the target.
    """
    if size > items - 1:
        raise InputError(
            f"candidates is 'sample:{size}', but the catalogue of {items} items has only "
            f"{items - 1} beside a target; use a smaller sample or candidates='catalogue'"
        )
    candidates = np.empty((len(requests), size + 1), dtype=np.int32)
    for row, interaction in enumerate(requests.interaction.tolist()):
        rng = np.random.default_rng((seed, interaction))
        candidates[row, 1:] = rng.choice(items - 1, size=size, replace=False, shuffle=False)
    target = requests.target_row[:, None]
    # The draw was over all items but the target: close the gap that it leaves.
    candidates[:, 1:] += candidates[:, 1:] >= target
    candidates[:, :1] = target
    candidates.sort(axis=1)
    return Pools(
        candidates=candidates,
        target_column=np.argmax(candidates == target, axis=1).astype(np.int64),
        size=np.full(len(requests), size + 1, dtype=np.int64),
        target_added=np.zeros(len(requests), dtype=np.bool_),
    )


def slices_within(width: NDArray[np.int64], budget: int) -> Iterator[slice]:
    """Yield consecutive slices of at most 512 requests and about ``budget`` scores.

    Args:
        width: int64 [n], the number of candidates of each request.
        budget: the most scores in one slice; a single request may exceed it.
    """
    start = 0
    while start < len(width):
        size = MAX_REQUESTS_PER_CALL
        while size > 1 and size * int(width[start : start + size].max()) > budget:
            size //= 2
        yield slice(start, min(start + size, len(width)))
        start += size
