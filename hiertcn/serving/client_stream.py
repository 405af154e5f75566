"""Requests on their way through one streaming call, kept until they are answered.

Answers come in the order of the requests, so when a call breaks off, what is unanswered is known
and goes out again through the next call; the sidecar recognises what it had recorded before.
"""

import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final

ATTEMPTS: Final = 4
"""Calls in a row that may break off without an answer."""

_FIRST_WAIT_S: Final = 0.05
_WAIT_GROWTH: Final = 3.0


class StreamedRequests:
    """The requests of one stream; any number of calls may take turns to send them.

    Args:
        requests: sent once each, unless a call breaks off.
    """

    def __init__(self, requests: Iterable[Any]) -> None:
        self._source = iter(requests)
        self._unanswered: deque[Any] = deque()
        self._answered = 0
        self._failures = 0
        self._error: Exception | None = None
        # gRPC draws requests on a thread of each call, and that of a broken one may linger.
        self._lock = threading.Lock()

    def draw(self) -> Iterator[Any]:
        """What one call sends: the unanswered ones, then new ones."""
        place = self._answered
        while True:
            with self._lock:
                ahead = place - self._answered
                if ahead == len(self._unanswered) and not self._draw_one():
                    return
                if ahead < 0:
                    # A later call has taken over.
                    return
                request = self._unanswered[ahead]
            place += 1
            yield request

    async def draw_async(self) -> AsyncIterator[Any]:
        """The same for asyncio."""
        for request in self.draw():
            yield request

    def answered(self) -> None:
        """Forget the oldest unanswered request."""
        with self._lock:
            self._unanswered.popleft()
            self._answered += 1
            self._failures = 0

    def raise_error(self) -> None:
        """Raise what ended the requests early, if anything did."""
        if self._error is not None:
            raise self._error

    def wait_s(self) -> float | None:
        """Seconds to wait before the next call after one that broke off; None to give up."""
        self._failures += 1
        if self._failures >= ATTEMPTS:
            return None
        return random.uniform(0, _FIRST_WAIT_S * _WAIT_GROWTH ** (self._failures - 1))

    def _draw_one(self) -> bool:
        try:
            self._unanswered.append(next(self._source))
        except StopIteration:
            return False
        except Exception as error:
            # Raised on gRPC's thread it would reach nobody.
            self._error = error
            return False
        return True
