import numpy as np
import pytest

from hiertcn.errors import InputError
from hiertcn.items.index import IdIndex
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.split import split_by_time, split_by_user
from hiertcn.sessions.store import SessionStore
from tests.session_logs import DAY_US, START_US, write_events, write_store


def test_parts_hold_their_shares_of_sessions(tmp_path):
    store = write_store(tmp_path, [[[0]] * 10 for _ in range(10)], items=1)
    split = split_by_time(store, validation_fraction=0.1, test_fraction=0.2)
    starts = store.session_starts_us()
    training = starts < split.validation_start_us
    test = starts >= split.test_start_us
    assert (training.sum(), test.sum(), len(starts)) == (70, 20, 100)
    # 70 sessions start in the first seven days.
    assert split.validation_start_us == START_US + 7 * DAY_US


def test_every_part_gets_a_session_where_shares_are_tiny(tmp_path):
    store = write_store(tmp_path, [[[0], [0], [0]]], items=1)
    split = split_by_time(store, 0.01, 0.01)
    starts = store.session_starts_us()
    assert split.validation_start_us == starts[1] and split.test_start_us == starts[2]


def test_sessions_of_one_time_stay_together(tmp_path):
    store = write_store(tmp_path, [[[0]] * 4 for _ in range(3)], items=1)
    store.timestamps_us = np.sort(store.timestamps_us // DAY_US * DAY_US)
    split = split_by_time(store, 0.3, 0.3)
    assert len(np.unique(store.timestamps_us)) == 4
    assert {split.validation_start_us, split.test_start_us} <= set(store.timestamps_us.tolist())
    assert split.validation_start_us < split.test_start_us


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [(0.0, 0.1, "validation_fraction"), (0.1, 1.0, "test_fraction"), (0.5, 0.5, "nothing to tr")],
)
def test_shares_are_checked(tmp_path, validation, test, message):
    store = write_store(tmp_path, [[[0], [0], [0]]], items=1)
    with pytest.raises(InputError, match=message):
        split_by_time(store, validation, test)


def test_a_log_too_short_to_split_is_refused(tmp_path):
    store = write_store(tmp_path, [[[0, 0], [0]]], items=1)
    with pytest.raises(InputError, match="2 distinct times"):
        split_by_time(store)


def test_users_fall_into_parts_of_about_the_given_shares(tmp_path):
    store = write_store(tmp_path, [[[0]] for _ in range(3000)], items=1)
    split = split_by_user(store)
    parts = (split.training, split.validation, split.test)
    assert sorted(np.concatenate(parts).tolist()) == list(range(3000))
    # 300 of 3000 users: a standard deviation is 16.
    assert abs(len(split.validation) - 300) < 70
    assert abs(len(split.test) - 300) < 70
    again = split_by_user(store)
    assert (again.test == split.test).all()
    other = split_by_user(store, seed=1)
    both = np.intersect1d(split.test, other.test)
    assert 5 < len(both) < 65


def test_a_users_part_does_not_depend_on_the_rest_of_the_log(tmp_path):
    def part_of(users):
        folder = tmp_path / str(len(users))
        rows = [
            {"user_id": user, "item_id": "i0", "timestamp": START_US + at * 1_000_000}
            for at, user in enumerate(users)
        ]
        index = IdIndex.build(["i0"], folder / "index")
        build_sessions(write_events(folder / "events", rows), index, folder / "store")
        store = SessionStore.open(folder / "store")
        split = split_by_user(store, 0.3, 0.3, seed=7)
        ids = store.user_ids.to_pylist()
        return {
            ids[user]: part
            for part in ("training", "validation", "test")
            for user in getattr(split, part).tolist()
        }

    few = part_of([f"u{user}" for user in range(0, 60, 2)])
    many = part_of([f"u{user}" for user in reversed(range(200))])
    assert len(many) == 200
    assert few == {user: many[user] for user in few}


@pytest.mark.parametrize(
    ("shares", "message"),
    [((0.0, 0.1), "validation_fraction"), ((0.1, 1.0), "test_fraction"), ((0.6, 0.4), "nothing")],
)
def test_shares_of_users_are_checked(tmp_path, shares, message):
    store = write_store(tmp_path, [[[0]]], items=1)
    with pytest.raises(InputError, match=message):
        split_by_user(store, *shares)


def test_too_few_users_for_three_parts_are_refused(tmp_path):
    store = write_store(tmp_path, [[[0]], [[0]]], items=1)
    with pytest.raises(InputError, match="none of the 2 users"):
        split_by_user(store)
