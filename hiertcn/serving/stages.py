"""Where a request's time goes, stage by stage; a microsecond of work a stage.

prometheus_client's own histogram takes a lock and several calls for each observation, which five
stages a request would feel. Here the event loop's thread alone counts, into plain lists, and the
figures become a Prometheus histogram only when they are scraped.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Final

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

STAGES: Final = ("read", "fold", "model", "terms", "rank", "commit")
"""Reading the user's record, folding closed sessions, the model call with its queue, the scoring
terms, ranking, and making interactions durable."""

Listener = Callable[[str, int, int], None]
"""Called at a stage's end with its name, and its begin and end in nanoseconds since the epoch."""


class Stages(Collector):
    """The stages' times, as the histogram ``hiertcn_stage_seconds``.

    Args:
        bounds_s: upper bounds of the buckets, ascending, in seconds.

    Attributes:
        listener: called at every stage's end, None for no one.
    """

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.listener: Listener | None = None
        self._bounds_s = list(bounds_s)
        self._counts = {name: [0] * (len(self._bounds_s) + 1) for name in STAGES}
        self._sums_s = dict.fromkeys(STAGES, 0.0)

    def time(self, name: str) -> "Stage":
        """A context manager around a stage of one request; ``name`` is one of ``STAGES``."""
        return Stage(self, name)

    def add(self, name: str, seconds: float) -> None:
        """Count one stage of one request."""
        self._counts[name][bisect_left(self._bounds_s, seconds)] += 1
        self._sums_s[name] += seconds

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


class Stage:
    """One stage of one request; counted when it ends, also by an error."""

    __slots__ = ("_began", "_name", "_stages")

    def __init__(self, stages: Stages, name: str) -> None:
        self._stages = stages
        self._name = name
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = time.perf_counter() - self._began
        self._stages.add(self._name, seconds)
        if self._stages.listener is not None:
            ended_ns = time.time_ns()
            self._stages.listener(self._name, ended_ns - int(seconds * 1e9), ended_ns)
