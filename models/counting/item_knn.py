"""Item-kNN: items that share sessions with the last items of the user.

The cosine similarity of Sarwar, Karypis, Konstan and Riedl, "Item-based collaborative filtering
recommendation algorithms", WWW 2001, over sessions, regularised as the baseline of Hidasi,
Karatzoglou, Baltrunas and Tikk, "Session-based recommendations with recurrent neural networks",
ICLR 2016: ``sim(a, b) = |S_a and S_b| / ((|S_a| + shrinkage) ** alpha (|S_b| + shrinkage) **
(1 - alpha))``. There only the last item asks; here the last ones do, with a decay.
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
from models.counting.session_items import distinct_items


class ItemKNN(CountingRanker):
    """Scores ``sum over j of decay ** j * sim(j-th last item, item)``.

    Args:
        store: the histories.
        items: number of item rows.
        shrinkage: at least 0; discounts the similarity of rare items.
        alpha: in [0, 1]; 0.5 is the cosine, 1 the confidence of a rule.
        last: how many of the user's last interactions are looked at, earlier sessions included.
        decay: in (0, 1].
        lag_decay: in (0, 1]; two items of a session, ``lag`` distinct items apart, count
            ``lag_decay ** (lag - 1)`` instead of 1.
        reminder: see `CountingRanker`.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self,
        store: SessionStore,
        items: int,
        *,
        shrinkage: float = 20.0,
        alpha: float = 0.5,
        last: int = 10,
        decay: float = 0.8,
        lag_decay: float = 1.0,
        name: str = "item-kNN",
        reminder: Reminder | None = None,
    ) -> None:
        super().__init__(store, items, name=name, reminder=reminder)
        if not 0 <= shrinkage < np.inf:
            raise InputError(f"item-kNN: shrinkage is {shrinkage}; expected a number >= 0")
        if not 0 <= alpha <= 1:
            raise InputError(f"item-kNN: alpha is {alpha}; expected it in [0, 1]")
        if last < 1:
            raise InputError(f"item-kNN: last is {last}; expected at least 1")
        for field, share in (("decay", decay), ("lag_decay", lag_decay)):
            if not 0 < share <= 1:
                raise InputError(f"item-kNN: {field} is {share}; expected it in (0, 1]")
        self._shrinkage, self._alpha = shrinkage, alpha
        self._last, self._decay, self._lag_decay = last, decay, lag_decay

    def _fit(self, training: SessionStore) -> None:
        sessions = distinct_items(training, self._items)
        lengths = np.diff(sessions.offsets)
        lags = max(int(lengths.max()) - 1, 1) if self._lag_decay < 1 else 1
        counted = Associations.count(
            sessions.rows,
            np.repeat(sessions.offsets[:-1], lengths),
            np.repeat(sessions.offsets[1:], lengths),
            self._lag_decay ** np.arange(lags, dtype=np.float64),
            self._items,
        )
        support = np.bincount(sessions.rows, minlength=self._items) + self._shrinkage
        source = support[counted.sources()] ** self._alpha
        target = support[counted.columns] ** (1.0 - self._alpha)
        self._similarities = counted.scaled((1.0 / (source * target)).astype(np.float64))

    def _evidence(self, requests: Requests) -> NDArray[np.float32]:
        past = context(self._store, requests, self._items, last=self._last, extend=self._last)
        return self._similarities.gather(past, self._decay ** past.age.astype(np.float64))
