"""The features and the context that the scoring terms of a request read, in one order.

Joins what counting remembers (memory.py) and what is live (live_counts.py), for interactions of a
session store. The sidecar builds the same arrays from a user's record and its live windows.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.sessions import live_counts, memory
from hiertcn.sessions.live_counts import LiveShares
from hiertcn.sessions.live_transitions import live_transitions
from hiertcn.sessions.memory import Histories, MemoryFeatures, histories_before
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import TransitionTable

FEATURES: Final = (*memory.FEATURES, *live_counts.FEATURES)
"""All features, in the order of every array of features."""

CONTEXT: Final = ("first_of_session", "history_length", "position", "has_past")
"""What the gate knows of a request besides the user embedding."""


@dataclass(frozen=True)
class SparseFeatures:
    """The items that have any feature above zero.

    ``index`` int64 ``[k]``: ``request * items + item row``, increasing; ``values`` float32
    ``[terms, k]``.
    """

    index: NDArray[np.int64]
    values: NDArray[np.float32]


class RequestFeatures:
    """Features of items at interactions of a store.

    Args:
        names: the features to compute, from `FEATURES`, in that order.
        store: the histories, and the interactions that are live.
        transitions: which items follow which.

    Raises:
        InputError: the names are not features, or in another order.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        store: SessionStore,
        transitions: TransitionTable,
    ) -> None:
        if list(names) != [name for name in FEATURES if name in names]:
            raise InputError(
                f"the scoring terms are {list(names)}; expected some of {', '.join(FEATURES)}, in "
                "this order"
            )
        self.names = names
        self._store = store
        newest = live_transitions(store, len(transitions)) if "live_transitions" in names else None
        self._memory = MemoryFeatures(transitions, newest)
        self._live: LiveShares | None = None
        if any(name in live_counts.FEATURES for name in names):
            self._live = LiveShares(store, len(transitions))
        self._chosen = [FEATURES.index(name) for name in names]

    @property
    def items(self) -> int:
        """Length of the catalogue."""
        return self._memory.items

    def of_catalogue(
        self, session: NDArray[np.int64], interaction: NDArray[np.int64]
    ) -> tuple[SparseFeatures, NDArray[np.float32]]:
        """Return the features of all items, and the context float32 ``[n, context]``.

        Args:
            session: int64 ``[n]``, the session of each interaction.
            interaction: int64 ``[n]``, the interactions that are asked about.
        """
        histories = histories_before(self._store, session, interaction)
        parts = [self._memory.of_catalogue(histories)]
        if self._live is not None:
            parts.append(self._live.of_catalogue(self._store.timestamps_us[interaction]))
        return sparse(self._choose(parts)), context_of(histories)

    def of_items(
        self,
        session: NDArray[np.int64],
        interaction: NDArray[np.int64],
        rows: NDArray[np.integer[Any]],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the asked items' features ``[terms, n, count]`` and the context, float32.

        Args:
            session: int64 ``[n]``.
            interaction: int64 ``[n]``.
            rows: item rows, ``[n, count]`` or, asked at every interaction, ``[count]``; negative
                rows get zeros.
        """
        histories = histories_before(self._store, session, interaction)
        parts = [self._memory.of_items(histories, rows)]
        if self._live is not None:
            times_us = self._store.timestamps_us[interaction]
            parts.append(self._live.of_items(times_us, rows))
        return self._choose(parts), context_of(histories)

    def support(
        self, session: NDArray[np.int64], interaction: NDArray[np.int64], most: int
    ) -> NDArray[np.int64]:
        """Return up to ``most`` items that memory brings up, int64 ``[n, most]``, -1 if fewer."""
        return self._memory.support(histories_before(self._store, session, interaction), most)

    def _choose(self, parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        everything = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return everything if len(self._chosen) == len(everything) else everything[self._chosen]


def context_of(histories: Histories) -> NDArray[np.float32]:
    """Return what the gate knows of each request, float32 ``[n, context]``."""
    lengths = np.diff(histories.offsets)
    return np.stack(
        [
            histories.running == 0,
            np.log1p(lengths) / 5.0,
            np.log1p(histories.running) / 3.0,
            lengths > histories.running,
        ],
        axis=1,
    ).astype(np.float32)


def sparse(features: NDArray[np.float32]) -> SparseFeatures:
    """Keep the items of ``[terms, n, items]`` that have any feature."""
    flat = features.reshape(len(features), -1)
    index = _any_above_zero(flat)
    return SparseFeatures(index, np.ascontiguousarray(flat[:, index]))


@compiled
def _any_above_zero(flat: NDArray[np.float32]) -> NDArray[np.int64]:
    found = np.empty(flat.shape[1], np.int64)
    count = 0
    for place in range(flat.shape[1]):
        for feature in range(flat.shape[0]):
            if flat[feature, place] > 0.0:
                found[count] = place
                count += 1
                break
    return found[:count].copy()
