"""Both forms of the newest transitions find what a scan of all of them finds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.serving.live.live_followers import LiveFollowers
from hiertcn.sessions.live_transitions import (
    NEWEST,
    START,
    WINDOW_US,
    live_transitions,
    newest_followers,
)
from tests.session_logs import MINUTE_US, START_US, write_store

ITEMS = 4


def found(live, item, now_us):
    followers = np.empty(NEWEST, np.int32)
    return followers[: newest_followers(live, item, now_us, followers)].tolist()


def reference(moves, item, now_us):
    """Followers, newest first, of ``(time, left, gone on to)`` in the order of time."""
    return [
        follower
        for at_us, left, follower in reversed(moves)
        if left == item and now_us - WINDOW_US <= at_us < now_us
    ][:NEWEST]


moves = st.lists(
    st.tuples(
        st.integers(0, 200).map(lambda minutes: START_US + minutes * MINUTE_US),
        st.integers(START, ITEMS - 1),
        st.integers(0, ITEMS - 1),
    ),
    max_size=300,
).map(lambda found: sorted(found, key=lambda one: one[0]))


def linked(moves, most):
    live = LiveFollowers(ITEMS, most=most)
    # In two groups, as they arrive.
    for part in (moves[: len(moves) // 3], moves[len(moves) // 3 :]):
        times_us, left, followed = np.array(part, np.int64).reshape(-1, 3).T
        live.add(left, followed, times_us)
    return live.arrays


@settings(max_examples=60)
@given(moves, st.integers(0, 260))
def test_linked_transitions_equal_a_scan(moves, minutes):
    now_us = START_US + minutes * MINUTE_US
    live = linked(moves, most=1000)
    for item in range(START, ITEMS):
        assert found(live, item, now_us) == reference(moves, item, now_us)
    assert found(live, ITEMS, now_us) == []


@settings(max_examples=60)
@given(moves, st.integers(1, 40))
def test_only_the_newest_are_kept(moves, most):
    now_us = START_US + 201 * MINUTE_US
    live = linked(moves, most)
    for item in range(START, ITEMS):
        assert found(live, item, now_us) == reference(moves[-most:], item, now_us)


def test_a_store_gives_what_its_sessions_moved_on_to(tmp_path):
    rng = np.random.default_rng(0)
    users = [[rng.integers(0, ITEMS, 8).tolist() for _ in range(2)] for _ in range(40)]
    store = write_store(tmp_path, users, ITEMS)
    moves = []
    for place in range(store.meta.interactions):
        begins = place in store.session_offsets
        left = START if begins else int(store.item_rows[place - 1])
        moves.append((int(store.timestamps_us[place]), left, int(store.item_rows[place])))
    moves.sort(key=lambda one: one[0])
    live = live_transitions(store, ITEMS)
    # Sessions begin within a minute and last seven: there are more than NEWEST of one item.
    for now_us in range(START_US, START_US + 90 * MINUTE_US, MINUTE_US // 3):
        for item in range(START, ITEMS):
            assert found(live, item, now_us) == reference(moves, item, now_us)


def test_new_items_make_room_and_lose_nothing():
    live = LiveFollowers(2)
    live.add(np.array([1, START]), np.array([0, 1]), np.array([START_US, START_US]))
    live.widen(5)
    live.add(np.array([4]), np.array([1]), np.array([START_US]))
    assert found(live.arrays, 1, START_US + 1) == [0]
    assert found(live.arrays, START, START_US + 1) == [1]
    assert found(live.arrays, 4, START_US + 1) == [1]
