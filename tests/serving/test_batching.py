import asyncio

import pytest

from hiertcn.errors import ServingError
from hiertcn.export.tensors import LENGTH_BUCKETS
from hiertcn.serving.ranking.batching import BatchQueue, length_bucket


class Runner:
    """Runs batches only when told to, and notes them."""

    def __init__(self):
        self.batches = []
        self.may_end = asyncio.Semaphore(0)
        self.began = asyncio.Semaphore(0)

    async def __call__(self, key, items):
        self.batches.append((key, items))
        self.began.release()
        await self.may_end.acquire()
        if "bad" in items:
            raise ServingError("refused")
        return [f"{key}:{item}" for item in items]

    def end(self, count):
        for _ in range(count):
            self.may_end.release()


def queue_of(runner, **options):
    return BatchQueue(runner, **{"max_batch": 4, "max_delay_s": 0.001, **options})


async def begun(runner, count):
    for _ in range(count):
        await asyncio.wait_for(runner.began.acquire(), 5)


def test_a_lone_item_leaves_at_once_and_one_turns_items_leave_together():
    async def run():
        runner = Runner()
        queue = queue_of(runner, max_delay_s=60)
        futures = [queue.submit("a", item) for item in (1, 2)] + [queue.submit("b", 3)]
        await begun(runner, 2)
        runner.end(2)
        assert await asyncio.gather(*futures) == ["a:1", "a:2", "b:3"]
        assert runner.batches == [("a", [1, 2]), ("b", [3])]

    asyncio.run(run())


def test_while_one_is_under_way_the_rest_gathers_and_no_batch_is_too_large():
    async def run():
        runner = Runner()
        queue = queue_of(runner)
        futures = [queue.submit("a", 1)]
        await begun(runner, 1)
        futures += [queue.submit("a", item) for item in range(2, 11)]
        runner.end(1)
        await begun(runner, 1)
        assert runner.batches[1:] == [("a", [2, 3, 4, 5])]
        runner.end(10)
        assert await asyncio.gather(*futures) == [f"a:{item}" for item in range(1, 11)]
        assert [len(items) for _, items in runner.batches] == [1, 4, 4, 1]

    asyncio.run(run())


def test_items_that_keep_coming_leave_together():
    async def run():
        runner = Runner()
        queue = queue_of(runner, max_delay_s=60)
        runner.end(10)
        futures = []
        for item in range(1, 5):
            futures.append(queue.submit("a", item))
            # A request takes some turns of the loop to come in.
            for _ in range(3):
                await asyncio.sleep(0)
        await asyncio.gather(*futures)
        assert runner.batches == [("a", [1, 2, 3, 4])]

    asyncio.run(run())


def test_items_that_never_stop_coming_leave_when_the_delay_is_over():
    async def run():
        runner = Runner()
        queue = queue_of(runner, max_batch=10**9, max_delay_s=0.08)
        runner.end(1000)
        futures = [queue.submit("a", 0)]
        async with asyncio.timeout(60):
            while not runner.batches:
                futures.append(queue.submit("a", 0))
                await asyncio.sleep(0)
        await asyncio.gather(*futures)

    asyncio.run(run())


def test_a_failure_reaches_its_own_batch_only_and_cancelled_items_are_no_harm():
    async def run():
        runner = Runner()
        queue = queue_of(runner)
        bad = [queue.submit("a", "bad"), queue.submit("a", 1)]
        good = queue.submit("b", 2)
        gone = queue.submit("b", 3)
        await begun(runner, 2)
        gone.cancel()
        runner.end(2)
        for future in bad:
            with pytest.raises(ServingError, match="refused"):
                await future
        assert await good == "b:2"

    asyncio.run(run())


@pytest.mark.parametrize(("length", "bucket"), [(0, 4), (4, 4), (5, 8), (33, 64), (128, 128)])
def test_lengths_are_padded_to_the_next_bucket(length, bucket):
    assert length_bucket(length) == bucket
    assert bucket in LENGTH_BUCKETS
