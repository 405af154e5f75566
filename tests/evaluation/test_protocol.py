import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import MAX_REQUESTS_PER_CALL, build_requests
from tests.evaluation.stores import nested_users, store_of


def slow_requests(users, start_us, end_us):
    """(user, session, interaction, position, item) of every interaction to predict."""
    expected, session_index, interaction_index = [], 0, 0
    for user_index, user in enumerate(users):
        for session in user:
            begins = session[0][1]
            for position, (item, _, _) in enumerate(session):
                if start_us <= begins and (end_us is None or begins < end_us):
                    expected.append((user_index, session_index, interaction_index, position, item))
                interaction_index += 1
            session_index += 1
    return expected


def rows_of(requests):
    columns = ("user", "session", "interaction", "position", "target_row")
    return list(zip(*(getattr(requests, name).tolist() for name in columns), strict=True))


@given(nested_users(), st.integers(0, 60), st.none() | st.integers(1, 60))
def test_every_interaction_of_a_session_that_starts_in_the_range_is_asked(users, start, length):
    end = None if length is None else start + length
    requests = build_requests(store_of(users), start, end)
    assert rows_of(requests) == slow_requests(users, start, end)


@given(nested_users())
def test_input_is_what_the_user_did_before(users):
    store = store_of(users)
    requests = build_requests(store, 0)
    begin, running = requests.history_start(store), requests.session_start()
    at = 0
    for user in users:
        before = []
        for session in user:
            for position, (item, _, _) in enumerate(session):
                history = store.item_rows[begin[at] : requests.interaction[at]].tolist()
                assert history == before
                open_session = store.item_rows[running[at] : requests.interaction[at]].tolist()
                assert open_session == [row for row, _, _ in session[:position]]
                before.append(item)
                at += 1


def test_users_and_sessions_without_interactions_are_skipped():
    store = store_of([[], [[(1, 5, [])], [], [(2, 9, [])]], []])
    assert rows_of(build_requests(store, 0)) == [(1, 0, 0, 0, 1), (1, 2, 1, 0, 2)]


def test_sample_is_uniform_ordered_and_decided_by_the_seed():
    users = [[[(item, 10 * user, []) for item in range(5)]] for user in range(40)]
    store = store_of(users)
    everything = build_requests(store, 0)
    sample = build_requests(store, 0, max_requests=50, seed=3)
    assert len(sample) == 50
    assert set(rows_of(sample)) <= set(rows_of(everything))
    assert (np.diff(sample.interaction) > 0).all()
    assert rows_of(sample) == rows_of(build_requests(store, 0, max_requests=50, seed=3))
    assert rows_of(sample) != rows_of(build_requests(store, 0, max_requests=50, seed=4))
    assert rows_of(build_requests(store, 0, max_requests=10_000)) == rows_of(everything)
    picked = np.zeros(200)
    for seed in range(400):
        picked[build_requests(store, 0, max_requests=50, seed=seed).interaction] += 1
    # 400 draws of 50 of 200: mean 100, standard deviation 8.7.
    assert picked.min() > 60
    assert picked.max() < 140


@given(nested_users(), st.lists(st.integers(0, 4), max_size=6), st.integers(0, 40))
def test_only_the_given_users_are_asked_about(users, chosen, start):
    chosen = [user for user in chosen if user < len(users)]
    store = store_of(users)
    expected = [row for row in slow_requests(users, start, None) if row[0] in chosen]
    found = build_requests(store, start, users=np.array(chosen, dtype=np.int64))
    assert rows_of(found) == expected


def test_without_a_start_all_sessions_are_asked():
    store = store_of([[[(1, -5, [])], [(2, 3, [])]]])
    assert rows_of(build_requests(store)) == [(0, 0, 0, 0, 1), (0, 1, 1, 0, 2)]
    assert rows_of(build_requests(store, end_us=0)) == [(0, 0, 0, 0, 1)]


def test_a_user_outside_the_store_is_named():
    with pytest.raises(InputError, match="user 1 is not in the store; expected 0 to 0"):
        build_requests(store_of([[[(1, 5, [])]]]), users=np.array([0, 1]))


def test_nothing_in_the_range_is_no_request():
    requests = build_requests(store_of([[[(1, 5, [])]]]), 6)
    assert len(requests) == 0
    assert requests.target_row.dtype == np.int32
    assert requests.interaction.dtype == np.int64


def test_slices_cover_all_requests_in_order():
    store = store_of([[[(1, 5, [])] * 1100]])
    requests = build_requests(store, 0)
    parts = list(requests.slices())
    assert [len(part) for part in parts] == [512, 512, 76]
    assert MAX_REQUESTS_PER_CALL == 512
    assert np.concatenate([part.interaction for part in parts]).tolist() == list(range(1100))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"start_us": 9, "end_us": 9}, "ends at 9 us, which is not after its start 9 us"),
        ({"start_us": 0, "max_requests": 0}, "max_requests is 0; expected"),
    ],
)
def test_bad_arguments_are_named(arguments, told):
    with pytest.raises(InputError, match=told):
        build_requests(store_of([[[(1, 5, [])]]]), **arguments)
