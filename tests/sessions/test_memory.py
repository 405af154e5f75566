"""Features of requests against definitions written out as plain loops."""

import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.sessions import live_transitions
from hiertcn.sessions.live_counts import (
    MINUTE_US,
    SMOOTHING,
    WINDOWS_MINUTES,
    LiveShares,
    minute_counts,
)
from hiertcn.sessions.live_transitions import START, WINDOW_US
from hiertcn.sessions.memory import Histories, MemoryFeatures, histories_before
from hiertcn.sessions.request_features import FEATURES, RequestFeatures
from hiertcn.sessions.transitions import TransitionOptions, TransitionTable, count_transitions
from tests.session_logs import write_store

ITEMS = 6

USERS = st.lists(
    st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=7), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Return a function that cuts a store of the given users, each in a folder of its own."""
    counter = iter(range(10_000))

    def cut(users, items=ITEMS):
        return write_store(tmp_path_factory.mktemp(f"store{next(counter)}"), users, items)

    return cut


def reference_transitions(users, options):
    weights = defaultdict(Counter)
    for user in users:
        for session in user:
            for place, item in enumerate(session):
                for gap in range(1, options.reach + 1):
                    if place + gap < len(session):
                        weights[item][session[place + gap]] += options.decay ** (gap - 1)
    return weights


@settings(max_examples=30)
@given(users=USERS, reach=st.integers(1, 4), most=st.integers(1, 6))
def test_transitions_equal_counting_by_hand(stores, users, reach, most):
    options = TransitionOptions(reach=reach, decay=0.5, most=most)
    table = count_transitions(stores(users), ITEMS, options)
    expected = reference_transitions(users, options)
    for item in range(ITEMS):
        found = slice(table.offsets[item], table.offsets[item + 1])
        assert table.totals[item] == pytest.approx(sum(expected[item].values()))
        heaviest = sorted(expected[item].items(), key=lambda pair: (-pair[1], pair[0]))[:most]
        assert list(zip(table.followers[found], table.weights[found], strict=True)) == [
            (follower, pytest.approx(weight)) for follower, weight in heaviest
        ]


def test_sessions_from_the_end_on_do_not_count(stores):
    store = stores([[[0, 1], [2, 3]], [[4, 5]]])
    second_day = store.session_starts_us()[1]
    table = count_transitions(store, ITEMS, end_us=int(second_day))
    assert np.flatnonzero(table.totals).tolist() == [0, 4]


def test_a_saved_table_opens_equal_and_a_damaged_one_is_named(stores, tmp_path):
    table = count_transitions(stores([[[0, 1, 2, 1]]]), ITEMS)
    table.save(tmp_path / "transitions")
    opened = TransitionTable.open(tmp_path / "transitions")
    assert opened.options == table.options
    np.testing.assert_array_equal(opened.weights, table.weights)
    (tmp_path / "transitions" / "weights.npy").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"weights\.npy cannot be mapped"):
        TransitionTable.open(tmp_path / "transitions")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reach": 0}, "reach is 0"), ({"decay": 1.5}, "decay is 1.5"), ({"most": 0}, "most is 0")],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(InputError, match=message):
        TransitionOptions(**options)


def reference_live(moves, running, now_us):
    """Shares ``[items]`` of what others went on to from the last items of ``running``.

    Of what they began with, where nothing runs. ``moves``: of all sessions, ``(time, item left or
    START, item gone on to)``, by time.
    """
    shares = np.zeros(ITEMS)
    for back, item in enumerate(reversed(running[-3:] or [START])):
        followers = [
            follower
            for at_us, left, follower in moves
            if left == item and now_us - WINDOW_US <= at_us < now_us
        ][-live_transitions.NEWEST :]
        for follower in followers:
            shares[follower] += 0.3**back / (len(followers) + live_transitions.SMOOTHING)
    return shares


def moves_of(store):
    sessions = np.searchsorted(
        store.session_offsets, np.arange(store.meta.interactions), side="right"
    )
    rows, times = store.item_rows.tolist(), store.timestamps_us.tolist()
    moves = [
        (times[at], rows[at - 1] if at and sessions[at] == sessions[at - 1] else START, rows[at])
        for at in range(len(rows))
    ]
    return sorted(moves, key=lambda one: one[0])


def reference_features(past, running, table):
    """Features ``[6, items]`` after the sessions ``past`` and the items ``running``.

    The last one, of what is live, stays 0.
    """
    features = np.zeros((6, ITEMS))
    shares = defaultdict(dict)
    for item in range(ITEMS):
        for entry in range(table.offsets[item], table.offsets[item + 1]):
            shares[item][int(table.followers[entry])] = float(table.weights[entry])
    flat = [item for session in past for item in session]
    context = (running or flat)[-12:]
    norm = sum(0.3**back for back in range(len(context)))
    for back, item in enumerate(reversed(context)):
        if table.totals[item] == 0:
            continue
        for follower, weight in shares[item].items():
            features[0, follower] += 0.3**back / norm * weight / table.totals[item]

    sessions = [*past, running]
    for back in range(1, 4):
        weight = 0.3 ** (back - 1)
        if back > len(running):
            for session in past:
                for gap, follower in enumerate(session[:4]):
                    features[1, follower] += weight * 0.5**gap
            break
        item = running[-back]
        for number, session in enumerate(sessions):
            for place, other in enumerate(session):
                if other != item or (number == len(past) and place >= len(running) - back):
                    continue
                for gap, follower in enumerate(session[place + 1 : place + 5]):
                    features[1, follower] += weight * 0.5**gap

    features[1] /= features[1].sum() + 1.0
    weights = [0.8 ** (len(past) - 1 - number) for number in range(len(past))]
    total = sum(weight * len(session) for weight, session in zip(weights, past, strict=True))
    for weight, session in zip(weights, past, strict=True):
        for item in session:
            features[2, item] += weight / total
    for item in running:
        features[3, item] = 1.0
    for item in {item for session in past for item in session}:
        features[4, item] = features[0, item]
    return features


@settings(max_examples=40)
@given(users=USERS)
def test_memory_equals_its_definition(stores, users):
    store = stores(users)
    table = count_transitions(store, ITEMS, TransitionOptions(reach=3, decay=0.5))
    interactions = np.arange(store.meta.interactions)
    sessions = np.searchsorted(store.session_offsets, interactions, side="right") - 1
    histories = histories_before(store, sessions, interactions)
    live = live_transitions.live_transitions(store, ITEMS)
    found = MemoryFeatures(table, live).of_catalogue(histories)

    moves = moves_of(store)
    request = 0
    for user in users:
        for number, session in enumerate(user):
            for place in range(len(session)):
                expected = reference_features(user[:number], session[:place], table)
                now_us = store.timestamps_us[request]
                expected[5] = reference_live(moves, session[:place], now_us)
                np.testing.assert_allclose(found[:, request], expected, atol=1e-5)
                request += 1


@settings(max_examples=20)
@given(users=USERS, seed=st.integers(0, 100))
def test_asked_items_have_the_catalogues_features_and_support_is_complete(stores, users, seed):
    store = stores(users)
    live = live_transitions.live_transitions(store, ITEMS)
    features = MemoryFeatures(count_transitions(store, ITEMS), live)
    interactions = np.arange(store.meta.interactions)
    sessions = np.searchsorted(store.session_offsets, interactions, side="right") - 1
    histories = histories_before(store, sessions, interactions)
    whole = features.of_catalogue(histories)
    rows = np.random.default_rng(seed).integers(-1, ITEMS, (len(interactions), 4))
    asked = features.of_items(histories, rows)
    taken = np.take_along_axis(whole, np.broadcast_to(np.maximum(rows, 0), asked.shape), axis=2)
    np.testing.assert_array_equal(asked, taken * (rows >= 0))
    weights = np.random.default_rng(seed + 1).random((len(interactions), 6), np.float32)
    sums, in_session = features.weighed(histories, rows, weights)
    np.testing.assert_allclose(sums, np.einsum("rf,frc->rc", weights, asked), rtol=1e-5)
    np.testing.assert_array_equal(in_session, asked[3])
    for request, line in enumerate(features.support(histories, ITEMS)):
        assert sorted(line[line >= 0]) == np.flatnonzero(whole[:, request].any(axis=0)).tolist()


@settings(max_examples=20)
@given(users=USERS, known=st.integers(1, ITEMS))
def test_items_past_the_table_are_items_that_nothing_is_known_to_follow(stores, users, known):
    store = stores(users)
    table = count_transitions(store, known)
    padded = dataclasses.replace(
        table,
        offsets=np.pad(table.offsets, (0, ITEMS - known), mode="edge"),
        totals=np.pad(table.totals, (0, ITEMS - known)),
    )
    interactions = np.arange(store.meta.interactions)
    sessions = np.searchsorted(store.session_offsets, interactions, side="right") - 1
    histories = histories_before(store, sessions, interactions)
    found, expected = MemoryFeatures(table, items_past_table=True), MemoryFeatures(padded)
    rows = np.arange(-1, ITEMS)
    np.testing.assert_array_equal(
        found.of_items(histories, rows), expected.of_items(histories, rows)
    )
    np.testing.assert_array_equal(
        found.support(histories, ITEMS), expected.support(histories, ITEMS)
    )
    np.testing.assert_array_equal(
        found.of_catalogue(histories), expected.of_catalogue(histories)[:, :, :known]
    )


def test_nothing_depends_on_later_interactions_or_other_requests(stores):
    store = stores([[[0, 1, 2], [3, 4]], [[5, 0]]])
    longer = stores([[[0, 1, 2], [3, 4, 0, 1], [2]], [[5, 0]]])
    table = count_transitions(store, ITEMS)
    one = histories_before(store, np.array([1]), np.array([4]))
    many = histories_before(longer, np.array([1, 2, 1]), np.array([4, 7, 5]))
    features = MemoryFeatures(table)
    np.testing.assert_array_equal(
        features.of_catalogue(one)[:, 0], features.of_catalogue(many)[:, 0]
    )


def test_unknown_rows_keep_their_place_only():
    table = TransitionTable(
        options=TransitionOptions(),
        offsets=np.array([0, 1, 1]),
        followers=np.array([1], np.int32),
        weights=np.array([1.0], np.float32),
        totals=np.array([1.0, 0.0], np.float32),
    )
    histories = Histories(
        rows=np.array([0, 7, -1], np.int32),
        sessions=np.zeros(3, np.int64),
        offsets=np.array([0, 3]),
        running=np.array([3]),
        asked_us=np.array([0]),
    )
    found = MemoryFeatures(table).of_catalogue(histories)[:, 0]
    norm = 1.0 + 0.3 + 0.09
    np.testing.assert_allclose(found[0], [0.0, 0.09 / norm], atol=1e-6)
    np.testing.assert_array_equal(found[3], [1.0, 0.0])


@settings(max_examples=30)
@given(
    times=st.lists(st.integers(0, 900 * 60), min_size=1, max_size=40),
    asked=st.lists(st.integers(0, 1000 * 60), min_size=1, max_size=10),
    seed=st.integers(0, 100),
)
def test_live_shares_equal_counting_by_hand(stores, times, asked, seed):
    store = stores([[[0] * len(times)]])
    rng = np.random.default_rng(seed)
    store.item_rows = rng.integers(0, ITEMS + 1, len(times)).astype(np.int32)
    store.timestamps_us = np.sort(np.array(times)) * 1_000_000
    moments = np.array(asked) * 1_000_000
    live = LiveShares(store, ITEMS)
    found = live.of_catalogue(moments)
    minutes, now = store.timestamps_us // MINUTE_US, moments // MINUTE_US
    for window, length in enumerate(WINDOWS_MINUTES):
        for request, minute in enumerate(now):
            inside = (minutes >= minute - length) & (minutes < minute)
            known = inside & (store.item_rows < ITEMS)
            expected = np.bincount(store.item_rows[known], minlength=ITEMS)
            share = expected / (expected.sum() + SMOOTHING)
            np.testing.assert_allclose(found[window, request], share, rtol=1e-5)
    rows = rng.integers(-1, ITEMS, 5)
    np.testing.assert_array_equal(
        live.of_items(moments, rows), found[:, :, np.maximum(rows, 0)] * (rows >= 0)
    )
    until = int(moments.max())
    minute, row, count = minute_counts(store, until, minutes=60)
    kept = (store.timestamps_us <= until) & (minutes > until // MINUTE_US - 60)
    expected_counts = Counter(
        zip(minutes[kept].tolist(), store.item_rows[kept].tolist(), strict=True)
    )
    pairs = zip(minute.tolist(), row.tolist(), strict=True)
    assert dict(zip(pairs, count.tolist(), strict=True)) == expected_counts


def test_request_features_choose_and_join_what_is_named(stores):
    store = stores([[[0, 1, 2, 3]], [[2, 3, 4]]])
    table = count_transitions(store, ITEMS)
    interactions = np.array([2, 6])
    sessions = np.array([0, 1])
    everything = RequestFeatures(FEATURES, store, table)
    sparse, context = everything.of_catalogue(sessions, interactions)
    dense = np.zeros((len(FEATURES), 2 * ITEMS), np.float32)
    dense[:, sparse.index] = sparse.values
    asked, same_context = everything.of_items(sessions, interactions, np.arange(ITEMS))
    np.testing.assert_array_equal(dense.reshape(asked.shape), asked)
    np.testing.assert_array_equal(context, same_context)
    some = RequestFeatures(("past_items", "live_1h"), store, table)
    chosen, _ = some.of_items(sessions, interactions, np.arange(ITEMS))
    np.testing.assert_array_equal(chosen, asked[[2, 6]])
    with pytest.raises(InputError, match="in this order"):
        RequestFeatures(("live_1h", "past_items"), store, table)
