"""V-SKNN: neighbours of the running session by a recency-weighted overlap.

Ludewig and Jannach, "Evaluation of session-based recommendation algorithms", UMUAI 28, 2018,
section 2.3; weights as in the authors' framework session-rec. Extension by the user's earlier
items: Latifi, Mauro and Jannach, Information Sciences 573, 2021.
"""

from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.sessions.store import SessionStore
from models.counting.context import Context
from models.counting.neighbours import Neighbourhood, SessionNeighbours
from models.counting.reminder import Reminder

Decay = Literal["same", "linear", "div", "log", "quadratic"]

_LEAST: Final = 1e-9
"""Stands for a weight of 0: the neighbour stays a neighbour, behind all others."""


class VSKNN(SessionNeighbours):
    """Vector multiplication session-kNN.

    Args:
        store: the histories.
        items: number of item rows.
        neighbourhood: which sessions are asked.
        weighting: of the context item at place ``p`` of ``n`` in the similarity: 1 (``same``),
            ``1 - 0.1 (n - p)`` and at least 0 (``linear``), ``p / n`` (``div``),
            ``1 / log10(n - p + 1.7)`` (``log``), ``(p / n) ** 2`` (``quadratic``).
        weighting_score: of a neighbour's items, where ``s`` is how many places from the end the
            newest shared item stands, from 1: 1, ``1 - 0.1 s``, ``1 / s``, ``1 / log10(s + 1.7)``,
            ``1 / s ** 2``.
        cosine: divide the similarity by the root of the neighbour's number of items.
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
        weighting: Decay = "div",
        weighting_score: Decay = "div",
        cosine: bool = False,
        idf: float = 0.0,
        name: str = "V-SKNN",
        reminder: Reminder | None = None,
    ) -> None:
        super().__init__(
            store,
            items,
            neighbourhood=neighbourhood or Neighbourhood(),
            cosine=cosine,
            recency_us=None,
            closeness=None,
            idf=idf,
            name=name,
            reminder=reminder,
        )
        for field, decay in (("weighting", weighting), ("weighting_score", weighting_score)):
            if decay not in get_args(Decay):
                raise InputError(
                    f"V-SKNN: {field} is {decay!r}; expected one of {', '.join(get_args(Decay))}"
                )
        self._weighting: Decay = weighting
        self._weighting_score: Decay = weighting_score

    def _similarity_weights(self, past: Context) -> NDArray[np.float64]:
        share = 1.0 - past.age / past.length[past.owner()]
        return _weights(self._weighting, past.age.astype(np.float64), share)

    def _score_weights(self, past: Context) -> NDArray[np.float64]:
        step = (past.age + 1).astype(np.float64)
        return _weights(self._weighting_score, step, np.reciprocal(step))


def _weights(
    decay: Decay, back: NDArray[np.float64], share: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weights of items ``back`` places ago; ``share`` falls from 1 as that grows."""
    if decay == "same":
        return np.ones_like(back)
    if decay == "linear":
        return np.maximum(1.0 - 0.1 * back, _LEAST)
    if decay == "log":
        return 1.0 / np.log10(back + 1.7)
    return share if decay == "div" else np.square(share)
