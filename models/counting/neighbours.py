"""Nearest training sessions, weighed: the kernel that V-SKNN, STAN and VSTAN share.

For a context of items with similarity weights ``w`` (of an item that occurs twice, the later one):

1. candidates: the ``sample`` most recent training sessions that share an item with the context;
2. ``sim(n) = sum of w over the shared items * norm(n) * exp(-max(0, now - end(n)) / recency)``;
3. the ``k`` most similar sessions, the more recent ones in a tie;
4. every item ``i`` of a neighbour gains ``sim(n) * v * gain(i) * exp(-|place(i) - place*| /
   closeness)``, where ``v`` is the score weight of the newest context item that the neighbour
   has and ``place*`` the place of the last item in the neighbour that the context has.

The similarity's norm over the context is the same for all neighbours and left out: it changes no
rank. A session that ended after the request, which a per-user split puts into training, is as
recent as can be.

A request costs ``len(context) * sample`` postings at most and one array of sessions, kept between
requests, as scratch.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.sessions.store import SessionStore
from models.counting.context import Context, context
from models.counting.ranker import CountingRanker
from models.counting.reminder import Reminder
from models.counting.session_items import SessionItems, distinct_items

DAY_US: Final = 86_400_000_000


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Which sessions are neighbours, and of what context.

    Attributes:
        k: neighbours.
        sample: most recent sessions with a shared item to choose them from.
        last: at most this many items of the running session are the context; None for all.
        extend: the user's earlier sessions fill a shorter context up to this many items; 0 for
            session-based methods.
    """

    k: int = 100
    sample: int = 1000
    last: int | None = None
    extend: int = 0

    def __post_init__(self) -> None:
        for field, least in (("k", 1), ("sample", 1), ("extend", 0)):
            if getattr(self, field) < least:
                raise InputError(f"{field} is {getattr(self, field)}; expected at least {least}")
        if self.last is not None and self.last < 1:
            raise InputError(f"last is {self.last}; expected at least 1, or none")


class SessionNeighbours(CountingRanker):
    """Base of the session-kNN rankers; they say how context and items are weighed.

    Args:
        store: the histories.
        items: number of item rows.
        neighbourhood: which sessions are asked.
        cosine: divide a neighbour's similarity by the root of its number of items.
        recency_us: decay of a neighbour's similarity with its age, microseconds; None for none.
        closeness: decay with the distance to the last shared item, interactions; None for none.
        idf: an item gains ``1 + idf * ln(sessions / interactions with it)``; 0 for none.
        name: in every table.
        reminder: see `CountingRanker`.
    """

    def __init__(
        self,
        store: SessionStore,
        items: int,
        *,
        neighbourhood: Neighbourhood,
        cosine: bool,
        recency_us: float | None,
        closeness: float | None,
        idf: float,
        name: str,
        reminder: Reminder | None,
    ) -> None:
        for field, decay in (("recency", recency_us), ("closeness", closeness)):
            if decay is not None and not decay > 0:
                raise InputError(f"{name}: the decay of {field} is {decay}; expected it above 0")
        if not 0 <= idf < np.inf:
            raise InputError(f"{name}: idf is {idf}; expected a number >= 0")
        if neighbourhood.extend:
            name = f"{name} ext"
        super().__init__(store, items, name=name, reminder=reminder)
        self._neighbourhood = neighbourhood
        self._cosine, self._idf = cosine, idf
        self._recency_us = np.inf if recency_us is None else float(recency_us)
        self._closeness = np.inf if closeness is None else float(closeness)

    def _similarity_weights(self, past: Context) -> NDArray[np.float64]:
        """Return each context interaction's weight in the similarity, float64 ``[k]``."""
        raise NotImplementedError

    def _score_weights(self, past: Context) -> NDArray[np.float64]:
        """Return each context interaction's weight for the items it found, float64 ``[k]``."""
        raise NotImplementedError

    def _fit(self, training: SessionStore) -> None:
        sessions = distinct_items(training, self._items)
        count = len(sessions.end_us)
        lengths = np.diff(sessions.offsets)
        self._sessions: SessionItems = sessions
        # Sessions ascend by time, so each item's sessions do.
        self._postings = np.repeat(np.arange(count), lengths)[
            np.argsort(sessions.rows, kind="stable")
        ]
        self._posting_offsets = np.zeros(self._items + 1, np.int64)
        np.cumsum(np.bincount(sessions.rows, minlength=self._items), out=self._posting_offsets[1:])
        self._norm = lengths**-0.5 if self._cosine else np.ones(count)
        idf = np.log(max(training.meta.sessions, 1) / np.maximum(self._counts, 1))
        # An item may have more interactions than there are sessions; its gain stays positive.
        self._gain = 1.0 + self._idf * np.maximum(idf, 0.0)
        longest = int(sessions.place.max()) + 1
        self._close = np.exp(-np.arange(longest) / self._closeness)
        self._similarity = np.zeros(count, np.float64)
        self._found_by = np.zeros(count, np.float64)

    def _evidence(self, requests: Requests) -> NDArray[np.float32]:
        asked = self._neighbourhood
        past = context(self._store, requests, self._items, last=asked.last, extend=asked.extend)
        out = np.zeros((len(requests), self._items), np.float32)
        _score(
            past.offsets,
            past.rows,
            self._similarity_weights(past),
            self._score_weights(past),
            self._store.timestamps_us[requests.interaction],
            self._posting_offsets,
            self._postings,
            self._sessions.offsets,
            self._sessions.rows,
            self._sessions.place,
            self._sessions.end_us,
            self._norm,
            self._gain,
            self._close,
            self._recency_us,
            asked.sample,
            asked.k,
            self._similarity,
            self._found_by,
            out,
        )
        return out


@compiled
def _score(
    of_request: Any,
    rows: Any,
    similarity_weights: Any,
    score_weights: Any,
    now_us: Any,
    posting_offsets: Any,
    postings: Any,
    session_offsets: Any,
    session_rows: Any,
    places: Any,
    end_us: Any,
    norm: Any,
    gain: Any,
    close: Any,
    recency_us: float,
    sample: int,
    k: int,
    similarity: Any,
    found_by: Any,
    out: Any,
) -> None:
    in_context = np.full(len(gain), -1, np.int64)
    touched = np.empty(len(norm), np.int64)
    values = np.empty(len(norm), np.float64)
    for request in range(len(of_request) - 1):
        found = 0
        for entry in range(of_request[request + 1] - 1, of_request[request] - 1, -1):
            row = rows[entry]
            if in_context[row] == request:
                continue
            in_context[row] = request
            # A session among the most recent of all is among the most recent with this item.
            first = max(posting_offsets[row], posting_offsets[row + 1] - sample)
            for at in range(first, posting_offsets[row + 1]):
                session = postings[at]
                if found_by[session] == 0:
                    found_by[session] = score_weights[entry]
                    similarity[session] = 0
                    touched[found] = session
                    found += 1
                similarity[session] += similarity_weights[entry]
        for i in range(found):
            values[i] = found_by[touched[i]]
        # found_by doubles as the mark of a touched session and has to be clear for the next one.
        weights_found = values[:found].copy()
        for i in range(found):
            found_by[touched[i]] = 0

        oldest = -1
        if found > sample:
            oldest = np.partition(touched[:found], found - sample)[found - sample]
        kept = 0
        for i in range(found):
            session = touched[i]
            if session < oldest:
                continue
            value = similarity[session] * norm[session]
            age = now_us[request] - end_us[session]
            if age > 0:
                value *= np.exp(-age / recency_us)
            touched[kept] = session
            weights_found[kept] = weights_found[i]
            values[kept] = value
            kept += 1

        least, oldest_tied = -1.0, -1
        if kept > k:
            least = np.partition(values[:kept], kept - k)[kept - k]
            larger = 0
            tied = np.empty(kept, np.int64)
            ties = 0
            for i in range(kept):
                if values[i] > least:
                    larger += 1
                elif values[i] == least:
                    tied[ties] = touched[i]
                    ties += 1
            oldest_tied = np.partition(tied[:ties], ties - (k - larger))[ties - (k - larger)]
        for i in range(kept):
            session = touched[i]
            if values[i] < least or (values[i] == least and session < oldest_tied):
                continue
            begin, end = session_offsets[session], session_offsets[session + 1]
            last_shared = -1
            for at in range(end - 1, begin - 1, -1):
                if in_context[session_rows[at]] == request:
                    last_shared = places[at]
                    break
            for at in range(begin, end):
                row = session_rows[at]
                distance = abs(places[at] - last_shared)
                out[request, row] += values[i] * weights_found[i] * gain[row] * close[distance]
