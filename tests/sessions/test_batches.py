import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.sessions.batches import SessionBatches
from hiertcn.sessions.store import SessionStore, StoreMeta
from tests.session_logs import DAY_US

Users = list[list[int]]
"""Session lengths by user."""


def store_of(users: Users, tmp_path=None) -> SessionStore:
    """Return an in-memory store; item rows are the interactions' own numbers."""
    lengths = [length for user in users for length in user]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    user_offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])])
    times = [
        day * DAY_US + place for user in users for day, n in enumerate(user) for place in range(n)
    ]
    total = int(offsets[-1])
    meta = StoreMeta(
        users=len(users),
        sessions=len(lengths),
        interactions=total,
        items=total,
        impressions=None,
        gap_us=1,
        watermark_us=max(times),
    )
    columns = {
        "item_rows": np.arange(total, dtype=np.int32),
        "timestamps_us": np.array(times, np.int64),
        "session_offsets": offsets,
        "user_offsets": user_offsets.astype(np.int64),
    }
    return SessionStore(tmp_path, meta, columns)


logs = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=12)


@settings(max_examples=80)
@given(
    users=logs,
    lanes=st.integers(1, 5),
    per_step=st.integers(1, 4),
    max_length=st.integers(1, 10),
    context=st.integers(0, 6),
    days=st.one_of(st.none(), st.integers(1, 6)),
    seed=st.integers(0, 3),
)
def test_laws_of_the_generator(users, lanes, per_step, max_length, context, days, seed):
    store = store_of(users)
    batches = SessionBatches(
        store,
        lanes=lanes,
        sessions_per_step=per_step,
        max_length=max_length,
        context=context,
        end_us=None if days is None else days * DAY_US,
        seed=seed,
    )
    owner = store.user_of_session(np.arange(store.meta.sessions))
    targets, closed = [], []
    user_of_lane: dict[int, int] = {}
    next_of_user: dict[int, int] = {}
    steps = list(batches.epoch(0))
    assert len(steps) == batches.steps(0)
    for batch in steps:
        assert len(batch.lane) <= lanes * per_step
        ends = np.cumsum(batch.lengths)
        member_ends = iter(np.cumsum(batch.member_lengths))
        member_lengths = iter(batch.member_lengths)
        for slot in range(len(batch.slot_offsets) - 1):
            of_slot = batch.lane[batch.slot_offsets[slot] : batch.slot_offsets[slot + 1]]
            assert len(set(of_slot)) == len(of_slot)
        for piece, (lane, session) in enumerate(zip(batch.lane, batch.session, strict=True)):
            user = int(owner[session])
            rows = slice(ends[piece] - batch.lengths[piece], ends[piece])
            predicted = batch.interactions[rows][batch.is_target[rows]]
            given_ = batch.interactions[rows][~batch.is_target[rows]]
            # A reset stands exactly where the lane's user changes.
            assert batch.reset[piece] == (user_of_lane.get(lane) != user)
            user_of_lane[lane] = user
            # A user's interactions come in order, without a hole.
            first = store.session_offsets[store.user_offsets[user]]
            assert predicted[0] == next_of_user.get(user, first)
            next_of_user[user] = predicted[-1] + 1
            # Context is what directly precedes in the same session.
            start = store.session_offsets[session]
            assert len(given_) == min(context, predicted[0] - start)
            assert (np.diff(batch.interactions[rows]) == 1).all()
            assert 1 <= len(predicted) <= max_length
            stop = store.session_offsets[session + 1]
            assert batch.closes[piece] == (predicted[-1] + 1 == stop)
            if batch.closes[piece]:
                end, count = next(member_ends), next(member_lengths)
                members = batch.item_rows[batch.member_rows[end - count : end]]
                assert members.tolist() == list(range(start, stop))
                closed.append(session)
            targets.extend(predicted.tolist())
        is_last = np.zeros(ends[-1], bool)
        is_last[ends - 1] = True
        assert (batch.inputs == np.flatnonzero(~is_last)).all()
        assert (batch.targets == np.flatnonzero(batch.is_target)).all()
        first_of_session = np.isin(batch.interactions, store.session_offsets)
        before = store.timestamps_us[np.maximum(batch.interactions - 1, 0)]
        gaps = np.where(first_of_session, 0, batch.timestamps_us - before)
        assert (batch.gaps_us == gaps).all()
        start = store.session_offsets[batch.session]
        held_first = batch.interactions[ends - batch.lengths]
        assert (batch.skipped == held_first - start).all()
        pause = store.timestamps_us[start] - store.timestamps_us[np.maximum(start - 1, 0)]
        is_first = np.isin(batch.session, store.user_offsets)
        assert (batch.session_gaps_us == np.where(is_first, -1, pause)).all()
        assert (batch.item_rows[: ends[-1]] == batch.interactions).all()
        assert (batch.timestamps_us == store.timestamps_us[batch.interactions]).all()
    limit = np.inf if days is None else days * DAY_US
    kept = np.flatnonzero(store.session_starts_us() < limit)
    assert sorted(closed) == kept.tolist()
    expected = [
        i for s in kept for i in range(store.session_offsets[s], store.session_offsets[s + 1])
    ]
    assert sorted(targets) == expected and batches.interactions == len(expected)


@settings(max_examples=30)
@given(users=logs, seed=st.integers(0, 9), first=st.integers(0, 5))
def test_an_epoch_is_fixed_by_seed_and_number_and_can_be_entered_anywhere(users, seed, first):
    def batches():
        return SessionBatches(store_of(users), lanes=2, sessions_per_step=2, seed=seed)

    once, again = list(batches().epoch(3)), list(batches().epoch(3, first))
    assert len(again) == max(0, len(once) - first)
    for one, other in zip(once[first:], again, strict=True):
        for name in one.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_users_join_the_lane_with_the_fewest_sessions():
    lanes = 3
    users = [[1] * count for count in (9, 1, 1, 5, 2, 2, 7, 1)]
    store = store_of(users)
    batches = SessionBatches(store, lanes=lanes, sessions_per_step=100, seed=4)
    (batch,) = batches.epoch(0)
    owner = store.user_of_session(batch.session)
    order = np.random.default_rng((4, 0)).permutation(len(users))
    held = [0] * lanes
    for user in order:
        lane = held.index(min(held))
        assert set(batch.lane[owner == user]) == {lane}
        held[lane] += len(users[user])


@settings(max_examples=50)
@given(
    users=logs,
    lanes=st.integers(1, 6),
    ranks=st.integers(1, 4),
    per_step=st.integers(1, 3),
    max_length=st.integers(2, 10),
)
def test_ranks_share_what_one_process_sees_at_each_step(users, lanes, ranks, per_step, max_length):
    store = store_of(users)
    sizes = {
        "lanes": lanes,
        "sessions_per_step": per_step,
        "max_length": max_length,
        "context": 2,
        "seed": 1,
    }
    if lanes < ranks:
        with pytest.raises(InputError, match="at least one lane a rank"):
            SessionBatches(store, **sizes, rank=0, world_size=ranks)
        return
    alone = SessionBatches(store, **sizes)
    parts = [SessionBatches(store, **sizes, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert sum(part.own_lanes for part in parts) == lanes
    assert {part.steps(2) for part in parts} == {alone.steps(2)}
    assert {part.interactions for part in parts} == {alone.interactions}
    for whole, *split in zip(alone.epoch(2), *(part.epoch(2) for part in parts), strict=True):
        seen = []
        first_lane = 0
        for part, batch in zip(parts, split, strict=True):
            assert (batch.lane < part.own_lanes).all() and batch.slot_offsets[-1] == len(batch.lane)
            slot = np.searchsorted(batch.slot_offsets, np.arange(len(batch.lane)), side="right")
            seen += zip(
                slot,
                batch.lane + first_lane,
                batch.session,
                batch.reset,
                batch.lengths,
                strict=True,
            )
            first_lane += part.own_lanes
        slot = np.searchsorted(whole.slot_offsets, np.arange(len(whole.lane)), side="right")
        expected = zip(slot, whole.lane, whole.session, whole.reset, whole.lengths, strict=True)
        assert sorted(seen) == sorted(expected)


@settings(max_examples=50)
@given(users=logs, lanes=st.integers(1, 5))
def test_lanes_are_balanced_to_one_user(users, lanes):
    batches = SessionBatches(store_of(users), lanes=lanes, sessions_per_step=1)
    held = np.zeros(lanes, np.int64)
    for batch in batches.epoch(0):
        np.add.at(held, batch.lane, 1)
    assert held.max() - held.min() <= max(len(user) for user in users)


def test_a_rank_that_is_not_one_is_refused():
    for rank in (-1, 2):
        with pytest.raises(InputError, match="rank is"):
            SessionBatches(store_of([[1]]), lanes=3, sessions_per_step=1, rank=rank, world_size=2)


def test_epochs_differ():
    batches = SessionBatches(store_of([[1]] * 50), lanes=2, sessions_per_step=3)
    orders = [np.concatenate([b.session for b in batches.epoch(epoch)]) for epoch in (0, 1)]
    assert orders[0].tolist() != orders[1].tolist()


@pytest.mark.parametrize("field", ["lanes", "sessions_per_step", "max_length"])
def test_sizes_are_checked(field):
    sizes = {"lanes": 1, "sessions_per_step": 1, "max_length": 1, field: 0}
    with pytest.raises(InputError, match=field):
        SessionBatches(store_of([[1]]), **sizes)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(InputError, match="no session starts before"):
        SessionBatches(store_of([[1]]), lanes=1, sessions_per_step=1, end_us=0)
