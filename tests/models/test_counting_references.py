"""Every counting ranker against its definition, written slowly with dictionaries and loops."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.counting import (
    STAN,
    VSKNN,
    VSTAN,
    ItemKNN,
    LivePopularity,
    Markov,
    PersonalPopularity,
    Popularity,
    Reminder,
)
from models.counting.neighbours import DAY_US, Neighbourhood
from tests.models.test_counting import HOUR_US, ITEMS, LOGS, TRAINING, everything_of, log_of

DECAYS = ["same", "linear", "div", "log", "quadratic"]


def sessions_of(store):
    """Return (rows, end time) of every session."""
    bounds = zip(store.session_offsets[:-1], store.session_offsets[1:], strict=True)
    return [(store.item_rows[a:b].tolist(), int(store.timestamps_us[b - 1])) for a, b in bounds]


def input_of(store, requests, i):
    """Return the user's earlier items, those of the running session, and the time."""
    first = store.session_offsets[store.user_offsets[requests.user[i]]]
    at, position = requests.interaction[i], requests.position[i]
    rows = store.item_rows[first:at].tolist()
    split = len(rows) - position
    return rows[:split], rows[split:], int(store.timestamps_us[at])


def check(ranker, store, training, evidence_of):
    """Compare with ``evidence_of(earlier, running, now) -> {item: evidence}``."""
    ranker.fit(training)
    requests = everything_of(store)
    scores = ranker.score(requests, None)
    popular = Counter(row for row in training.item_rows.tolist() if row < ITEMS)
    for i in range(len(requests)):
        evidence = evidence_of(*input_of(store, requests, i))
        expected = [
            evidence[item]
            if evidence.get(item, 0) > 0
            else popular[item] / (max(popular.values()) + 1) - 1
            for item in range(ITEMS)
        ]
        np.testing.assert_allclose(scores[i], expected, rtol=1e-5, atol=1e-7)


def aged(rows):
    """Return (item, age) of the known items, newest first."""
    return [(row, age) for age, row in enumerate(reversed(rows)) if row < ITEMS]


@settings(max_examples=15)
@given(users=LOGS, hours=st.integers(1, 50))
def test_popularity_of_all_time_and_of_the_last_hours(users, hours):
    store = log_of(users)
    check(
        Popularity(store, ITEMS), store, TRAINING, lambda *_: Counter(TRAINING.item_rows.tolist())
    )
    end = TRAINING.timestamps_us.max()
    recent = Counter(
        row
        for row, time in zip(TRAINING.item_rows.tolist(), TRAINING.timestamps_us, strict=True)
        if time > end - hours * HOUR_US
    )
    ranker = Popularity(store, ITEMS, window_us=hours * HOUR_US)
    check(ranker, store, TRAINING, lambda *_: recent)


@settings(max_examples=30)
@given(users=LOGS, minutes=st.integers(1, 3000))
def test_live_popularity_counts_everybody_in_the_window_before(users, minutes):
    store = log_of(users)
    window = minutes * HOUR_US // 60
    log = list(zip(store.item_rows.tolist(), store.timestamps_us.tolist(), strict=True))

    def reference(earlier, running, now):
        return Counter(row for row, time in log if now - window <= time < now)

    check(LivePopularity(store, ITEMS, window_us=window), store, TRAINING, reference)


@settings(max_examples=30)
@given(users=LOGS)
def test_personal_popularity_counts_then_prefers_the_recent(users):
    store = log_of(users)

    def reference(earlier, running, now):
        rows = earlier + running
        latest = {row: place + 1 for place, row in enumerate(rows)}
        return {row: n + latest[row] / (len(rows) + 1) for row, n in Counter(rows).items()}

    check(PersonalPopularity(store, ITEMS), store, TRAINING, reference)


@settings(max_examples=30)
@given(
    users=LOGS,
    training=LOGS,
    steps=st.integers(1, 6),
    last=st.integers(1, 6),
    across=st.booleans(),
)
def test_markov_sums_shares_of_what_followed(users, training, steps, last, across):
    users_of_training = [*training, [[(0, 1), (1, 1)]]]
    store, training = log_of(users), log_of(users_of_training)
    within, between = defaultdict(Counter), defaultdict(Counter)
    for user in users_of_training:
        events = [(item, s) for s, session in enumerate(user) for item, _ in session]
        for i, (a, of_a) in enumerate(events):
            for lag, (b, of_b) in enumerate(events[i + 1 : i + 1 + steps], start=1):
                if a != b and max(a, b) < ITEMS:
                    (within if of_a == of_b else between)[a][b] += 0.5 ** (lag - 1)

    def reference(earlier, running, now):
        scores = Counter()
        for a, age in aged(earlier + running):
            counts = between if across and age >= len(running) else within
            for b, count in counts[a].items():
                if age < last:
                    scores[b] += 0.7**age * count / sum(counts[a].values())
        return scores

    ranker = Markov(store, ITEMS, steps=steps, step_decay=0.5, last=last, decay=0.7, across=across)
    check(ranker, store, training, reference)


@settings(max_examples=30)
@given(
    users=LOGS,
    training=LOGS,
    shrinkage=st.sampled_from([0.0, 3.0]),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    lag_decay=st.sampled_from([0.6, 1.0]),
)
def test_item_knn_sums_regularised_cosines(users, training, shrinkage, alpha, lag_decay):
    store, training = log_of(users), log_of([*training, [[(0, 1), (1, 1)]]])
    together, support = defaultdict(Counter), Counter()
    for rows, _ in sessions_of(training):
        last_place = {row: place for place, row in enumerate(rows) if row < ITEMS}
        distinct = sorted(last_place, key=last_place.get)
        support.update(distinct)
        for i, a in enumerate(distinct):
            for j, b in enumerate(distinct):
                if a != b:
                    together[a][b] += lag_decay ** (abs(i - j) - 1)

    def reference(earlier, running, now):
        scores = Counter()
        for a, age in aged(earlier + running):
            for b, count in together[a].items():
                norm = (support[a] + shrinkage) ** alpha * (support[b] + shrinkage) ** (1 - alpha)
                if age < 3:
                    scores[b] += 0.8**age * count / norm
        return scores

    ranker = ItemKNN(
        store, ITEMS, shrinkage=shrinkage, alpha=alpha, last=3, decay=0.8, lag_decay=lag_decay
    )
    check(ranker, store, training, reference)


def neighbour_reference(training, near, weigh, weigh_score, *, cosine, recency, closeness, idf):
    """Return the evidence of session-kNN; ``weigh(age, length)`` of a context item."""
    sessions = sorted(
        ((rows, end) for rows, end in sessions_of(training) if min(rows) < ITEMS),
        key=lambda session: session[1],
    )
    counts = Counter(training.item_rows.tolist())

    def reference(earlier, running, now):
        whole = running if near.last is None else running[len(running) - near.last :]
        if near.last is not None and len(running) <= near.last:
            whole = running
        if len(whole) < near.extend:
            whole = (earlier + running)[-near.extend :]
        newest = {}
        for row, age in aged(whole):
            newest.setdefault(row, age)
        related = [i for i, (rows, _) in enumerate(sessions) if set(rows) & set(newest)]
        found = []
        for i in sorted(related, reverse=True)[: near.sample]:
            rows, end = sessions[i]
            shared = set(rows) & set(newest)
            similarity = sum(weigh(newest[row], len(whole)) for row in sorted(shared))
            if cosine:
                similarity /= math.sqrt(len({row for row in rows if row < ITEMS}))
            similarity *= math.exp(-max(0, now - end) / recency)
            found.append((similarity, i, shared))
        found.sort(key=lambda entry: (-entry[0], -entry[1]))
        scores = Counter()
        for similarity, i, shared in found[: near.k]:
            rows = sessions[i][0]
            place = {row: at for at, row in enumerate(rows) if row < ITEMS}
            star = max(place[row] for row in shared)
            found_by = weigh_score(min(newest[row] for row in shared))
            for row in place:
                gain = 1 + idf * max(0.0, math.log(training.meta.sessions / counts[row]))
                near_star = math.exp(-abs(place[row] - star) / closeness)
                scores[row] += similarity * found_by * gain * near_star
        return scores

    return reference


NEAR = st.builds(
    Neighbourhood,
    k=st.sampled_from([1, 2, 50]),
    sample=st.sampled_from([1, 3, 50]),
    last=st.sampled_from([None, 1, 3]),
    extend=st.sampled_from([0, 2, 9]),
)


@settings(max_examples=40)
@given(
    users=LOGS,
    training=LOGS,
    near=NEAR,
    weighting=st.sampled_from(DECAYS),
    weighting_score=st.sampled_from(DECAYS),
    idf=st.sampled_from([0.0, 2.0]),
)
def test_vsknn_scores_by_weighted_overlap(users, training, near, weighting, weighting_score, idf):
    store, training = log_of(users), log_of([*training, [[(0, 1), (1, 1)]]])
    weigh = {
        "same": lambda age, n: 1.0,
        "linear": lambda age, n: max(1 - 0.1 * age, 1e-9),
        "div": lambda age, n: (n - age) / n,
        "log": lambda age, n: 1 / math.log10(age + 1.7),
        "quadratic": lambda age, n: ((n - age) / n) ** 2,
    }[weighting]
    weigh_score = {
        "same": lambda age: 1.0,
        "linear": lambda age: max(1 - 0.1 * (age + 1), 1e-9),
        "div": lambda age: 1 / (age + 1),
        "log": lambda age: 1 / math.log10(age + 1 + 1.7),
        "quadratic": lambda age: 1 / (age + 1) ** 2,
    }[weighting_score]
    # Sums of simple fractions tie across different overlaps, and a rounding error would part them.
    near = Neighbourhood(k=50, sample=near.sample, last=near.last, extend=near.extend)
    reference = neighbour_reference(
        training,
        near,
        weigh,
        weigh_score,
        cosine=False,
        recency=math.inf,
        closeness=math.inf,
        idf=idf,
    )
    ranker = VSKNN(
        store,
        ITEMS,
        neighbourhood=near,
        weighting=weighting,
        weighting_score=weighting_score,
        idf=idf,
    )
    check(ranker, store, training, reference)


@settings(max_examples=40)
@given(users=LOGS, training=LOGS, near=NEAR, closeness=st.sampled_from([None, 1.5]))
def test_stan_and_vstan_add_positions_and_times(users, training, near, closeness):
    store, training = log_of(users), log_of([*training, [[(0, 1), (1, 1)]]])
    shared = {
        "cosine": True,
        "recency": 2.5 * DAY_US,
        "closeness": closeness or math.inf,
    }
    weigh = lambda age, n: math.exp(-age / 1.3)  # noqa: E731
    reference = neighbour_reference(training, near, weigh, lambda age: 1.0, idf=0.0, **shared)
    own = {"position": 1.3, "recency_days": 2.5, "closeness": closeness, "neighbourhood": near}
    check(STAN(store, ITEMS, **own), store, training, reference)

    reference = neighbour_reference(
        training, near, weigh, lambda age: math.exp(-age / 2.0), idf=3.0, **shared
    )
    check(VSTAN(store, ITEMS, **own, found_by=2.0, idf=3.0), store, training, reference)


@settings(max_examples=30)
@given(users=LOGS, decay=st.sampled_from([1.0, 0.8]))
def test_reminder_adds_the_earlier_sessions(users, decay):
    store = log_of(users)
    plain = Markov(store, ITEMS, last=3, decay=0.7).fit(TRAINING)
    mixed = Markov(
        store,
        ITEMS,
        last=3,
        decay=0.7,
        reminder=Reminder(weight=0.4, first_weight=2.0, boost=0.5, decay=decay),
    )
    base = np.maximum(plain.score(everything_of(store), None), 0)
    asked = iter(base)

    def reference(earlier, running, now):
        scores = next(asked).astype(float)
        scores /= max(scores.max(), 1e-30)
        reminders = np.zeros(ITEMS)
        for row, age in aged(earlier + running):
            if age >= len(running):
                reminders[row] += decay**age
        scores *= np.where(reminders > 0, 1.5, 1.0)
        scores += (0.4 if running else 2.0) * reminders / max(reminders.max(), 1e-30)
        return dict(enumerate(scores))

    check(mixed, store, TRAINING, reference)


def test_by_hand():
    training = log_of([[[(0, 1), (1, 1), (2, 1)], [(0, 1), (1, 1)]], [[(0, 1), (2, 1), (1, 1)]]])
    store = log_of([[[(0, 0), (1, 1), (3, 1)]]])
    requests = everything_of(store)

    # After 0 came 1 twice and 2 once; after 1 came 2 once.
    markov = Markov(store, ITEMS).fit(training).score(requests, None)
    assert markov[1, [1, 2]].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert markov[2, 2] == pytest.approx(1) and (markov[2, [0, 1, 3, 4, 5]] < 0).all()

    # 0, 1 and 2 are in 3, 3 and 2 sessions; 1 and 2 share 2 of them.
    knn = ItemKNN(store, ITEMS, shrinkage=0, last=1).fit(training).score(requests, None)
    assert knn[2, [0, 2]].tolist() == pytest.approx([3 / 3, 2 / math.sqrt(6)])

    # All three sessions share 0 and 1 with (0, 1): similarity 1/2 + 1, found by the newest.
    vsknn = VSKNN(store, ITEMS).fit(training).score(requests, None)
    assert vsknn[2, :3].tolist() == pytest.approx([4.5, 4.5, 3.0])

    # Before any history, by popularity in training: 3, 3 and 2 of at most 3.
    assert vsknn[0].tolist() == pytest.approx([-0.25, -0.25, -0.5, -1, -1, -1])


def test_ties_of_similarity_go_to_the_more_recent_session():
    training = log_of([[[(0, 1), (1, 1)], [(0, 1), (2, 1)], [(0, 1), (3, 1)]]])
    store = log_of([[[(0, 0), (5, 1)]]])
    ranker = VSKNN(store, ITEMS, neighbourhood=Neighbourhood(k=2)).fit(training)
    scores = ranker.score(everything_of(store), None)[1]
    assert scores[2] > 0 and scores[3] > 0 and scores[1] < 0
