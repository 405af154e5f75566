"""Folding and forgetting in the background, on the models in this process."""

import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest

from hiertcn.serving.client import Interaction
from hiertcn.serving.records.record import NEVER_US, new_record, user_key
from hiertcn.serving.records.sweeper import Sweeper, last_seen_us
from hiertcn.serving.stores.store import Change
from hiertcn.serving.stores.store_lmdb import LmdbStore

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
T0 = 1_767_225_600_000_000 + HOUR_US
USERS = [f"s{n}" for n in range(40)]


@pytest.fixture
def parts(shared_toy, start_sidecar):
    """A sidecar without a sweeper of its own, and one to be stepped by hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweeper, "run", lambda self: asyncio.sleep(3600))
        running = start_sidecar(shared_toy, "", models="in-process", fsync="os")
        yield running, running.sidecar.sweeper
        running.stop()


def swept(running, sweeper, now_us=T0):
    """One whole pass, kept."""

    async def run():
        while not await sweeper.step(now_us):
            pass
        await sweeper._writer.caught_up()

    running.run(run())


def state_of(running, user):
    record = running.sidecar.store.get(user_key(user))
    return record.state, record.folded_until_us


def test_due_users_are_folded_in_one_call_and_once(parts, shared_toy):
    running, sweeper = parts
    toy = shared_toy.toys[2026010101]
    running.client.record([Interaction(user, "item-1", T0) for user in USERS])
    running.client.record([Interaction(user, "item-2", T0 + SECOND_US) for user in USERS])
    running.client.record([Interaction("late", "item-3", T0 + HOUR_US)])
    running.client.recommend("late", timestamp_us=T0 + HOUR_US)
    swept(running, sweeper)
    # Idle for an hour only: interactions may still come in late.
    assert running.value("hiertcn_sessions_folded_total") == 0
    running.client.record([Interaction("late", "item-3", T0 + 2 * HOUR_US)])
    running.client.recommend("other", timestamp_us=T0 + 2 * HOUR_US)
    swept(running, sweeper)
    swept(running, sweeper)
    assert running.value("hiertcn_model_batch_count", model="gru_step") == 1
    # Also the earlier session of "late", which the newer one has closed.
    assert running.value("hiertcn_sessions_folded_total") == len(USERS) + 1
    for user in USERS:
        state, until_us = state_of(running, user)
        np.testing.assert_allclose(
            state, toy.step(toy.start_state, "item-1", "item-2"), rtol=1e-5, atol=1e-6
        )
        assert until_us == T0 + SECOND_US
    assert state_of(running, "late")[1] == T0 + HOUR_US


def test_a_user_who_acts_meanwhile_keeps_the_interaction(parts):
    running, sweeper = parts
    running.client.record([Interaction("ada", "item-1", T0)])
    running.client.record([Interaction("bob", "item-1", T0 + 3 * HOUR_US)])
    running.client.recommend("bob", timestamp_us=T0 + 3 * HOUR_US)
    kept, keep_fold = [], sweeper._writer.keep_fold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeper._writer, "keep_fold", lambda *fold: kept.append(fold))
        swept(running, sweeper)
    running.client.record([Interaction("ada", "item-2", T0 + 3 * HOUR_US)])
    # What was folded before is handed over too late.
    for fold in kept:
        keep_fold(*fold)
    swept(running, sweeper)
    journal = running.client.get_user("ada").journal
    assert [entry.item_id for entry in journal] == ["item-1", "item-2"]
    assert state_of(running, "ada")[1] == T0


def test_a_fold_that_came_too_late_does_not_stand_in_for_the_one_behind_it(parts):
    running, sweeper = parts
    running.client.record([Interaction("ada", "item-1", T0)])
    running.client.record([Interaction("bob", "item-1", T0 + 3 * HOUR_US)])
    record = running.sidecar.store.get(user_key("ada"))
    outdated = dataclasses.replace(record, folded_until_us=T0 - 1)
    folded = dataclasses.replace(record, revision=record.revision + 1, folded_until_us=T0)
    both_wait, write = threading.Event(), running.sidecar.store.write

    def slow(*arguments):
        assert both_wait.wait(60)
        return write(*arguments)

    async def keep():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running.sidecar.store, "write", slow)
            # While the thread is busy with one job, the two behind it gather.
            sweeper._writer.keep_fold(user_key("bob"), 0, folded)
            sweeper._writer.keep_fold(user_key("ada"), record.revision - 1, outdated)
            sweeper._writer.keep_fold(user_key("ada"), record.revision, folded)
            both_wait.set()
            await sweeper._writer.caught_up()

    running.run(keep())
    assert state_of(running, "ada")[1] == T0


def test_idle_users_and_old_deletions_are_forgotten(parts):
    running, sweeper = parts
    now_us = time.time_ns() // 1000
    running.client.record([Interaction("idle", "item-1", T0), Interaction("new", "item-1", now_us)])
    running.client.delete_user("user-3")
    sweeper._ttl_us = HOUR_US
    swept(running, sweeper, now_us)
    store = running.sidecar.store
    found = store.get_many([user_key(user) for user in ("idle", "new", "user-3")])
    # The serving snapshot still knows the deleted user.
    assert [record is not None for record in found] == [False, True, True]
    assert running.client.get_user("user-3") is None
    bound = dataclasses.replace(sweeper._current()[1], oldest_watermark_us=now_us * 2)
    release = sweeper._current()[0]
    sweeper._current = lambda: (release, bound)
    swept(running, sweeper, now_us)
    assert store.get(user_key("user-3")) is None


def test_a_store_past_its_limit_forgets_the_longest_idle(parts):
    running, sweeper = parts
    users = [f"l{n}" for n in range(300)]
    # Records of half a page, as those of a real model are.
    long = "x" * 500
    for m, user in enumerate(users):
        running.client.record([Interaction(user, f"{long}{n}", T0 + m) for n in range(5)])
    sweeper._limit_bytes = sweeper._store.live_bytes // 2
    swept(running, sweeper)
    swept(running, sweeper)
    assert sweeper._store.live_bytes <= sweeper._limit_bytes
    left = [user for user in users if running.sidecar.store.get(user_key(user))]
    assert left == users[-len(left) :]
    assert 90 < len(left) <= 150


def test_a_records_last_time_is_that_of_any_part(tmp_path):
    record = new_record(np.zeros((1, 1), np.float32))
    assert last_seen_us(record) == NEVER_US
    assert last_seen_us(dataclasses.replace(record, folded_until_us=7)) == 7
    history = np.array([3, 9])
    assert last_seen_us(dataclasses.replace(record, history_timestamps_us=history)) == 9
    store = LmdbStore(tmp_path / "store")
    assert store.live_bytes == 0
    store.write({user_key("ada"): Change(record, None)})
    assert store.live_bytes > 0
    store.close()
