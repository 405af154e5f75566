import numpy as np
import pytest

from hiertcn.errors import InputError
from hiertcn.sessions.split import split_by_time
from tests.session_logs import DAY_US, START_US, write_store


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
