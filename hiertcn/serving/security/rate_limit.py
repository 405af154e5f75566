"""Requests a second that each caller may make: one token bucket per caller.

A bucket holds one second's worth of requests, so a caller may burst that far and then goes at
the rate. Costs about a microsecond a request and 200 bytes a caller; the callers longest silent
are forgotten (their buckets were full again long before). One limiter counts for one process.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

from hiertcn.errors import InputError, OverloadError

MOST_CALLERS: Final = 10_000


class RateLimiter:
    """Admits at most ``per_second`` requests a second of each caller.

    Args:
        per_second: requests a second, more than 0; also the size of a bucket, at least 1.
        clock: seconds that never run backwards.
        most_callers: callers remembered.
    """

    def __init__(
        self,
        per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        most_callers: int = MOST_CALLERS,
    ) -> None:
        if not 0 < per_second < float("inf"):
            raise InputError(f"rate_limit is {per_second}; expected more than 0 requests/s")
        self._per_second = per_second
        self._size = max(1.0, per_second)
        self._clock = clock
        self._most_callers = most_callers
        # Of each caller: what is left in the bucket, and when that was so.
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def admit(self, caller: Hashable) -> None:
        """Take one request out of the caller's bucket.

        Raises:
            OverloadError: it is empty; the message names the limit and when to try again.
        """
        wait_s = self.wait_s(caller)
        if wait_s:
            raise OverloadError(
                f"the rate limit of {self._per_second:g} requests/s for each caller is used up; "
                f"try again in {wait_s:.3f} s"
            )

    def wait_s(self, caller: Hashable) -> float:
        """Take a request out of the bucket and return 0, or return the seconds until one is in."""
        now = self._clock()
        left, then = self._buckets.pop(caller, (self._size, now))
        left = min(self._size, left + (now - then) * self._per_second)
        admitted = left >= 1.0
        self._buckets[caller] = (left - 1.0 if admitted else left, now)
        if len(self._buckets) > self._most_callers:
            self._buckets.popitem(last=False)
        return 0.0 if admitted else (1.0 - left) / self._per_second
