"""Which requests are let in when more come than can be answered: bounds on those in flight.

A queue that is longer than what can be worked off before its callers give up makes every answer
late and all work wasted. So a request over the bound is refused at once, with RESOURCE_EXHAUSTED.

A fixed number cannot be right for every machine: 256 in flight are a sixth of a second at 1,500
requests a second, and over a second at 200. So the bound of a method whose answers take processor
time follows its latency: while answers take longer than a target on average, it shrinks by a
quarter every tenth of a second, and grows again otherwise (additive increase, multiplicative
decrease: Chiu and Jain, 1989). Recording is different: however many wait, one write to the disk
answers them all, so its bound is fixed.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

from hiertcn.errors import OverloadError
from hiertcn.serving.observability.metrics import Metrics

_WINDOW_S: Final = 0.1
_LEAST: Final = 32
_SHRINKS_BY: Final = 0.75
_GROWS_BY: Final = 1.1
_BY_LATENCY: Final = ("Recommend",)


class MethodBound:
    """Bounds the requests in flight of one method. One thread uses it.

    Args:
        most: requests in flight at which the next is refused at any rate.
        target_s: mean seconds an answer may take before fewer are let in; None for a fixed bound.
        clock: the time in seconds.
    """

    def __init__(
        self,
        most: int,
        *,
        target_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._most = most
        self._target_s = target_s
        self._clock = clock
        self._bound = float(most)
        self._window_ends = 0.0
        self._answers = 0
        self._answers_s = 0.0
        self.in_flight = 0

    @property
    def bound(self) -> int:
        """Requests in flight at which the next is refused now."""
        return int(self._bound)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request while it runs.

        Raises:
            OverloadError: too many are in flight.
        """
        if self.in_flight >= self.bound:
            raise OverloadError(
                f"{self.in_flight} requests are in flight, the most that can be answered in time; "
                "try again later, or give the sidecar more with --max-in-flight or --workers"
            )
        self.in_flight += 1
        began = self._clock()
        try:
            yield
        finally:
            self.in_flight -= 1
            if self._target_s is not None:
                self._answered(began, self._target_s)

    def _answered(self, began: float, target_s: float) -> None:
        now = self._clock()
        self._answers += 1
        self._answers_s += now - began
        if now < self._window_ends:
            return
        if self._answers_s > target_s * self._answers:
            # From where it is, not from a bound that nothing has come near.
            reached = min(self._bound, self.in_flight + 1)
            self._bound = max(min(_LEAST, self._most), _SHRINKS_BY * reached)
        else:
            self._bound = min(self._most, _GROWS_BY * self._bound + 1)
        self._window_ends = now + _WINDOW_S
        self._answers, self._answers_s = 0, 0.0


class Admission:
    """The bounds of all methods.

    Args:
        most: requests in flight of one method at which the next is refused at any rate.
        metrics: where those in flight and the bounds are shown.
        target_s: mean seconds a recommendation may take before fewer are let in.
    """

    def __init__(self, most: int, metrics: Metrics, *, target_s: float = 0.2) -> None:
        self._most = most
        self._metrics = metrics
        self._target_s = target_s
        self._bounds: dict[str, MethodBound] = {}

    def of(self, method: str) -> MethodBound:
        """The bound of a method."""
        if method not in self._bounds:
            target_s = self._target_s if method in _BY_LATENCY else None
            bound = self._bounds[method] = MethodBound(self._most, target_s=target_s)
            self._metrics.in_flight.labels(method).set_function(lambda: bound.in_flight)
            self._metrics.in_flight_bound.labels(method).set_function(lambda: bound.bound)
        return self._bounds[method]
