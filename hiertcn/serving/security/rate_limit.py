"""Requests a second that each caller may make: one token bucket per caller.

A bucket holds one second's worth of requests, so a caller may burst that far and then goes at
the rate. Costs about a microsecond a request and 200 bytes a caller; the callers longest silent
are forgotten (their buckets were full again long before). One limiter counts for one process;
``shared_rate_limit.py`` has one for several.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from hiertcn.errors import InputError, OverloadError

MOST_CALLERS: Final = 10_000

Caller = bytes | str
"""A caller's name: the key of its token, or where it calls from."""


class Bucket(NamedTuple):
    """A caller's bucket: ``left`` requests were in it at the time ``then``, in seconds."""

    left: float
    then: float


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
        self._buckets: OrderedDict[Caller, Bucket] = OrderedDict()

    def admit(self, caller: Caller) -> None:
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

    def wait_s(self, caller: Caller) -> float:
        """Take a request out of the bucket and return 0, or return the seconds until one is in."""
        self._buckets[caller], wait_s = self._taken(self._buckets.pop(caller, None))
        if len(self._buckets) > self._most_callers:
            self._buckets.popitem(last=False)
        return wait_s

    def _taken(self, bucket: Bucket | None) -> tuple[Bucket, float]:
        """The bucket (None: one never used) after a request, and what ``wait_s`` returns."""
        now = self._clock()
        left = self._size
        if bucket is not None:
            left = min(left, bucket.left + (now - bucket.then) * self._per_second)
        if left >= 1.0:
            return Bucket(left - 1.0, now), 0.0
        return Bucket(left, now), (1.0 - left) / self._per_second
