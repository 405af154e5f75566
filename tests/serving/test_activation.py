"""Releases change without a failed or a mixed reply, and a bad one changes nothing."""

import pytest

from hiertcn.errors import InputError, ReleaseError
from hiertcn.serving.client import Interaction
from tests.waiting import until

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
DAY_US = 24 * HOUR_US
FIRST, SECOND = 2026010101, 2026010201


def ids(found):
    return [item.item_id for item in found.items]


def test_a_flip_rebuilds_state_from_snapshot_and_journal(toy_repository, triton, start_sidecar):
    old = toy_repository.publish(FIRST, seed=1)
    client = start_sidecar(toy_repository, triton.grpc_url).client
    t0 = old.watermark_us + HOUR_US
    t1 = old.watermark_us + DAY_US + HOUR_US
    client.record([Interaction("user-0", "item-1", t0), Interaction("user-0", "item-2", t1)])
    assert ids(client.recommend("user-0", timestamp_us=t1)) == old.best(
        old.scores(old.step(old.states["user-0"], "item-1"), "item-2"), 10
    )
    new = toy_repository.publish(
        SECOND, seed=2, watermark_us=old.watermark_us + DAY_US, activate=False
    )
    assert client.activate(SECOND) == SECOND
    found = client.recommend("user-0", timestamp_us=t1)
    assert found.release == SECOND
    # The new snapshot has seen the first interaction; only the second is after its watermark.
    assert ids(found) == new.best(new.scores(new.states["user-0"], "item-2"), 10)
    assert toy_repository.repository.current() == SECOND

    client.record([Interaction("user-0", "item-3", t1 + 1)])
    assert client.roll_back() == FIRST
    found = client.recommend("user-0", timestamp_us=t1 + 1)
    assert found.release == FIRST
    assert ids(found) == old.best(
        old.scores(old.step(old.states["user-0"], "item-1"), "item-2", "item-3"), 10
    )
    listed = client.releases()
    assert listed.serving == FIRST
    assert [(one.number, one.is_current, one.is_previous) for one in listed.releases] == [
        (SECOND, False, True),
        (FIRST, True, False),
    ]


def test_a_damaged_release_is_refused_and_the_old_one_serves_on(
    toy_repository, triton, start_sidecar
):
    toy_repository.publish(FIRST, seed=1)
    toy_repository.publish(SECOND, seed=2, activate=False)
    running = start_sidecar(toy_repository, triton.grpc_url)
    model = toy_repository.repository.model_path("tcn", SECOND)
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with pytest.raises(ReleaseError, match=r"tcn/2026010201/model\.onnx"):
        running.client.activate(SECOND)
    with pytest.raises(ReleaseError, match="no release 77"):
        running.client.activate(77)
    with pytest.raises(InputError, match="release is -1"):
        running.client.activate(-1)
    with pytest.raises(ReleaseError, match="no previous release"):
        running.client.roll_back()
    found = running.client.recommend("user-0")
    assert (found.release, found.fallback) == (FIRST, False)
    assert toy_repository.repository.current() == FIRST
    assert running.value("hiertcn_activations_total", result="refused") == 2


def test_the_repositorys_pointer_is_followed(toy_repository, triton, start_sidecar):
    toy_repository.publish(FIRST, seed=1)
    running = start_sidecar(toy_repository, triton.grpc_url)
    toy_repository.publish(SECOND, seed=2)
    until(lambda: running.client.recommend("user-0").release == SECOND)
    toy_repository.repository.roll_back()
    until(lambda: running.client.recommend("user-0").release == FIRST)


def test_without_triton_a_simpler_ranking_answers_until_it_is_back(
    toy_repository, triton, start_sidecar
):
    toy = toy_repository.publish(FIRST, seed=1)
    running = start_sidecar(toy_repository, triton.grpc_url, model_deadline_s=1.0)
    client = running.client
    t0 = toy.watermark_us + HOUR_US
    client.record([Interaction("ada", "item-1", t0), Interaction("ada", "item-2", t0 + 1)])
    triton.stop()

    mean = toy.vectors[toy.rows("item-1", "item-2")].mean(axis=0)
    by_session = client.recommend("ada", timestamp_us=t0 + 1)
    assert by_session.fallback
    assert ids(by_session) == toy.best(toy.vectors @ mean, 10)
    # The session has closed, but it cannot be folded now: it still is the best hint.
    assert ids(client.recommend("ada", timestamp_us=t0 + DAY_US)) == ids(by_session)
    by_popularity = client.recommend("nobody", exclude=toy.best(toy.popularity, 3))
    assert by_popularity.fallback
    assert ids(by_popularity) == toy.best(toy.popularity, 13)[3:]
    candidates = toy.item_ids[:5]
    ranked = client.recommend("nobody", candidates=candidates)
    assert ids(ranked) == [item for item in toy.best(toy.popularity, 50) if item in candidates]
    assert client.record([Interaction("ada", "item-3", t0 + 2)]).accepted == 1

    triton.start()
    triton.wait_ready()
    until(lambda: not client.recommend("ada", timestamp_us=t0 + DAY_US).fallback)
    found = client.recommend("ada", timestamp_us=t0 + DAY_US)
    state = toy.step(toy.start_state, "item-1", "item-2", "item-3")
    assert ids(found) == toy.best(toy.scores(state), 10)
    assert running.value("hiertcn_fallbacks_total", ranking="popularity") == 2


def test_no_current_release_refuses_to_start(toy_repository, triton, start_sidecar):
    toy_repository.publish(FIRST, activate=False)
    with pytest.raises(ReleaseError, match="no current release"):
        start_sidecar(toy_repository, triton.grpc_url)


def test_no_triton_refuses_to_start(toy_repository, start_sidecar):
    from hiertcn.errors import ServingError

    toy_repository.publish(FIRST)
    with pytest.raises(ServingError, match=r"127\.0\.0\.1:1 "):
        start_sidecar(toy_repository, "127.0.0.1:1")
