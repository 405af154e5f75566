"""What a request's user did before it, flattened for counting."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiertcn.evaluation.protocol import Requests
from hiertcn.sessions.store import SessionStore, ranges


@dataclass(frozen=True)
class Context:
    """Past interactions of several requests, one request's after another, oldest first.

    Interactions with unknown items are left out, but keep their place: the age of the others
    counts them.

    Attributes:
        offsets: int64 ``[n + 1]``, where each request's part starts, then the count.
        rows: int32 ``[k]``, item rows below the number of known items.
        age: int64 ``[k]``, interactions of the same context that came later; 0 is the newest.
        length: int64 ``[n]``, interactions in each request's context, unknown items included.
        earlier: bool ``[k]``, whether the interaction is of a session before the running one.
    """

    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    age: NDArray[np.int64]
    length: NDArray[np.int64]
    earlier: NDArray[np.bool_]

    def owner(self) -> NDArray[np.int64]:
        """Return the request each interaction belongs to, int64 ``[k]``."""
        return np.repeat(np.arange(len(self.length)), np.diff(self.offsets))


def context(
    store: SessionStore,
    requests: Requests,
    items: int,
    *,
    last: int | None = None,
    extend: int | None = None,
) -> Context:
    """Gather the running session, and what came before it as far as asked.

    Args:
        store: the histories.
        requests: any number.
        items: rows at or above it are unknown.
        last: at most this many interactions of the running session; None for all.
        extend: earlier sessions fill the context up to this many interactions; None takes the
            whole history, 0 nothing.
    """
    end = requests.interaction
    session = requests.session_start()
    if last is not None:
        session = np.maximum(session, end - last)
    start = requests.history_start(store)
    if extend is not None:
        start = np.maximum(start, np.minimum(session, end - extend))
    length = end - start
    at = ranges(start, length)
    rows = store.item_rows[at]
    owner = np.repeat(np.arange(len(requests)), length)
    known = rows < items
    at, rows, owner = at[known], rows[known], owner[known]
    offsets = np.zeros(len(requests) + 1, np.int64)
    np.cumsum(np.bincount(owner, minlength=len(requests)), out=offsets[1:])
    return Context(
        offsets=offsets,
        rows=rows,
        age=(end - 1)[owner] - at,
        length=length,
        earlier=at < requests.session_start()[owner],
    )
