"""Live windows count what a recount of the whole stream would, whatever arrives when."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.serving.live import live_windows, recent_interactions
from hiertcn.serving.live.last_items import LastItems
from hiertcn.serving.live.live_followers import ReleasedTransitions
from hiertcn.serving.live.live_windows import LiveWindows, MinuteCounts
from hiertcn.serving.live.recent_interactions import BEGAN, RecentInteractions
from hiertcn.serving.log.event_log import BEGINNING, EventLog, LoggedDeletion, LoggedInteraction
from hiertcn.serving.log.tail import LogTail
from hiertcn.serving.records.record import user_key
from hiertcn.sessions.live_counts import WINDOWS_MINUTES
from hiertcn.sessions.live_transitions import NEWEST, START, newest_followers

MINUTE_US = 60_000_000
NOW = 29_000_000  # a minute since the epoch, in 2025
ITEMS = 6
GAP_US = 30 * MINUTE_US
WATERMARK_US = NOW * MINUTE_US - 7_000_000


def item_rows(item_ids):
    return np.array([int(item) if item.isdecimal() else -1 for item in item_ids], np.int64)


class KnownItems:
    gap_us = GAP_US
    item_rows = staticmethod(item_rows)

    def __init__(self, last=None):
        self.last = last or {}

    def last_interactions(self, user_ids, until_us):
        return [self.last.get(user) for user in user_ids]


def windows(recent, before=None):
    return LiveWindows(ITEMS, item_rows, WATERMARK_US, recent, before)


def reference(interactions, timestamp_us):
    """Count everything anew, as the definition says."""
    counts = np.zeros((len(WINDOWS_MINUTES), ITEMS), np.float32)
    minute = timestamp_us // MINUTE_US
    for item, time_us in interactions:
        for window, length in enumerate(WINDOWS_MINUTES):
            if minute - length <= time_us // MINUTE_US < minute and item.isdecimal():
                counts[window, int(item)] += 1
    return counts


items = st.sampled_from(["0", "1", "2", "3", "4", "5", "unheard of"])
near = st.integers(-3_000_000, 460 * MINUTE_US).map(lambda us: WATERMARK_US + us)
far = st.sampled_from([NOW * MINUTE_US + 86_400_000_000, NOW * MINUTE_US + 10**15, 5])
steps = st.lists(
    st.tuples(st.lists(st.tuples(items, near | far), max_size=6), near | far), max_size=12
)


@settings(max_examples=150)
@given(steps, st.integers(1, 7))
def test_windows_equal_a_recount_after_every_arrival(found, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent_interactions, "_CHUNK", chunk)
        patch.setattr(live_windows, "_PIECES", 3)
        recent = RecentInteractions()
        live, counted = windows(recent), []
        for arrived, asked_us in found:
            recent.add(arrived)
            counted += [one for one in arrived if one[1] > WATERMARK_US]
            view = live.at(asked_us)
            np.testing.assert_array_equal(view.counts, reference(counted, asked_us))
            assert view.rows.tolist() == np.flatnonzero(view.counts[-1]).tolist()
        afresh = windows(recent)
        for _, asked_us in found:
            np.testing.assert_array_equal(live.at(asked_us).counts, afresh.at(asked_us).counts)


@settings(max_examples=30)
@given(st.lists(st.tuples(items, near), max_size=30), st.data())
def test_the_releases_own_counts_and_what_came_after_add_up(found, data):
    """Wherever the watermark cuts a log, also inside a minute."""
    found = sorted(((item, us) for item, us in found if item.isdecimal()), key=lambda one: one[1])
    cut = data.draw(st.integers(0, len(found)))
    watermark_us = found[cut - 1][1] if cut else WATERMARK_US - 4_000_000
    own = [one for one in found if one[1] <= watermark_us]
    before = MinuteCounts(
        minutes=np.array([us // MINUTE_US for _, us in own], np.int64),
        item_rows=np.array([int(item) for item, _ in own], np.int32),
        counts=np.ones(len(own), np.int32),
        watermark_us=watermark_us,
    )
    recent = RecentInteractions()
    # A sidecar has recorded all of them; the release has seen the first ones in training.
    recent.add(found)
    live = LiveWindows(ITEMS, item_rows, watermark_us, recent, before)
    for asked_us in (WATERMARK_US, WATERMARK_US + 200 * MINUTE_US, WATERMARK_US + 400 * MINUTE_US):
        np.testing.assert_array_equal(live.at(asked_us).counts, reference(found, asked_us))


def followers(live, item, now_us):
    found = np.empty(NEWEST, np.int32)
    return found[: newest_followers(live.transitions, item, now_us, found)].tolist()


@settings(max_examples=100)
@given(
    st.lists(
        st.lists(st.tuples(items, st.none() | st.just(BEGAN) | items), max_size=6), max_size=12
    ),
    st.integers(1, 7),
)
def test_transitions_are_those_between_known_items(groups, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent_interactions, "_CHUNK", chunk)
        recent = RecentInteractions()
        live, moves, now_us = windows(recent), [], WATERMARK_US
        for group in groups:
            times_us = [now_us := now_us + 1_000_000 for _ in group]
            arrivals = [(item, us) for (item, _), us in zip(group, times_us, strict=True)]
            recent.add(arrivals, [previous for _, previous in group])
            moves += [
                (int(previous or START), int(item))
                for item, previous in group
                if item.isdecimal() and previous is not None and (previous or "0").isdecimal()
            ]
            for view in (live.at(now_us + 1), windows(recent).at(now_us + 1)):
                for left in range(START, ITEMS):
                    expected = [item for one, item in reversed(moves) if one == left]
                    assert followers(view, left, now_us + 1) == expected


def test_a_releases_own_transitions_go_before_what_was_recorded():
    own = ReleasedTransitions(
        left_rows=np.array([1, START, 2], np.int32),
        followed_rows=np.array([3, 5, 3], np.int32),
        times_us=np.array([WATERMARK_US - 9, WATERMARK_US - 8, WATERMARK_US]),
    )
    recent = RecentInteractions()
    told = [("3", WATERMARK_US), ("4", WATERMARK_US + 5), ("2", WATERMARK_US + 6)]
    recent.add(told, ["2", "1", BEGAN])
    live = LiveWindows(ITEMS, item_rows, WATERMARK_US, recent, None, own)
    view = live.at(WATERMARK_US + 9)
    # The release has seen what happened up to its watermark.
    assert followers(view, 2, WATERMARK_US + 9) == [3]
    assert followers(view, 1, WATERMARK_US + 9) == [4, 3]
    assert followers(view, START, WATERMARK_US + 9) == [2, 5]
    live.widen(ITEMS + 3)
    assert followers(live.at(WATERMARK_US + 9), 1, WATERMARK_US + 9) == [4, 3]


def test_far_off_times_wipe_nothing(monkeypatch):
    """A day of minutes ahead, the most that is let in, leaves six hours before the clock."""
    recent = RecentInteractions()
    now_us = (NOW + 400) * MINUTE_US
    real = [("1", now_us - back * MINUTE_US) for back in range(1, 361)]
    recent.add(real)
    live = windows(recent)
    recent.add([("2", now_us + ahead * MINUTE_US) for ahead in range(1440)])
    recent.add([("3", year * 10**13) for year in range(170)])
    assert live.at(5).counts.sum() == 0
    assert live.at(10**17).counts.sum() == 0
    assert live.at(now_us).counts[:, 1].tolist() == list(WINDOWS_MINUTES)
    assert live.at(now_us).counts[:, 2].sum() == 0


def test_what_is_dropped_leaves_the_windows_that_counted_it(monkeypatch):
    monkeypatch.setattr(live_windows, "_MAX_MINUTES", 3)
    recent = RecentInteractions()
    live = windows(recent)
    for minute in range(1, 9):
        recent.add([("1", (NOW + minute) * MINUTE_US)])
        found = live.at((NOW + minute + 1) * MINUTE_US)
        assert found.counts[:, 1].tolist() == [min(minute, 3)] * len(WINDOWS_MINUTES)
    assert live.at((NOW + 500) * MINUTE_US).counts.sum() == 0


def test_the_oldest_arrivals_make_room(monkeypatch):
    monkeypatch.setattr(recent_interactions, "_CHUNK", 4)
    recent = RecentInteractions(most=8)
    for n in range(100):
        recent.add([(str(n), n)])
    found, end = recent.since(0)
    assert end == 100
    ids = [ids[code] for ids, codes, _, _ in found for code in codes.tolist()]
    assert ids == [str(n) for n in range(100 - len(ids), 100)]
    assert 8 <= len(ids) <= 12
    late, _ = recent.since(99)
    assert [one.item_ids for one in late] == [["99"]]


def test_a_restart_reads_the_log_once_each(tmp_path):
    def one(user, item, us, key=0):
        return LoggedInteraction(user, item, us, us, key, "")

    log = EventLog.open(tmp_path / "log")
    entries = [
        one("a", "1", WATERMARK_US + 1),
        one("a", "1", WATERMARK_US + 1),
        one("a", "2", WATERMARK_US + 2, key=7),
        one("a", "3", WATERMARK_US + 3, key=7),
        one("ab", "1", WATERMARK_US + 1),
        one("a", "b1", WATERMARK_US + 1),
        one("b", "2", WATERMARK_US + 2, key=7),
        one("b", "4", WATERMARK_US),
        LoggedDeletion(user_key("a"), WATERMARK_US + 9),
        one("ü" * 200, "日本", WATERMARK_US + 4, key=2**64 - 1),
    ]
    log.append(entries[:3])
    log.rotate()
    log.append(entries[3:5])
    log.rotate()
    applied = log.append(entries[5:])
    log.append([one("c", "5", WATERMARK_US + 5)])
    recent = RecentInteractions()
    recent.fill(log, applied, WATERMARK_US, KnownItems())
    log.close()
    ((ids, codes, times, _),), end = recent.since(0)
    assert [ids[code] for code in codes.tolist()] == ["1", "2", "1", "b1", "2", "日本"]
    assert (times - WATERMARK_US).tolist() == [1, 2, 1, 1, 2, 4]
    assert end == 6
    recent.add([("9", 9)])
    later, _ = recent.since(end)
    assert [one.item_ids for one in later] == [["9"]]
    nothing = RecentInteractions()
    other = EventLog.open(tmp_path / "other")
    nothing.fill(other, BEGINNING, 0, KnownItems())
    assert nothing.since(0) == ([], 0)


def before_of(item_ids, code):
    return item_ids[code] if code >= 0 else BEGAN if code == START else None


def test_a_log_gives_the_item_before_each_in_its_session(tmp_path):
    """Read at once after a restart, or followed by a reading process."""
    began = WATERMARK_US + 1
    logged = [
        ("a", "1", 0, "5"),
        ("b", "2", 1, BEGAN),
        ("a", "3", 60_000_000, "1"),
        ("a", "unheard of", 61_000_000, None),
        ("a", "4", 62_000_000, "3"),
        ("a", "5", 30_000_000, None),  # came late
        ("b", "0", 1 + GAP_US, "2"),
        ("b", "1", 3 + 2 * GAP_US, BEGAN),
        ("a", "2", 63_000_000, "4"),
        ("c", "2", GAP_US - 1, BEGAN),
        ("d", "2", GAP_US + 2, BEGAN),
    ]
    release = KnownItems({"a": ("5", WATERMARK_US), "c": ("3", WATERMARK_US - 2 * GAP_US)})
    log = EventLog.open(tmp_path / "log")
    for user, item, us, _ in logged:
        position = log.append([LoggedInteraction(user, item, began + us, 0, 0, "")])
    recent = RecentInteractions()
    recent.fill(log, position, WATERMARK_US, release)
    ((ids, codes, _, previous),), _ = recent.since(0)
    assert [ids[code] for code in codes.tolist()] == [item for _, item, *_ in logged]
    expected = [before for *_, before in logged]
    assert [before_of(ids, code) for code in previous.tolist()] == expected
    interactions, _ = LogTail(tmp_path / "log", BEGINNING).read(position)
    log.close()
    last = LastItems()
    found = [
        *last.before(interactions[:4], release),
        *last.before(interactions[4:], release),
    ]
    # Who reads no release cannot tell where users were within a gap before the log.
    firsts = [[one[0] for one in logged].index(user) for user in "abc"]
    assert found == [None if at in firsts else before for at, before in enumerate(expected)]


@pytest.mark.parametrize("at", [0, 1, 2, 3, 10, 12, 13])
@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_damaged_segment_is_left_out_and_the_others_count(tmp_path, at, value):
    log = EventLog.open(tmp_path / "log")
    for item in ("1", "2"):
        position = log.append([LoggedInteraction("a", item, WATERMARK_US + 1, 0, 0, "")])
        if item == "1":
            log.rotate()
    path = min((tmp_path / "log").glob("*.log"))
    data = bytearray(path.read_bytes())
    data[len(data) - _entry_bytes(log) + at] = value
    path.write_bytes(bytes(data))
    recent = RecentInteractions()
    recent.fill(log, position, WATERMARK_US, KnownItems())
    found, _ = recent.since(0)
    assert "2" in [item for one in found for item in one.item_ids]


def _entry_bytes(log):
    return log.position.offset - 8


def test_live_counts_survive_the_disk_and_damage_is_named(tmp_path):
    counts = MinuteCounts(
        minutes=np.array([3, 4]),
        item_rows=np.array([1, 0], np.int32),
        counts=np.array([2, 5], np.int32),
        watermark_us=77,
    )
    counts.save(tmp_path / "live_counts")
    found = MinuteCounts.open(tmp_path / "live_counts")
    for one, other in itertools.zip_longest(
        dataclasses.astuple(counts), dataclasses.astuple(found)
    ):
        np.testing.assert_array_equal(one, other)
    np.save(tmp_path / "live_counts" / "counts.npy", np.zeros(3))
    with pytest.raises(InputError, match="live_counts"):
        MinuteCounts.open(tmp_path / "live_counts")


def test_live_transitions_survive_the_disk_and_damage_is_named(tmp_path):
    transitions = ReleasedTransitions(
        left_rows=np.array([1, 0], np.int32),
        followed_rows=np.array([2, 5], np.int32),
        times_us=np.array([3, 4]),
    )
    folder = tmp_path / "live_transitions"
    transitions.save(folder)
    found = ReleasedTransitions.open(folder)
    for one, other in zip(
        dataclasses.astuple(transitions), dataclasses.astuple(found), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    np.save(folder / "times_us.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"shapes \[\(2,\), \(3,\)\]"):
        ReleasedTransitions.open(folder)
    (folder / "left_rows.npy").write_bytes(b"torn")
    with pytest.raises(InputError, match="live_transitions cannot be read"):
        ReleasedTransitions.open(folder)
