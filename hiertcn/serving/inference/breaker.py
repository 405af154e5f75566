"""A circuit breaker: stop asking what keeps failing, and try it again now and then.

    closed ──(``failures`` in a row)──> open ──(``open_s`` later)──> half-open: one call may try
       ^                                  ^                              │ │
       └──────────── it succeeds ─────────┼──────────────────────────────┘ │
                                          └───────── it fails ─────────────┘

While open, a caller need not wait for a deadline to pass to know that there will be no answer.
M. Nygard, Release It!, 2007, chapter 5.
"""

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Counts what became of calls and says whether the next may be made; thread-safe.

    Args:
        failures: failures in a row that open it, at least 1.
        open_s: seconds until one call may try again.
        changed: told ``True`` when it opens and ``False`` when it closes.
        clock: the time in seconds.
    """

    def __init__(
        self,
        *,
        failures: int = 5,
        open_s: float = 1.0,
        changed: Callable[[bool], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_failures = failures
        self._open_s = open_s
        self._changed = changed
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._tries_at: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls are given up, but for one now and then."""
        return self._tries_at is not None

    def allows(self) -> bool:
        """Whether a call may be made now; its outcome must then be told."""
        if self._tries_at is None:
            return True
        with self._lock:
            now = self._clock()
            if self._tries_at is None or now < self._tries_at:
                return self._tries_at is None
            # The one that tries may never tell (it was cancelled), so the next has its turn too.
            self._tries_at = now + self._open_s
            return True

    def succeeded(self) -> None:
        """A call was answered."""
        if self._failures == 0 and self._tries_at is None:
            return
        with self._lock:
            was_open = self._tries_at is not None
            self._failures, self._tries_at = 0, None
        if was_open and self._changed is not None:
            self._changed(False)

    def failed(self) -> None:
        """A call was not answered."""
        with self._lock:
            self._failures += 1
            was_open = self._tries_at is not None
            if self._failures >= self._most_failures:
                self._tries_at = self._clock() + self._open_s
            opened = self._tries_at is not None and not was_open
        if opened and self._changed is not None:
            self._changed(True)
