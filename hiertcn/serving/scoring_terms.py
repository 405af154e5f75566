"""Memory and freshness terms at a request: the same features and gate that training had.

The memory features come from the user's record through ``hiertcn.sessions.memory``, the function
that training and evaluation call; the live ones from the release's live windows. A request needs
few items: the asked candidates, or, for the catalogue, those that have any feature at all, because
an item without one keeps its dot product. Live features of the catalogue are grown once a minute,
not once a request.

Cost of a request on one core, 20,000 items: 0.2 ms for 500 candidates, 0.4 ms for the catalogue.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.export.term_gate import TermGate
from hiertcn.serving.live_windows import LiveCountsAt
from hiertcn.sessions import live_counts, memory
from hiertcn.sessions.memory import Histories, MemoryFeatures
from hiertcn.sessions.request_features import context_of
from hiertcn.sessions.transitions import TransitionTable

_MOST_SUPPORT: Final = 4096


@dataclass(frozen=True)
class Support:
    """What the terms add to a catalogue: ``added [n]`` to distinct ``rows`` int64 ``[n]``."""

    rows: NDArray[np.int64]
    added: NDArray[np.float32]


class ScoringTerms:
    """The terms of one release. Not thread-safe: one thread at a time asks.

    Args:
        gate: the learned part.
        transitions: the table of the release.
    """

    def __init__(self, gate: TermGate, transitions: TransitionTable) -> None:
        self._gate = gate
        self._memory = MemoryFeatures(transitions)
        self._of_memory = _Chosen.among(gate, memory.FEATURES)
        self._of_live = _Chosen.among(gate, live_counts.FEATURES)
        self._grown: tuple[int, NDArray[np.float32]] | None = None
        self._grown_all: tuple[int, NDArray[np.float32]] | None = None

    @classmethod
    def open(cls, gate: Path, transitions: Path, *, dim: int, items: int) -> Self:
        """Attach a release's terms.

        Args:
            gate: the file of the gate.
            transitions: the folder of the table.
            dim: length of an item vector.
            items: length of the catalogue.

        Raises:
            InputError: a file is missing or damaged, or the table is of another catalogue.
        """
        table = TransitionTable.open(transitions)
        if len(table) != items:
            raise InputError(
                f"{transitions} has the followers of {len(table)} items but the release has "
                f"{items}; publish the parts of one run"
            )
        return cls(TermGate.open(gate, dim), table)

    @property
    def names(self) -> tuple[str, ...]:
        """The features that are scored."""
        return self._gate.names

    def at(
        self, u: NDArray[np.float32], histories: Histories, live: LiveCountsAt
    ) -> "RequestTerms":
        """The terms of one request.

        Args:
            u: float32 ``[dim]``, the user embedding.
            histories: the user's, one of them.
            live: the windows at the request's time.
        """
        weights = self._gate.weights(u, context_of(histories)[0])
        return RequestTerms(self, weights, histories, live)

    def warm(self, live: LiveCountsAt) -> None:
        """Compile and fault in everything, so that no request does."""
        u = np.zeros(self._gate.dim, np.float32)
        histories = one_history(np.zeros(2, np.int32), np.array([0, 1]), running=1, gap_us=0)
        terms = self.at(u, histories, live)
        terms.of_items(np.zeros(1, np.int64))
        terms.support(1)
        terms.add_to_all(np.zeros(self._memory.items, np.float32))

    def memory_of(
        self, histories: Histories, rows: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """What the memory terms add to ``rows [n]``, float32 ``[n]``."""
        if not len(self._of_memory.terms):
            return np.zeros(len(rows), np.float32)
        return self._of_memory.added(self._memory.of_items(histories, rows)[:, 0], weights)

    def memory_support(self, histories: Histories) -> NDArray[np.int64]:
        """Rows of all items with any memory feature."""
        if not len(self._of_memory.terms):
            return np.empty(0, np.int64)
        found = self._memory.support(histories, _MOST_SUPPORT)[0]
        rows: NDArray[np.int64] = found[found >= 0]
        return rows

    def live_of(
        self, live: LiveCountsAt, rows: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """What the live terms add to ``rows [n]``, float32 ``[n]``."""
        return self._of_live.added(live.counts[:, rows], weights)

    def live_of_catalogue(
        self, live: LiveCountsAt, weights: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """What the live terms add to ``live.rows``, float32 of their shape."""
        if self._grown is None or self._grown[0] != live.version:
            self._grown = (live.version, self._of_live.grown(live.counts[:, live.rows]))
        added: NDArray[np.float32] = weights[self._of_live.terms] @ self._grown[1]
        return added

    def live_of_all(self, live: LiveCountsAt, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the live terms add to every item, float32 ``[items]``."""
        if self._grown_all is None or self._grown_all[0] != live.version:
            self._grown_all = (live.version, self._of_live.grown(live.counts))
        added: NDArray[np.float32] = weights[self._of_live.terms] @ self._grown_all[1]
        return added

    @property
    def uses_live(self) -> bool:
        """Whether any term is a live one."""
        return bool(len(self._of_live.terms))


class RequestTerms:
    """What the terms add to items at one request; made by :meth:`ScoringTerms.at`."""

    def __init__(
        self,
        terms: ScoringTerms,
        weights: NDArray[np.float32],
        histories: Histories,
        live: LiveCountsAt,
    ) -> None:
        self._terms, self._weights = terms, weights
        self._histories, self._live = histories, live

    def of_items(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """What is added to the items ``rows [n]``, float32 ``[n]``."""
        added = self._terms.memory_of(self._histories, rows, self._weights)
        if self._terms.uses_live:
            added += self._terms.live_of(self._live, rows, self._weights)
        return added

    def add_to_all(self, scores: NDArray[np.float32]) -> None:
        """Add to the scores ``[items]`` of a small catalogue, in place."""
        rows = self._terms.memory_support(self._histories)
        scores[rows] += self._terms.memory_of(self._histories, rows, self._weights)
        if self._terms.uses_live:
            scores += self._terms.live_of_all(self._live, self._weights)

    def support(self, most_live: int) -> Support:
        """The items that anything is added to.

        Args:
            most_live: of the items that only live terms speak for, keep those that gain most.
        """
        rows = self._terms.memory_support(self._histories)
        if not self._terms.uses_live:
            return Support(rows, self._terms.memory_of(self._histories, rows, self._weights))
        live_rows = self._live.rows
        live_added = self._terms.live_of_catalogue(self._live, self._weights)
        if len(live_rows) > most_live:
            best = np.argpartition(-live_added, most_live)[:most_live]
            live_rows, live_added = live_rows[best], live_added[best]
        only_live = ~np.isin(live_rows, rows)
        return Support(
            np.concatenate([rows, live_rows[only_live]]),
            np.concatenate([self.of_items(rows), live_added[only_live]]),
        )


@dataclass(frozen=True)
class _Chosen:
    """The gate's terms among some features: their places there and in the gate."""

    places: NDArray[np.int64]
    terms: NDArray[np.int64]
    scale: NDArray[np.float32]

    @classmethod
    def among(cls, gate: TermGate, features: tuple[str, ...]) -> Self:
        names = [name for name in gate.names if name in features]
        terms = np.array([gate.names.index(name) for name in names], np.int64)
        places = np.array([features.index(name) for name in names], np.int64)
        return cls(places, terms, gate.scale[terms][:, None])

    def grown(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(self.places) < len(features):
            features = features[self.places]
        grown: NDArray[np.float32] = np.log1p(self.scale * features)
        return grown

    def added(
        self, features: NDArray[np.float32], weights: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        added: NDArray[np.float32] = weights[self.terms] @ self.grown(features)
        return added


def one_history(
    rows: NDArray[np.int32], timestamps_us: NDArray[np.int64], *, running: int, gap_us: int
) -> Histories:
    """The history of one request, cut into sessions.

    Args:
        rows: int32 ``[n]``, oldest first.
        timestamps_us: int64 ``[n]``.
        running: how many of the last ones are the session still open.
        gap_us: idle time that closes a session.
    """
    begins = np.zeros(len(rows), np.int64)
    begins[1:] = np.diff(timestamps_us) > gap_us
    running = min(running, len(rows))
    if 0 < running < len(rows):
        begins[len(rows) - running] = 1
    return Histories(
        rows=np.ascontiguousarray(rows, np.int32),
        sessions=np.cumsum(begins),
        offsets=np.array([0, len(rows)], np.int64),
        running=np.array([running], np.int64),
    )
