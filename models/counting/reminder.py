"""Reminders: what the user chose in earlier sessions is likely to be chosen again.

After the reminders of Jannach, Ludewig and Lerche, "Session-based item recommendation in
e-commerce: on short-term intents, reminders, trends and discounts", UMUAI 27, 2017, in the hybrid
form of Latifi, Mauro and Jannach, "Session-aware recommendation: a surprising quest for the
state-of-the-art", Information Sciences 573, 2021: scores and reminders are each brought to a
largest value of 1 and added with a weight chosen on validation.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.sessions.store import SessionStore
from models.counting.context import context


@dataclass(frozen=True, kw_only=True)
class Reminder:
    """Adds the user's own items of earlier sessions to a ranker's evidence.

    With base scores ``b`` and an item's reminder ``r = sum over its earlier interactions of
    decay ** age`` (age: interactions of the user since), both divided by their largest value, the
    mixed score is ``b * (1 + boost * [r > 0]) + weight * r``.

    Args:
        weight: of the reminder; 0 leaves only the boost of items that the base scored.
        first_weight: the weight at the first interaction of a session, where no running session
            says what it is about; None takes ``weight``.
        boost: relative gain of a base score for an item that the user had before.
        decay: in (0, 1]; 1 counts.

    Raises:
        InputError: a value is out of range.
    """

    weight: float = 0.1
    first_weight: float | None = None
    boost: float = 0.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise InputError(f"the reminder's decay is {self.decay}; expected it in (0, 1]")
        for field in ("weight", "first_weight", "boost"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < np.inf:
                raise InputError(f"the reminder's {field} is {value}; expected a number >= 0")

    def mix(
        self, evidence: NDArray[np.float32], store: SessionStore, requests: Requests
    ) -> NDArray[np.float32]:
        """Return the evidence float32 ``[batch, items]`` with the reminders added."""
        past = context(store, requests, evidence.shape[1])
        weights = np.exp(past.age * np.log(self.decay)) * past.earlier
        first = self.weight if self.first_weight is None else self.first_weight
        of_request = np.where(requests.position == 0, first, self.weight)
        mixed = np.array(evidence)
        _mix(mixed, past.offsets, past.rows, weights, of_request, self.boost)
        return mixed


@compiled
def _mix(
    evidence: Any, offsets: Any, rows: Any, weights: Any, of_request: Any, boost: float
) -> None:
    reminders = np.zeros(evidence.shape[1], np.float64)
    for request in range(len(offsets) - 1):
        scores = evidence[request]
        largest = scores.max()
        if largest > 0:
            scores /= largest
        largest = 0.0
        for entry in range(offsets[request], offsets[request + 1]):
            reminders[rows[entry]] += weights[entry]
            largest = max(largest, reminders[rows[entry]])
        for entry in range(offsets[request], offsets[request + 1]):
            row = rows[entry]
            if reminders[row] > 0:
                scores[row] = (
                    scores[row] * (1.0 + boost) + of_request[request] * reminders[row] / largest
                )
                reminders[row] = 0.0
