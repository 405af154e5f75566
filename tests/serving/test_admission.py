"""The bounds on requests in flight, and a queue under five times what it can serve."""

import contextlib
import heapq
import random

import pytest

from hiertcn.errors import OverloadError
from hiertcn.serving.rpc.admission import MethodBound


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def overloaded(
    bound: MethodBound, clock: Clock, *, per_second: float, asked: float, seconds: float
):
    """One server in front of a queue, asked at Poisson times: (latency, when) of each answer."""
    random.seed(0)
    arrivals, free_at, answered = 0.0, 0.0, []
    waiting: list[tuple[float, float, contextlib.ExitStack]] = []
    refused = 0
    while arrivals < seconds:
        arrivals += random.expovariate(asked)
        while waiting and waiting[0][0] <= arrivals:
            clock.now, came, held = heapq.heappop(waiting)
            held.close()
            answered.append((clock.now - came, clock.now))
        clock.now = arrivals
        held = contextlib.ExitStack()
        try:
            held.enter_context(bound.admitted())
        except OverloadError:
            refused += 1
            continue
        free_at = max(free_at, arrivals) + 1 / per_second
        heapq.heappush(waiting, (free_at, arrivals, held))
    return answered, refused


@pytest.mark.parametrize("per_second", [150, 1500])
@pytest.mark.parametrize("times", [0.8, 5.0])
def test_answers_stay_in_time_whatever_is_asked(per_second, times):
    clock = Clock()
    bound = MethodBound(256, target_s=0.2, clock=clock)
    answered, refused = overloaded(
        bound, clock, per_second=per_second, asked=times * per_second, seconds=20
    )
    late = [latency for latency, when in answered if when > 5]
    assert sorted(late)[int(0.99 * len(late))] < 0.4
    goodput = len(late) / 15 / per_second
    assert goodput > 0.75 if times < 1 else goodput > 0.95
    if times < 1:
        assert refused < 0.01 * len(answered)


def test_a_fixed_bound_lets_in_that_many():
    bound = MethodBound(3)
    with contextlib.ExitStack() as held:
        for _ in range(3):
            held.enter_context(bound.admitted())
        with pytest.raises(OverloadError, match=r"^3 requests are in flight"):
            held.enter_context(bound.admitted())
    assert bound.in_flight == 0
    with bound.admitted():
        assert (bound.in_flight, bound.bound) == (1, 3)


def test_the_bound_comes_back_when_answers_are_fast_again():
    clock = Clock()
    bound = MethodBound(64, target_s=0.1, clock=clock)
    for _ in range(40):
        with bound.admitted():
            clock.now += 0.5
    assert bound.bound == 32
    for _ in range(3000):
        with bound.admitted():
            clock.now += 0.002
    assert bound.bound == 64
