"""Requests on their way through one streaming call, kept until they are answered.

Answers come in the order of the requests, so when a call breaks off, what is unanswered is known
and goes out again through the next call; the sidecar recognises what it had recorded before.
"""

import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final

ATTEMPTS: Final = 10
"""Calls in a row that may break off without an answer: long enough for a sidecar to restart."""

_FIRST_WAIT_S: Final = 0.05
_WAIT_GROWTH: Final = 2.0
_LONGEST_WAIT_S: Final = 2.0


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
        self._lock = threading.Lock()
        # gRPC draws requests on a thread of each call, and that of a broken one may linger. Not the
        # lock above, because the source may wait for an answer before it gives its next.
        self._drawing = threading.Lock()

    def draw(self) -> Iterator[Any]:
        """What one call sends: the unanswered ones, then new ones."""
        place = self._answered
        while True:
            with self._lock:
                ahead = place - self._answered
                # One that is behind was overtaken by a later call.
                is_over = ahead < 0
                request = self._unanswered[ahead] if 0 <= ahead < len(self._unanswered) else None
            if request is not None:
                place += 1
                yield request
            elif is_over or not self._draw_one(place):
                return

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
        wait_s = _FIRST_WAIT_S * _WAIT_GROWTH ** (self._failures - 1)
        return min(wait_s, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)

    def _draw_one(self, place: int) -> bool:
        with self._drawing:
            if place - self._answered < len(self._unanswered):
                return True
            try:
                request = next(self._source)
            except StopIteration:
                return False
            except Exception as error:
                # Raised on gRPC's thread it would reach nobody.
                self._error = error
                return False
            with self._lock:
                self._unanswered.append(request)
        return True
