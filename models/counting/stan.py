"""STAN and VSTAN: session neighbours weighed by position and time.

STAN: Garg, Gupta, Malhotra, Vig and Shroff, "Sequence and time aware neighborhood for
session-based recommendations", SIGIR 2019. VSTAN: Ludewig, Mauro, Latifi and Jannach, "Empirical
analysis of session-based recommendation algorithms", UMUAI 31, 2021, which adds V-SKNN's weight of
the item that found the neighbour, and the idf.
"""

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.sessions.store import SessionStore
from models.counting.context import Context
from models.counting.neighbours import DAY_US, Neighbourhood, SessionNeighbours
from models.counting.reminder import Reminder


class STAN(SessionNeighbours):
    """Sequence and time aware neighbourhood.

    Args:
        store: the histories.
        items: number of item rows.
        neighbourhood: which sessions are asked.
        position: lambda_1, decay of a context item's weight with its age: ``exp(-age /
            position)``; interactions.
        recency_days: lambda_2, decay of a neighbour with the days since its end; None for none.
        closeness: lambda_3, decay of a neighbour's item with its distance to the last shared item;
            None for none.
        reminder: see `CountingRanker`.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self,
        store: SessionStore,
        items: int,
        *,
        neighbourhood: Neighbourhood | None = None,
        position: float = 1.02,
        recency_days: float | None = 5.0,
        closeness: float | None = 2.05,
        idf: float = 0.0,
        name: str = "STAN",
        reminder: Reminder | None = None,
    ) -> None:
        super().__init__(
            store,
            items,
            neighbourhood=neighbourhood or Neighbourhood(sample=5000),
            cosine=True,
            recency_us=None if recency_days is None else recency_days * DAY_US,
            closeness=closeness,
            idf=idf,
            name=name,
            reminder=reminder,
        )
        if not position > 0:
            raise InputError(f"{name}: position is {position}; expected it above 0")
        self._position = position

    def _similarity_weights(self, past: Context) -> NDArray[np.float64]:
        return _decayed(past, self._position)

    def _score_weights(self, past: Context) -> NDArray[np.float64]:
        return np.ones(len(past.rows))


class VSTAN(STAN):
    """STAN with the weight of the newest shared item, ``exp(-age / found_by)``, and the idf.

    Args:
        store: the histories.
        items: number of item rows.
        neighbourhood: which sessions are asked.
        position: see `STAN`.
        recency_days: see `STAN`.
        closeness: see `STAN`.
        found_by: lambda of the newest shared item's weight, interactions.
        idf: see `SessionNeighbours`.
        reminder: see `CountingRanker`.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self,
        store: SessionStore,
        items: int,
        *,
        neighbourhood: Neighbourhood | None = None,
        position: float = 1.02,
        recency_days: float | None = 5.0,
        closeness: float | None = 2.05,
        found_by: float = 1.02,
        idf: float = 5.0,
        name: str = "VSTAN",
        reminder: Reminder | None = None,
    ) -> None:
        super().__init__(
            store,
            items,
            neighbourhood=neighbourhood,
            position=position,
            recency_days=recency_days,
            closeness=closeness,
            idf=idf,
            name=name,
            reminder=reminder,
        )
        if not found_by > 0:
            raise InputError(f"{name}: found_by is {found_by}; expected it above 0")
        self._found_by_decay = found_by

    def _score_weights(self, past: Context) -> NDArray[np.float64]:
        return _decayed(past, self._found_by_decay)


def _decayed(past: Context, interactions: float) -> NDArray[np.float64]:
    # exp(-700) is about the smallest positive float; a weight of 0 would mean "not found".
    return np.exp(-np.minimum(past.age / interactions, 700.0))
