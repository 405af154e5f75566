"""Active users are rebuilt for a new release by a process of its own, or at their next touch."""

import asyncio
import dataclasses
import io

import numpy as np
import pytest

from hiertcn.serving.client import Interaction
from hiertcn.serving.records import warmer
from hiertcn.serving.records.rebuilding import Rebuilding, rebuilt_records
from hiertcn.serving.records.record import user_key
from hiertcn.serving.releases import activation

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
T0 = 1_767_225_600_000_000 + HOUR_US
USERS = [f"s{n}" for n in range(40)]


@pytest.fixture(scope="module")
def server(start_redis):
    return start_redis()


@pytest.mark.parametrize("store", ["lmdb", "valkey", "lmdb, large"])
def test_a_new_release_finds_active_users_rebuilt(
    toy_repository, start_sidecar, server, tmp_path, monkeypatch, store
):
    toys = toy_repository
    toys.publish(2026010101)
    url = f"{server.url}?prefix={tmp_path.name}" if store == "valkey" else ""
    running = start_sidecar(toys, "", models="in-process", store=url)
    # What takes only idle processors may wait for one on a busy machine.
    running.sidecar.warmer._longest_s = 240.0
    if store == "lmdb, large":
        monkeypatch.setattr(warmer, "_FEW", 0)
        monkeypatch.setattr(activation, "_LARGE_BYTES", 0)
    for user in [*USERS, "user-1"]:
        running.client.record([Interaction(user, "item-1", T0)])
    running.client.record([Interaction("ada", "item-3", T0 + 2 * HOUR_US)])
    running.client.recommend("ada", timestamp_us=T0 + 2 * HOUR_US)
    newer = toys.publish(2026010201, seed=1, activate=False)
    running.client.activate(2026010201)
    running.run(running.sidecar.warmer.kept())
    store = running.sidecar.store
    records = {user: store.get(user_key(user)) for user in [*USERS, "user-1", "ada"]}
    assert {record.release for record in records.values()} == {2026010201}
    for user, record in records.items():
        start = newer.states.get(user, newer.start_state)
        expected = start if user == "ada" else newer.step(start, "item-1")
        np.testing.assert_allclose(record.state, expected, rtol=1e-5, atol=1e-6)
    assert running.value("hiertcn_warming") == 0
    folded = running.value("hiertcn_sessions_folded_total")
    found = running.client.recommend("s0", timestamp_us=T0 + 2 * HOUR_US)
    assert (found.release, running.value("hiertcn_sessions_folded_total")) == (2026010201, folded)


def test_a_sidecar_that_dies_between_staging_and_flip_folds_once(toy_repository, start_sidecar):
    toys = toy_repository
    toys.publish(2026010101)
    running = start_sidecar(toys, "", models="in-process")
    running.client.record([Interaction("ada", "item-1", T0)])
    running.client.record([Interaction("bob", "item-3", T0 + 3 * HOUR_US)])
    running.client.recommend("bob", timestamp_us=T0 + 3 * HOUR_US)
    newer = toys.publish(2026010201, seed=1, activate=False)
    staged = running.run(_staged(running, 2026010201))
    assert staged == 2
    assert running.sidecar.store.get(user_key("ada")).release == 2026010101
    running.stop()
    again = start_sidecar(toys, "", models="in-process")
    again.client.activate(2026010201)
    again.run(again.sidecar.warmer.kept())
    np.testing.assert_allclose(
        again.sidecar.store.get(user_key("ada")).state,
        newer.step(newer.start_state, "item-1"),
        rtol=1e-5,
        atol=1e-6,
    )


async def _staged(running, number):
    from hiertcn.release.repository import ReleaseRepository
    from hiertcn.serving.releases.serving_release import ServingRelease

    sidecar = running.sidecar
    await asyncio.to_thread(sidecar._activation._control.load, "gru_step", [2026010101, number])
    release = ServingRelease(
        ReleaseRepository(running.options.repository), number, sidecar._activation._recent
    )
    return await sidecar.warmer.stage(release)


@pytest.mark.parametrize("ends", ["at once", "in time", "before it begins"])
def test_a_flip_without_rebuilding_leaves_it_to_the_next_touch(
    toy_repository, start_sidecar, monkeypatch, ends
):
    toys = toy_repository
    toys.publish(2026010101)
    running = start_sidecar(toys, "", models="in-process")
    running.client.record([Interaction("ada", "item-1", T0)])
    running.client.record([Interaction("bob", "item-3", T0 + 3 * HOUR_US)])
    newer = toys.publish(2026010201, seed=1, activate=False)
    if ends == "at once":
        monkeypatch.setattr(warmer, "_PROGRAM", "no.such.program")
    elif ends == "in time":
        running.sidecar.warmer._longest_s = 0.0
    else:
        # As where there is no room for a file.
        gone = dataclasses.replace(running.options, state_dir=running.options.state_dir / "gone")
        running.sidecar.warmer._options = gone
    running.client.activate(2026010201)
    running.run(running.sidecar.warmer.kept())
    assert running.value("hiertcn_warming") == 0
    assert running.sidecar.store.get(user_key("ada")).release == 2026010101
    found = running.client.recommend("ada", timestamp_us=T0 + 3 * HOUR_US)
    assert (found.release, found.fallback) == (2026010201, False)
    running.run(running.sidecar.warmer._writer.caught_up())
    record = running.sidecar.store.get(user_key("ada"))
    expected = newer.step(newer.start_state, "item-1")
    np.testing.assert_allclose(record.state, expected, rtol=1e-5, atol=1e-6)


def test_who_acts_while_users_are_rebuilt_is_rebuilt_again(
    toy_repository, start_sidecar, monkeypatch
):
    toys = toy_repository
    toys.publish(2026010101)
    running = start_sidecar(toys, "", models="in-process")
    running.client.record([Interaction(user, "item-1", T0) for user in ("ada", "bob")])
    running.client.record([Interaction("eve", "item-3", T0 + 3 * HOUR_US)])
    newer = toys.publish(2026010201, seed=1, activate=False)
    stage = running.sidecar.warmer.stage

    async def overtaken(release):
        assert await stage(release) == 3
        late = [Interaction("ada", "item-2", T0 + SECOND_US)]
        assert (await asyncio.to_thread(running.client.record, late)).accepted == 1
        return 3

    monkeypatch.setattr(running.sidecar.warmer, "stage", overtaken)
    running.client.activate(2026010201)
    running.run(running.sidecar.warmer.kept())
    # Nobody has asked for them since.
    for user, session in (("ada", ("item-1", "item-2")), ("bob", ("item-1",))):
        record = running.sidecar.store.get(user_key(user))
        assert record.release == 2026010201
        expected = newer.step(newer.start_state, *session)
        np.testing.assert_allclose(record.state, expected, rtol=1e-5, atol=1e-6)


def test_what_was_cut_off_is_left_out(toy_repository, start_sidecar):
    toys = toy_repository
    toys.publish(2026010101)
    running = start_sidecar(toys, "", models="in-process")
    running.client.record([Interaction(user, "item-1", T0) for user in USERS])
    toys.publish(2026010201, seed=1, activate=False)
    assert running.run(_staged(running, 2026010201)) == len(USERS)
    staged = running.sidecar.warmer._staged
    whole = list(rebuilt_records(staged))
    assert {key for key, _, _ in whole} == {user_key(user) for user in USERS}
    staged.seek(0)
    written = staged.read()
    for size in (len(written) - 1, len(written) - len(whole[-1][2]) - 3, 5, 0):
        found = list(rebuilt_records(io.BytesIO(written[:size])))
        assert found == whole[: len(found)]
        assert len(found) < len(whole)


def test_rebuilding_is_asked_for_as_it_was_meant(toy_repository, start_sidecar):
    toys = toy_repository
    toys.publish(2026010101)
    running = start_sidecar(toys, "", models="in-process")
    asked = Rebuilding(
        sidecar=running.options,
        release=2026010101,
        active_since_us=T0,
        folded_until_us=T0 + 1,
        only_known=True,
        aside=False,
    )
    assert Rebuilding.from_json(asked.to_json()) == asked
