"""Laws of every counting ranker: what it may see, what it answers, what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.sessions.store import SessionStore, StoreMeta
from models.baselines import MV, MaxItem
from models.counting import (
    STAN,
    VSKNN,
    VSTAN,
    CountingRanker,
    ItemKNN,
    LivePopularity,
    Markov,
    PersonalPopularity,
    Popularity,
    Reminder,
)
from models.counting.neighbours import Neighbourhood
from tests.session_logs import MINUTE_US, write_table

ITEMS = 6
UNKNOWN = 8
HOUR_US = 60 * MINUTE_US

# One log: users, their sessions, the (item, minutes since the last interaction) of each.
LOGS = st.lists(
    st.lists(
        st.lists(st.tuples(st.integers(0, UNKNOWN), st.integers(0, 90)), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)

RANKERS = {
    "popularity": lambda store, items: Popularity(store, items),
    "recent popularity": lambda store, items: Popularity(store, items, window_us=2 * HOUR_US),
    "live popularity": lambda store, items: LivePopularity(store, items, window_us=HOUR_US),
    "personal popularity": lambda store, items: PersonalPopularity(store, items),
    "Markov": lambda store, items: Markov(store, items, steps=3, step_decay=0.5, last=4, decay=0.7),
    "item-kNN": lambda store, items: ItemKNN(store, items, last=3, lag_decay=0.8),
    "V-SKNN": lambda store, items: VSKNN(
        store, items, neighbourhood=Neighbourhood(k=2, sample=3, last=3, extend=2)
    ),
    "STAN": lambda store, items: STAN(store, items, neighbourhood=Neighbourhood(k=3, sample=4)),
    "VSTAN + reminder": lambda store, items: VSTAN(
        store,
        items,
        neighbourhood=Neighbourhood(k=2, sample=9, extend=4),
        reminder=Reminder(weight=0.3, boost=0.5, decay=0.9),
    ),
}


def log_of(users):
    """Build a store in memory; users start a minute apart, their sessions a day."""
    rows, times, sessions, of_user = [], [], [0], [0]
    for u, user in enumerate(users):
        for s, session in enumerate(user):
            now = u * MINUTE_US + s * 24 * HOUR_US
            for item, minutes in session:
                now += minutes * MINUTE_US
                rows.append(item)
                times.append(now)
            sessions.append(len(rows))
        of_user.append(len(sessions) - 1)
    return store_of(rows, times, sessions, of_user)


def store_of(rows, times, sessions, of_user):
    meta = StoreMeta(
        users=len(of_user) - 1,
        sessions=len(sessions) - 1,
        interactions=len(rows),
        items=UNKNOWN + 1,
        impressions=None,
        gap_us=HOUR_US,
        watermark_us=max(times, default=0),
    )
    columns = {
        "item_rows": np.array(rows, np.int32),
        "timestamps_us": np.array(times, np.int64),
        "session_offsets": np.array(sessions, np.int64),
        "user_offsets": np.array(of_user, np.int64),
    }
    return SessionStore(Path("in-memory"), meta, columns)


def everything_of(store):
    """Return one request per interaction."""
    interaction = np.arange(len(store.item_rows), dtype=np.int64)
    session = np.searchsorted(store.session_offsets, interaction, side="right") - 1
    return Requests(
        user=store.user_of_session(session),
        session=session,
        interaction=interaction,
        position=interaction - store.session_offsets[session],
        target_row=store.item_rows[interaction],
    )


TRAINING = log_of(
    [
        [[(0, 1), (1, 2), (2, 3), (7, 1), (0, 2)], [(3, 1), (1, 1)]],
        [[(1, 0), (4, 5), (3, 9)], [(5, 1)], [(2, 2), (4, 4), (2, 1), (8, 3)]],
        [[(0, 1), (2, 3), (1, 2)], [(1, 1), (2, 1), (0, 1)]],
    ]
)


@pytest.fixture(params=RANKERS, ids=lambda name: name.replace(" ", "-"))
def make(request):
    return RANKERS[request.param]


@settings(max_examples=25)
@given(users=LOGS, seed=st.integers(0, 1 << 30))
@pytest.mark.parametrize("name", RANKERS)
def test_nothing_later_than_the_request_is_seen(name, users, seed):
    store = log_of(users)
    requests = everything_of(store)
    rng = np.random.default_rng(seed)
    at = int(rng.integers(len(requests)))
    # The target itself and whatever happens at its time or later, to anybody, is drawn again.
    now = store.timestamps_us[at]
    later = store.timestamps_us >= now
    of_user = np.searchsorted(store.session_offsets, np.arange(len(later)), side="right") - 1
    mine = store.user_of_session(of_user) == requests.user[at]
    later = np.where(mine, np.arange(len(later)) >= at, later)
    changed = np.where(later, rng.integers(0, UNKNOWN + 1, len(later)), store.item_rows)
    other = store_of(changed, store.timestamps_us, store.session_offsets, store.user_offsets)
    asked = requests.take(slice(at, at + 1))
    before, after = (
        RANKERS[name](log, ITEMS).fit(TRAINING).score(asked, None) for log in (store, other)
    )
    np.testing.assert_array_equal(before, after)


@settings(max_examples=25)
@given(users=LOGS)
@pytest.mark.parametrize("name", RANKERS)
def test_scores_do_not_depend_on_the_batch_or_on_how_they_are_asked(name, users):
    store = log_of(users)
    requests = everything_of(store)
    ranker = RANKERS[name](store, ITEMS).fit(TRAINING)
    everything = ranker.score(requests, None)
    assert everything.shape == (len(requests), ITEMS) and everything.dtype == np.float32
    assert np.isfinite(everything).all()
    alone = [ranker.score(requests.take(slice(i, i + 1)), None)[0] for i in range(len(requests))]
    np.testing.assert_array_equal(everything, np.array(alone))

    rng = np.random.default_rng(0)
    candidates = rng.integers(-1, ITEMS, (len(requests), 4)).astype(np.int32)
    some = ranker.score(requests, candidates)
    assert some.shape == candidates.shape and some.dtype == np.float32
    assert np.isneginf(some[candidates < 0]).all()
    expected = np.take_along_axis(everything, np.maximum(candidates, 0), 1)
    np.testing.assert_array_equal(some[candidates >= 0], expected[candidates >= 0])


def test_recommendations_are_sorted_and_ties_go_to_the_popular_item(make):
    ranker = make(TRAINING, ITEMS).fit(TRAINING)
    requests = everything_of(TRAINING)
    scores = ranker.score(requests, None)
    found = ranker.recommend(requests, ITEMS + 2)
    assert found.shape == (len(requests), ITEMS + 2) and found.dtype == np.int32
    assert (found[:, ITEMS:] == -1).all()
    for row, items in zip(scores, found, strict=True):
        keys = [(-row[item], -ranker.counts[item], item) for item in range(ITEMS)]
        assert items[:ITEMS].tolist() == [key[2] for key in sorted(keys)]
    np.testing.assert_array_equal(ranker.recommend(requests, 2), found[:, :2])


# Live popularity is left out: what others do now is known of a newcomer, too.
@pytest.mark.parametrize(
    "make", [name for name in RANKERS if not name.startswith("live")], indirect=True
)
def test_a_user_without_known_history_is_shown_the_popular_items(make):
    newcomers = log_of([[[(7, 1), (1, 1)]], [[(8, 0), (7, 1), (2, 1)]]])
    ranker = make(newcomers, ITEMS).fit(TRAINING)
    requests = everything_of(newcomers).take(np.array([0, 1, 2, 4]))
    popular = Popularity(newcomers, ITEMS)
    if ranker.name == "recent popularity":
        popular = ranker
    expected = popular.fit(TRAINING).recommend(requests, ITEMS)
    np.testing.assert_array_equal(ranker.recommend(requests, ITEMS), expected)


def test_unknown_rows_in_training_are_skipped(make):
    store = log_of([[[(0, 1), (1, 1), (2, 1)]]])
    fewer = [row for row in TRAINING.item_rows if row < ITEMS]
    ranker = make(store, ITEMS).fit(TRAINING)
    assert ranker.counts.sum() == len(fewer)
    assert ranker.score(everything_of(store), None).shape == (3, ITEMS)


def test_fitting_again_forgets(make):
    other = log_of([[[(5, 1), (4, 1), (5, 1)], [(3, 1), (5, 2)]]])
    requests = everything_of(TRAINING)
    again = make(TRAINING, ITEMS).fit(other).fit(TRAINING)
    once = make(TRAINING, ITEMS).fit(TRAINING)
    np.testing.assert_array_equal(again.score(requests, None), once.score(requests, None))


def test_no_request_gives_no_scores(make):
    ranker = make(TRAINING, ITEMS).fit(TRAINING)
    nothing = everything_of(TRAINING).take(slice(0, 0))
    assert ranker.score(nothing, None).shape == (0, ITEMS)
    assert ranker.score(nothing, np.empty((0, 3), np.int32)).shape == (0, 3)
    assert ranker.recommend(nothing, 3).shape == (0, 3)


def test_training_without_known_items_is_refused(make):
    nobody = store_of([], [], [0], [0])
    strangers = log_of([[[(7, 1), (8, 1)]]])
    for training in (nobody, strangers):
        with pytest.raises(InputError, match=r"cannot be fitted: none of the \d training"):
            make(TRAINING, ITEMS).fit(training)


def test_an_unfitted_ranker_says_so(make):
    with pytest.raises(InputError, match="was not fitted; call fit"):
        make(TRAINING, ITEMS).score(everything_of(TRAINING), None)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: Popularity(TRAINING, 0), "items is 0"),
        (lambda: Popularity(TRAINING, 3, window_us=0), "window is 0 us"),
        (lambda: LivePopularity(TRAINING, 3, window_us=-1), "window is -1 us"),
        (lambda: Markov(TRAINING, 3, steps=0), "steps is 0"),
        (lambda: Markov(TRAINING, 3, last=0), "last is 0"),
        (lambda: Markov(TRAINING, 3, decay=0), "decay is 0"),
        (lambda: Markov(TRAINING, 3, step_decay=1.5), "step_decay is 1.5"),
        (lambda: ItemKNN(TRAINING, 3, shrinkage=-1), "shrinkage is -1"),
        (lambda: ItemKNN(TRAINING, 3, alpha=2), "alpha is 2"),
        (lambda: ItemKNN(TRAINING, 3, last=0), "last is 0"),
        (lambda: ItemKNN(TRAINING, 3, decay=float("nan")), "decay is nan"),
        (lambda: Neighbourhood(k=0), "k is 0"),
        (lambda: Neighbourhood(sample=0), "sample is 0"),
        (lambda: Neighbourhood(extend=-1), "extend is -1"),
        (lambda: Neighbourhood(last=0), "last is 0"),
        (lambda: VSKNN(TRAINING, 3, weighting="cubic"), "weighting is 'cubic'"),
        (lambda: VSKNN(TRAINING, 3, idf=-1), "idf is -1"),
        (lambda: STAN(TRAINING, 3, position=0), "position is 0"),
        (lambda: STAN(TRAINING, 3, recency_days=0), "recency is 0"),
        (lambda: STAN(TRAINING, 3, closeness=-1), "closeness is -1"),
        (lambda: VSTAN(TRAINING, 3, found_by=0), "found_by is 0"),
        (lambda: Reminder(weight=-1), "weight is -1"),
        (lambda: Reminder(boost=float("inf")), "boost is inf"),
        (lambda: Reminder(decay=0), "decay is 0"),
        (lambda: Popularity(TRAINING, 3).fit(TRAINING).recommend(everything_of(TRAINING), 0), "0"),
    ],
)
def test_values_out_of_range_are_refused(build, expected):
    with pytest.raises(InputError, match=expected):
        build()


def test_embedding_rankers_share_the_interface(tmp_path):
    table = write_table(tmp_path, ITEMS, 4)
    requests = everything_of(TRAINING)
    for ranker in (MV(TRAINING, table), MaxItem(TRAINING, table)):
        found = ranker.fit(TRAINING).recommend(requests, 3)
        scores = ranker.score(requests, None)
        best = np.sort(scores, axis=1)[:, :-4:-1]
        np.testing.assert_allclose(np.take_along_axis(scores, found, 1), best)


def test_rankers_are_counting_rankers():
    for name, build in RANKERS.items():
        ranker = build(TRAINING, ITEMS)
        assert isinstance(ranker, CountingRanker) and name.split()[0] in ranker.name
