"""Long work leaves two thirds of the event loop to requests."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from hiertcn.serving.records import loop_share
from hiertcn.serving.records.loop_share import LoopShare, give_way


@pytest.fixture
def clock(monkeypatch):
    """Seconds worked and slept so far, by a clock that only these tests move."""

    class Clock:
        now = worked = slept = longest = 0.0

        def work(self, seconds):
            self.now += seconds
            self.worked += seconds

        async def sleep(self, seconds):
            self.now += seconds
            self.slept += seconds

    found = Clock()
    monkeypatch.setattr(loop_share.time, "monotonic", lambda: found.now)
    monkeypatch.setattr(loop_share.asyncio, "sleep", found.sleep)
    return found


@pytest.mark.parametrize("piece_s", [0.0001, 0.001, 0.05])
def test_work_of_any_grain_takes_a_third(clock, piece_s):
    async def run():
        share = LoopShare()
        for _ in range(int(1 / piece_s)):
            clock.work(piece_s)
            await share.leave()

    asyncio.run(run())
    assert clock.worked / (clock.worked + clock.slept) == pytest.approx(1 / 3, rel=0.01)


def test_waiting_for_others_is_not_paid_for(clock):
    async def run():
        share = LoopShare()
        clock.now += 10.0
        share.resume()
        clock.work(0.001)
        await share.leave()

    asyncio.run(run())
    assert clock.slept == 0


def test_only_the_thread_that_gives_way_does():
    with ThreadPoolExecutor(1, initializer=give_way) as aside:
        assert aside.submit(os.sched_getscheduler, 0).result() == os.SCHED_IDLE
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
