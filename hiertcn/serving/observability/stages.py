"""Where a request's time goes, stage by stage; a microsecond of work for a batch of requests.

prometheus_client's own histogram takes a lock and several calls for each observation, which five
stages a request would feel. Here the event loop's thread alone counts, into plain lists, and the
figures become a Prometheus histogram only when they are scraped.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

STAGES: Final = ("wait", "read", "fold", "model", "terms", "rank", "commit")
"""Waiting for a batch, reading the user's record, folding closed sessions, the model call,
gathering what the scoring terms need (while the model runs), ranking, and making interactions
durable."""


class Listener(Protocol):
    """Who is told of every stage."""

    def request(self) -> Any:
        """The request under way, as :meth:`stage_ended` wants it; None if it is not followed."""
        ...

    def stage_ended(self, stage: str, began_ns: int, ended_ns: int, request: Any) -> None:
        """A followed request's stage is over; times in nanoseconds since the epoch."""
        ...


class Stages(Collector):
    """The stages' times, as the histogram ``hiertcn_stage_seconds``.

    Args:
        bounds_s: upper bounds of the buckets, ascending, in seconds.

    Attributes:
        listener: who is told of every stage, None for no one.
    """

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.listener: Listener | None = None
        self._bounds_s = list(bounds_s)
        self._counts = {name: [0] * (len(self._bounds_s) + 1) for name in STAGES}
        self._sums_s = dict.fromkeys(STAGES, 0.0)

    def request(self) -> Any:
        """The request under way, for :meth:`ended`; None unless a listener follows it."""
        return None if self.listener is None else self.listener.request()

    def ended(self, name: str, began: float, requests: Sequence[Any]) -> None:
        """A stage that requests went through together is over.

        Args:
            name: one of ``STAGES``.
            began: when it began, in seconds of ``time.perf_counter``.
            requests: of each, what :meth:`request` gave.
        """
        seconds = time.perf_counter() - began
        self.add(name, seconds, len(requests))
        if self.listener is not None:
            ended_ns = time.time_ns()
            for request in requests:
                if request is not None:
                    self.listener.stage_ended(
                        name, ended_ns - int(seconds * 1e9), ended_ns, request
                    )

    def add(self, name: str, seconds: float, count: int = 1) -> None:
        """Count a stage that took so long for each of ``count`` requests."""
        self._counts[name][bisect_left(self._bounds_s, seconds)] += count
        self._sums_s[name] += seconds * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The histogram, for the registry."""
        family = HistogramMetricFamily(
            "hiertcn_stage_seconds",
            f"Time that one request spent in a stage ({', '.join(STAGES)}).",
            labels=["stage"],
        )
        bounds = [*map(str, self._bounds_s), "+Inf"]
        for name, counts in self._counts.items():
            buckets, total = [], 0
            for bound, count in zip(bounds, counts.copy(), strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric([name], buckets, self._sums_s[name])
        yield family
