"""Markov chains over items: what followed the last items before.

First order with ``steps = last = 1``. With more, the sequential rules and their decay of Ludewig
and Jannach, "Evaluation of session-based recommendation algorithms", UMUAI 28, 2018, section 2.1,
and at request time a decayed sum over the last items.
"""

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.sessions.store import SessionStore
from models.counting.associations import Associations
from models.counting.context import context
from models.counting.ranker import CountingRanker
from models.counting.reminder import Reminder


class Markov(CountingRanker):
    """Scores ``sum over j of decay ** j * P(item | j-th last item)``.

    ``P(b | a)`` is the share of ``b`` among what followed ``a`` within ``steps`` interactions of
    one session, an interaction ``lag`` later counting ``step_decay ** (lag - 1)``.

    Args:
        store: the histories.
        items: number of item rows.
        steps: the farthest lag counted.
        step_decay: in (0, 1].
        last: how many of the user's last interactions are looked at, earlier sessions included.
        decay: in (0, 1].
        across: for interactions of earlier sessions, ask what followed them within ``steps`` in
            the user's later sessions, instead of in their own session.
        reminder: see `CountingRanker`.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self,
        store: SessionStore,
        items: int,
        *,
        steps: int = 1,
        step_decay: float = 1.0,
        last: int = 1,
        decay: float = 1.0,
        across: bool = False,
        name: str = "Markov",
        reminder: Reminder | None = None,
    ) -> None:
        super().__init__(store, items, name=name, reminder=reminder)
        for field, count in (("steps", steps), ("last", last)):
            if count < 1:
                raise InputError(f"Markov: {field} is {count}; expected at least 1")
        for field, share in (("step_decay", step_decay), ("decay", decay)):
            if not 0 < share <= 1:
                raise InputError(f"Markov: {field} is {share}; expected it in (0, 1]")
        self._steps, self._step_decay = steps, step_decay
        self._last, self._decay = last, decay
        self._across = across

    def _fit(self, training: SessionStore) -> None:
        lengths = np.diff(training.session_offsets)
        session_end = np.repeat(training.session_offsets[1:], lengths)
        begin = np.arange(1, len(training.item_rows) + 1, dtype=np.int64)
        end = begin + self._steps
        self._within = self._shares(training, begin, np.minimum(end, session_end))
        self._between = self._within
        if self._across:
            user_end = training.session_offsets[training.user_offsets[1:]]
            sessions_of_user = np.diff(training.user_offsets)
            user_end = np.repeat(np.repeat(user_end, sessions_of_user), lengths)
            self._between = self._shares(training, session_end, np.minimum(end, user_end))

    def _shares(
        self, training: SessionStore, low: NDArray[np.int64], high: NDArray[np.int64]
    ) -> Associations:
        decays = self._step_decay ** np.arange(self._steps, dtype=np.float64)
        counted = Associations.count(training.item_rows, low, high, decays, self._items)
        source = counted.sources()
        total = np.bincount(source, counted.weights, self._items)
        return counted.scaled(1.0 / total[source])

    def _evidence(self, requests: Requests) -> NDArray[np.float32]:
        past = context(self._store, requests, self._items, last=self._last, extend=self._last)
        weights = self._decay ** past.age.astype(np.float64)
        if not self._across:
            return self._within.gather(past, weights)
        found = self._within.gather(past, np.where(past.earlier, 0.0, weights))
        return found + self._between.gather(past, np.where(past.earlier, weights, 0.0))
