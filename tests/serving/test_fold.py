"""The law of state: however interactions arrive, the state is the fold of their sorted sessions."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.serving.records import fold
from hiertcn.serving.records.fold import JournalBound, Outcome
from hiertcn.serving.records.record import NEVER_US, NO_RELEASE, decode, encode
from hiertcn.serving.records.snapshot import UserSnapshot

GAP_US = 100
BOUND = JournalBound(entries=1000, oldest_watermark_us=0)


@dataclass
class Source:
    """A release of items "0" to "9" in which the state is the list of sessions it has seen."""

    number: int = 1
    watermark_us: int = 0
    start_state: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), np.float32))
    snapshot: UserSnapshot | None = None

    def item_rows(self, item_ids):
        return np.array([int(item) if item.isdecimal() else -1 for item in item_ids], np.int64)

    def user_snapshot(self, user_id):
        return self.snapshot


def step(state, session):
    """A stand-in for the GRU under which order and grouping matter."""
    return (state * 31 + (np.mean(session) + 1) * len(session)) % 1009


def touch(record, source, now_us):
    """What a recommendation does: rebuild if stale, then fold what has closed."""
    if record is None or record.release != source.number:
        record = fold.rebuilt(record, "ada", source)
    cut = fold.sessions(record, gap_us=GAP_US, now_us=now_us)
    for rows, until_us in zip(cut.closed, cut.closed_until_us, strict=True):
        record = fold.folded(record, step(record.state, rows), until_us)
    return decode(encode(record)), cut


def put(record, source, item, time_us, key=0, bound=BOUND):
    if record is None or record.release != source.number:
        record = fold.rebuilt(record, "ada", source)
    row = int(source.item_rows([item])[0])
    return fold.recorded(record, item, row, time_us, key, gap_us=GAP_US, bound=bound)


def reference(interactions, now_us):
    """Sort, cut, fold: nothing incremental."""
    kept = [(t, int(i)) for i, t in sorted(interactions, key=lambda one: one[1]) if i.isdecimal()]
    sessions = []
    for time_us, row in kept:
        if not sessions or time_us - sessions[-1][-1][0] > GAP_US:
            sessions.append([])
        sessions[-1].append((time_us, row))
    opened = []
    if sessions and now_us - sessions[-1][-1][0] <= GAP_US:
        opened = [row for _, row in sessions.pop()]
    state = np.zeros((1, 1), np.float32)
    for session in sessions:
        state = step(state, [row for _, row in session])
    return state, opened


arrivals = st.lists(
    st.tuples(st.sampled_from(["0", "1", "2", "3", "new"]), st.integers(1, 1500), st.booleans()),
    max_size=25,
    unique_by=lambda one: one[:2],
)


@settings(max_examples=200)
@given(arrivals)
def test_any_order_of_arrival_and_any_touches_give_the_fold_of_what_was_not_late(found):
    source, record, kept, now_us = Source(), None, [], 0
    for item, time_us, touched in found:
        record, outcome = put(record, source, item, time_us)
        if outcome is not Outcome.LATE:
            kept.append((item, time_us))
        now_us = max(now_us, time_us)
        if touched:
            record, _ = touch(record, source, now_us)
    record, cut = touch(record, source, now_us)
    state, opened = reference(kept, now_us)
    np.testing.assert_allclose(record.state, state)
    assert cut.open_rows.tolist() == opened


@settings(max_examples=100)
@given(arrivals)
def test_rebuilding_gives_the_state_that_was_kept(found):
    source, record, now_us = Source(), None, 0
    for item, time_us, touched in found:
        record, _ = put(record, source, item, time_us)
        now_us = max(now_us, time_us)
        if touched:
            record, _ = touch(record, source, now_us)
    record, cut = touch(record, source, now_us)
    again, cut_again = touch(fold.rebuilt(record, "ada", source), source, now_us)
    np.testing.assert_allclose(again.state, record.state)
    assert cut_again.open_rows.tolist() == cut.open_rows.tolist()


def test_another_release_starts_from_its_snapshot_and_the_journal_after_its_watermark():
    source, record = Source(), None
    for item, time_us in (("1", 100), ("2", 150), ("3", 400), ("4", 450)):
        record, _ = put(record, source, item, time_us)
    newer = Source(
        number=2,
        watermark_us=420,
        snapshot=UserSnapshot(
            state=np.full((1, 1), 7, np.float16),
            folded_until_us=150,
            history_item_rows=np.array([3], np.int32),
            history_timestamps_us=np.array([400]),
        ),
    )
    record, cut = touch(record, newer, now_us=460)
    assert record.release == 2
    assert record.state.tolist() == [[7.0]]
    assert record.state.dtype == np.float32
    assert cut.open_rows.tolist() == [3, 4]
    record, cut = touch(record, newer, now_us=1000)
    np.testing.assert_allclose(record.state, step(np.full((1, 1), 7), [3, 4]))
    assert record.folded_until_us == 450
    back, _ = touch(record, source, now_us=1000)
    np.testing.assert_allclose(
        back.state, reference([("1", 100), ("2", 150), ("3", 400), ("4", 450)], 1000)[0]
    )


@settings(max_examples=100)
@given(arrivals, st.integers(0, 8), st.integers(1, 12))
def test_the_history_is_the_newest_of_snapshot_and_journal_in_time_order(found, before, most):
    snapshot = UserSnapshot(
        state=np.zeros((1, 1), np.float32),
        folded_until_us=-200,
        history_item_rows=np.arange(before, dtype=np.int32),
        history_timestamps_us=np.arange(before) - 200 - before,
    )
    source, record = Source(snapshot=snapshot), None
    record = fold.rebuilt(None, "ada", source)
    expected = [(int(time), int(row)) for row, time in enumerate(snapshot.history_timestamps_us)]
    now_us = 0
    for item, time_us, touched in found:
        record, _ = put(record, source, item, time_us)
        now_us = max(now_us, time_us)
        if item.isdecimal():
            expected.append((time_us, int(item)))
        if touched:
            record, _ = touch(record, source, now_us)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "HISTORY", most)
        rows, times_us = fold.history(record)
    # A stable sort: interactions of one instant keep the order of arrival.
    expected = sorted(expected, key=lambda one: one[0])[-most:]
    assert list(zip(times_us.tolist(), rows.tolist(), strict=True)) == expected
    _, cut = touch(record, source, now_us)
    opened = cut.open_rows.tolist()[-len(rows) :]
    assert rows.tolist()[len(rows) - len(opened) :] == opened


def test_rows_follow_the_release():
    class Renumbered(Source):
        def item_rows(self, item_ids):
            return super().item_rows(item_ids) + 40

    record, _ = put(None, Source(), "1", 10)
    record, cut = touch(record, Renumbered(number=2), now_us=20)
    assert cut.open_rows.tolist() == [41]
    assert record.journal.item_rows.tolist() == [41]


def test_duplicates_and_keys_change_nothing():
    record, _ = put(None, Source(), "1", 10, key=5)
    for item, time_us, key in (("1", 10, 0), ("1", 10, 5), ("2", 11, 5)):
        again, outcome = put(record, Source(), item, time_us, key=key)
        assert outcome is Outcome.DUPLICATE
        assert again is record


def test_late_is_at_or_before_the_folded_point_or_the_watermark():
    source = Source(watermark_us=50)
    record, outcome = put(None, source, "1", 50)
    assert outcome is Outcome.LATE
    record, outcome = put(record, source, "1", 60)
    assert outcome is Outcome.ACCEPTED
    record, _ = touch(record, source, now_us=1000)
    assert record.folded_until_us == 60
    assert put(record, source, "2", 60)[1] is Outcome.LATE
    assert put(record, source, "2", 61)[1] is Outcome.ACCEPTED


def test_joining_a_folded_session_asks_for_a_rebuild_unless_the_journal_lost_it():
    source = Source()
    record, _ = put(None, source, "1", 10)
    record, _ = touch(record, source, now_us=1000)
    assert put(record, source, "2", 10 + GAP_US)[0].release == NO_RELEASE
    assert put(record, source, "2", 11 + GAP_US)[0].release == source.number
    short = JournalBound(entries=1, oldest_watermark_us=0)
    record, _ = put(record, source, "2", 500, bound=short)
    record, _ = touch(record, source, now_us=1000)
    assert record.trimmed_until_us == 10
    assert put(record, source, "3", 550, bound=short)[0].release == source.number


def test_the_journal_keeps_its_bounds():
    record = None
    for time_us in range(1, 31):
        bound = JournalBound(entries=10, oldest_watermark_us=3)
        record, _ = put(record, Source(), str(time_us % 10), time_us, bound=bound)
    assert record.journal.timestamps_us.tolist() == list(range(21, 31))
    assert record.trimmed_until_us == 20
    bound = JournalBound(entries=10, oldest_watermark_us=28)
    record, _ = put(record, Source(), "1", 31, bound=bound)
    assert record.journal.timestamps_us.tolist() == [29, 30, 31]


def test_an_erased_user_ignores_snapshots_up_to_the_deletion():
    import dataclasses

    snapshot = UserSnapshot(
        state=np.full((1, 1), 7, np.float32),
        folded_until_us=10,
        history_item_rows=np.array([], np.int32),
        history_timestamps_us=np.array([], np.int64),
    )
    record = dataclasses.replace(fold.rebuilt(None, "ada", Source()), erased_us=100)
    older = fold.rebuilt(record, "ada", Source(number=2, watermark_us=100, snapshot=snapshot))
    newer = fold.rebuilt(record, "ada", Source(number=3, watermark_us=101, snapshot=snapshot))
    assert (older.state.item(), older.folded_until_us) == (0.0, NEVER_US)
    assert (newer.state.item(), newer.folded_until_us) == (7.0, 10)
