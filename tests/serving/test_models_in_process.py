import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hiertcn.errors import ReleaseError, ServingError
from hiertcn.export.tensors import GRU_STEP, NEXT_STATE, SESSION_MEAN, STATE, TCN
from hiertcn.serving.client import Interaction
from hiertcn.serving.inference.inference import TritonInference
from hiertcn.serving.inference.models_in_process import InProcessModels
from tests.waiting import WAIT_S

NUMBER = 2026010101


def batch_of(toy, size):
    rng = np.random.default_rng(0)
    layers, hidden = toy.start_state.shape
    return (
        (STATE, rng.normal(size=(size, layers, hidden)).astype(np.float32)),
        (SESSION_MEAN, rng.normal(size=(size, toy.vectors.shape[1])).astype(np.float32)),
    )


def test_the_same_files_compute_the_same_with_and_without_a_triton(shared_toy, shared_triton):
    toy = shared_toy.toys[NUMBER]
    here = InProcessModels(shared_toy.repository.triton_repository)

    async def both():
        there = TritonInference(shared_triton.grpc_url)
        arguments = (GRU_STEP, NUMBER, batch_of(toy, 5), NEXT_STATE)
        try:
            return [await one.run(*arguments, timeout_s=WAIT_S) for one in (here, there)]
        finally:
            await there.close()
            await here.close()

    shared_triton.load(GRU_STEP, [NUMBER])
    here.load(GRU_STEP, [NUMBER])
    one, other = asyncio.run(both())
    np.testing.assert_array_equal(one, other)


def test_versions_come_and_go_and_what_is_absent_is_named(shared_toy):
    models = InProcessModels(shared_toy.repository.triton_repository)
    toy = shared_toy.toys[NUMBER]
    models.load(GRU_STEP, [NUMBER])
    with pytest.raises(ReleaseError, match="version 7 of gru_step"):
        models.load(GRU_STEP, [NUMBER, 7])
    assert models.loaded(GRU_STEP) == [NUMBER]

    async def ask():
        assert await models.is_ready(GRU_STEP, NUMBER)
        assert not await models.is_ready(TCN, NUMBER)
        with pytest.raises(ServingError, match="tcn is not loaded"):
            await models.run(TCN, NUMBER, (), NEXT_STATE, timeout_s=1.0)
        with pytest.raises(ServingError, match="failed"):
            await models.run(GRU_STEP, NUMBER, batch_of(toy, 2)[:1], NEXT_STATE, timeout_s=WAIT_S)
        models.unload(GRU_STEP)
        assert not await models.is_ready(GRU_STEP, NUMBER)
        await models.close()

    asyncio.run(ask())


@pytest.fixture
def running(shared_toy, start_sidecar):
    # However slow the machine is, nothing is refused here.
    return start_sidecar(shared_toy, "", models="in-process")


def ids(found):
    return [item.item_id for item in found.items]


def assert_same(found, expected):
    assert (ids(found), found.unknown_items, found.fallback) == (
        ids(expected),
        expected.unknown_items,
        expected.fallback,
    )
    np.testing.assert_allclose(
        [item.score for item in found.items],
        [item.score for item in expected.items],
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_sidecar_without_a_triton_records_folds_and_ranks(running, shared_toy):
    toy, client = shared_toy.toys[NUMBER], running.client
    start = toy.watermark_us + 1_000_000
    client.record([Interaction("ada", "item-3", start), Interaction("ada", "item-4", start + 1)])
    found = client.recommend("ada", k=5, timestamp_us=start + 2)
    expected = toy.scores(toy.start_state, "item-3", "item-4")
    assert ids(found) == toy.best(expected, 5)
    assert not found.fallback
    later = client.recommend("ada", k=5, timestamp_us=start + 7_200_000_000)
    expected = toy.scores(toy.step(toy.start_state, "item-3", "item-4"))
    assert ids(later) == toy.best(expected, 5)


def test_a_reply_does_not_depend_on_what_it_is_batched_with(running, shared_toy):
    toy, client = shared_toy.toys[NUMBER], running.client
    start = toy.watermark_us + 1_000_000
    rng = np.random.default_rng(1)
    requests = []
    for n in range(60):
        user = f"user-{n % 12}"
        candidates = None
        if n % 5:
            drawn = rng.choice(toy.item_ids, int(rng.integers(1, 60))).tolist()
            candidates = [*drawn, "nobody's", *drawn[:2]]
        requests.append(
            {
                "user_id": user,
                "k": int(rng.integers(1, 30)),
                "candidates": candidates,
                "exclude": rng.choice(toy.item_ids, n % 4).tolist(),
                "exclude_seen": n % 7 == 0,
                "timestamp_us": start + (n % 3) * 3_600_000_000,
            }
        )
    client.record(
        [Interaction(f"user-{n % 12}", f"item-{n % 50}", start + n * 1000) for n in range(40)]
    )

    def ask(request):
        return client.recommend(**request)

    alone = [ask(request) for request in requests]
    deadline = time.monotonic() + WAIT_S
    with ThreadPoolExecutor(24) as threads:
        while time.monotonic() < deadline:
            for found, expected in zip(threads.map(ask, requests), alone, strict=True):
                assert_same(found, expected)
            if running.value("hiertcn_model_batch_sum", model="tcn") > 1.5 * running.value(
                "hiertcn_model_batch_count", model="tcn"
            ):
                break
    sizes = running.value("hiertcn_model_batch_sum", model="tcn")
    assert sizes > running.value("hiertcn_model_batch_count", model="tcn")
