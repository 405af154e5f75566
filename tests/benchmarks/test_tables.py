import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import paper_numbers
from benchmarks.tables_data import Setting, part_of
from benchmarks.tables_rows import Budget, Made, counting, measure
from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import build_requests
from hiertcn.sessions.split import Split
from hiertcn.training.options import TrainOptions
from models.counting import Popularity
from tests.evaluation.stores import nested_users, store_of
from tests.session_logs import random_users, write_store, write_table


def nested(store):
    """A store as users' lists of sessions of (item, time, shown)."""
    users = []
    for first, last in zip(store.user_offsets, store.user_offsets[1:], strict=False):
        user = []
        for session in range(first, last):
            places = range(store.session_offsets[session], store.session_offsets[session + 1])
            user.append(
                [
                    (
                        int(store.item_rows[at]),
                        int(store.timestamps_us[at]),
                        store.impressions(np.array([at]))[0].tolist(),
                    )
                    for at in places
                ]
            )
        users.append(user)
    return users


@settings(max_examples=40)
@given(nested_users(), st.integers(0, 1000))
def test_a_part_holds_the_kept_sessions_with_what_was_shown(users, seed):
    store = store_of(users)
    kept = np.random.default_rng(seed).random(store.meta.sessions) < 0.5
    expected, at = [], 0
    for user in users:
        of_user = [session for number, session in enumerate(user) if kept[at + number]]
        at += len(user)
        if of_user:
            expected.append(of_user)
    if not expected:
        with pytest.raises(InputError, match="no session of"):
            part_of(store, kept)
        return
    part = part_of(store, kept)
    assert nested(part) == expected
    assert part.meta.interactions == len(part.item_rows)
    assert part.meta.users == len(expected)


def test_a_measured_row_is_not_measured_again(tmp_path):
    store = write_store(tmp_path, random_users(np.random.default_rng(0), users=20, items=9), 9)
    setting = Setting(
        name="warm",
        training=store,
        split=Split(validation_start_us=0, test_start_us=1),
        store=store,
        requests=build_requests(store),
        table=write_table(tmp_path / "table", 9, 4),
        note="",
    )
    budget = Budget(train=TrainOptions(max_steps=3))
    made = []

    def build(*arguments) -> Made:
        made.append(arguments)
        return counting(lambda s: Popularity(s.store, 9))(*arguments)

    first = measure("popularity", build, setting, budget, tmp_path / "rows")
    again = measure("popularity", build, setting, budget, tmp_path / "rows")
    assert len(made) == 1
    assert (first.ranks == again.ranks).all()
    assert first.facts == again.facts
    assert len(first.ranks) == len(setting.requests)
    other = Budget(train=TrainOptions(max_steps=4))
    measure("popularity", build, setting, other, tmp_path / "rows")
    assert len(made) == 2


def test_numbers_of_the_paper_are_where_it_printed_them():
    cold = paper_numbers.COLD_START
    assert cold["XING"]["GRU"] == {"recall@10": 0.124, "mrr": 0.043, "mrp": 0.141}
    assert cold["XING"]["MV"] == {"recall@10": 0.107}
    assert cold["Pinterest"]["HRNN"]["recall@5"] == 0.619
    assert paper_numbers.WARM_START["Pinterest"]["TCN"]["mrr"] == 0.379
    assert paper_numbers.LOSSES["Pinterest"]["hinge"]["mrp"] == 0.309
    assert paper_numbers.REGULARIZATION["XING"]["dropout + batch norm"]["mrr"] == 0.075
