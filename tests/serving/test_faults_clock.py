"""The machine's clock jumps, forward and back, while the sidecar serves."""

import time

import pytest

from hiertcn.errors import InputError
from hiertcn.serving.client import Interaction

NUMBER = 2026010101
DAY_US = 86_400_000_000


@pytest.fixture
def clock(monkeypatch):
    """Call it to shift the wall clock by so many microseconds; the monotonic clock goes on.

    Not ``time.time``, which gRPC's Python layer compares with the clock of its C core.
    """
    real, shift = time.time_ns, [0]
    monkeypatch.setattr(time, "time_ns", lambda: real() + 1000 * shift[0])
    return lambda by_us: shift.__setitem__(0, by_us)


def test_jumps_of_the_clock_lose_nothing_and_harm_nobody_else(shared_toy, start_sidecar, clock):
    toy = shared_toy.toys[NUMBER]

    def started():
        return start_sidecar(shared_toy, "", models="in-process")

    def assert_sane(client, user, *session):
        # Now, as the sidecar's clock has it.
        found = client.recommend(user)
        assert [item.item_id for item in found.items] == toy.best(
            toy.scores(toy.start_state, *session), 10
        )
        assert not found.fallback

    running = started()
    client = running.client
    expected = []
    jumps_us = [0, -2 * DAY_US, 0, 30 * DAY_US, 0, -100 * DAY_US, 0]
    for n, jump_us in enumerate(jumps_us):
        clock(jump_us)
        # The wanderer is touched under every clock, each newcomer under one alone.
        assert client.record([Interaction("wanderer", f"item-{n}")]).accepted == 1
        assert not client.recommend("wanderer").fallback
        client.record([Interaction(f"newcomer-{n}", "item-7")])
        assert_sane(client, f"newcomer-{n}", "item-7")
        now_us = time.time_ns() // 1000
        with pytest.raises(InputError, match="more than one day in the future"):
            client.record([Interaction("ada", "item-1", now_us + 2 * DAY_US)])
        expected.append(f"item-{n}")
    assert sorted(one.item_id for one in client.get_user("wanderer").journal) == sorted(expected)
    assert_sane(client, "newcomer-6", "item-7")
    running.stop()
    for jump_us in (-3 * DAY_US, 400 * DAY_US, 0):
        clock(jump_us)
        running = started()
        journal = running.client.get_user("wanderer").journal
        assert sorted(one.item_id for one in journal) == sorted(expected)
        running.client.record([Interaction(f"later-{jump_us}", "item-8")])
        assert_sane(running.client, f"later-{jump_us}", "item-8")
        running.stop()
