"""Hard negatives: what walks from a query visit, but far down the list (PinSage, section 3.3).

Items around a query are ranked by how often random walks with restart visit them, an estimate of
personalized PageRank; those in a middle range of ranks resemble the query and are not what it goes
with. PinSage takes ranks 2000 to 5000 of billions of pins; here these are the ranks in a catalog
of 100,000 items or more, and proportionally fewer in a smaller one. Where walks reach fewer items
than the range begins with, items drawn uniformly take their place, and never a neighbor or the
query itself.

An item's candidates are walked for when it is first asked about and kept, and they depend on the
seed and its row alone: a resumed training, or one on more threads, draws the same. Cost: four
steps a rank (about 1 ms an item at rank 5000), 4 bytes per item and candidate.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.graph.csr import CSR

RANKS: Final = (2_000, 5_000)

_CATALOG_OF_RANKS: Final = 100_000
_CANDIDATES: Final = 32
_STEPS_PER_RANK: Final = 4
_LENGTH: Final = 6
_RESTART: Final = 0.15
_QUERIES_PER_TASK: Final = 32


def check_ranks(ranks: tuple[int, int]) -> None:
    """Refuse what is no range of ranks.

    Raises:
        InputError: the ranks are not two ascending integers from 0.
    """
    if len(ranks) != 2 or not 0 <= ranks[0] < ranks[1]:
        raise InputError(
            f"hard_ranks is {ranks!r}; expected two ascending ranks, the first 0 or more"
        )


def scaled_ranks(ranks: tuple[int, int], items: int) -> tuple[int, int]:
    """Return the first rank (from 0) and the end of the range in a catalog of ``items``."""
    share = min(1.0, items / _CATALOG_OF_RANKS)
    low = int(ranks[0] * share)
    return low, max(int(ranks[1] * share), low + 1)


class HardNegatives:
    """Draws items of a middle walk rank.

    Args:
        csr: the graph that is trained on.
        ranks: first rank and end of the range in a catalog of 100,000 items; see the module.
        seed: of the walks.

    Raises:
        InputError: see :func:`check_ranks`.
    """

    def __init__(self, csr: CSR, *, ranks: tuple[int, int] = RANKS, seed: int = 0) -> None:
        check_ranks(ranks)
        self._csr, self._seed = csr, seed
        self._low, self._high = scaled_ranks(ranks, csr.items)
        self._cumulative = np.empty(len(csr.indices), np.float32)
        _cumulate(csr.indptr, csr.weights, self._cumulative)
        # Pages that no query touches take no memory.
        self._candidates = np.zeros((csr.items, _CANDIDATES), np.int32)
        self._is_walked = np.zeros(csr.items, np.bool_)

    def draw(
        self, rng: np.random.Generator, queries: NDArray[np.int64], count: int
    ) -> NDArray[np.int64]:
        """Return int64 [queries, count] item rows, drawn from each query's candidates."""
        self._walk(queries)
        chosen = rng.integers(0, _CANDIDATES, (len(queries), count))
        found: NDArray[np.int64] = self._candidates[queries[:, None], chosen].astype(np.int64)
        return found

    def _walk(self, queries: NDArray[np.int64]) -> None:
        new = np.unique(queries)
        new = new[~self._is_walked[new]]
        if not len(new):
            return
        found = np.empty((len(new), _CANDIDATES), np.int32)

        def walk(first: int) -> None:
            part = slice(first, first + _QUERIES_PER_TASK)
            _rank_visits(
                self._csr.indptr,
                self._csr.indices,
                self._cumulative,
                new[part],
                self._low,
                self._high,
                self._seed & 0x7FFFFFFF,
                found[part],
            )

        # Threads of our own: numba's would set how many threads the OpenMP shared with torch uses.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(walk, range(0, len(new), _QUERIES_PER_TASK)))
        self._candidates[new], self._is_walked[new] = found, True


@compiled
def _cumulate(indptr: Any, weights: Any, cumulative: Any) -> None:
    """Shares of an item's weights up to and with each edge."""
    for row in range(len(indptr) - 1):
        total = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            total += weights[k]
        below = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            below += weights[k]
            cumulative[k] = below / total


@compiled
def _rank_visits(
    indptr: Any,
    indices: Any,
    cumulative: Any,
    queries: Any,
    low: int,
    high: int,
    seed: int,
    found: Any,
) -> None:
    items = len(indptr) - 1
    steps = _STEPS_PER_RANK * high + 200
    visited = np.empty(steps, np.int64)
    for place in range(len(queries)):
        query = queries[place]
        # One generator a query: what a query finds depends on nothing but seed and row.
        np.random.seed((seed * 1_000_003 + query * 7_919 + 1) & 0x7FFFFFFF)
        begin, end = indptr[query], indptr[query + 1]
        here, walked, count = query, 0, 0
        for _ in range(steps if end > begin else 0):
            if (
                walked == _LENGTH
                or indptr[here] == indptr[here + 1]
                or np.random.random() < _RESTART
            ):
                here, walked = query, 0
            choice = np.random.random()
            first, last = indptr[here], indptr[here + 1] - 1
            while first < last:
                middle = (first + last) >> 1
                if cumulative[middle] <= choice:
                    first = middle + 1
                else:
                    last = middle
            here = np.int64(indices[first])
            walked += 1
            near = here == query
            for k in range(begin, end):
                near |= indices[k] == here
            if not near:
                visited[count] = here
                count += 1
        visits = np.sort(visited[:count])
        # By falling visits, then rising row.
        keys = np.empty(count, np.int64)
        runs, start = 0, 0
        for k in range(1, count + 1):
            if k == count or visits[k] != visits[start]:
                keys[runs] = (steps - (k - start)) * items + visits[start]
                runs, start = runs + 1, k
        ranked = np.sort(keys[:runs])
        stop = min(high, runs)
        for k in range(found.shape[1]):
            if low < stop:
                found[place, k] = ranked[low + np.random.randint(stop - low)] % items
                continue
            while True:
                drawn = np.random.randint(items)
                near = drawn == query
                for edge in range(begin, end):
                    near |= indices[edge] == drawn
                if not near or end - begin + 1 >= items:
                    found[place, k] = drawn
                    break
