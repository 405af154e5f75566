import os
import resource
import threading

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError, ServingError
from hiertcn.serving.log.event_export import SCHEMA, export_parquet
from hiertcn.serving.log.event_log import (
    BEGINNING,
    EventLog,
    Fsync,
    LoggedDeletion,
    LoggedInteraction,
    Position,
)
from hiertcn.serving.records.record import user_key

DAY_US = 86_400_000_000


def interaction(user="ada", item="item-1", time_us=1, kind="click"):
    return LoggedInteraction(user, item, time_us, 99, 0, kind)


def entries_of(log, after=BEGINNING):
    return [entry for _, entry in log.replay(after)]


@pytest.fixture
def log(tmp_path):
    log = EventLog.open(tmp_path / "log")
    yield log
    log.close()


def exported(folder):
    """Every exported row, by file."""
    return {
        str(path.relative_to(folder)): pq.ParquetFile(path).read().to_pylist()
        for path in sorted(folder.rglob("*.parquet"))
    }


texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)


@settings(max_examples=25)
@given(
    st.lists(
        st.builds(
            LoggedInteraction,
            texts,
            texts,
            st.integers(-(2**63), 2**63 - 1),
            st.integers(0, 2**62),
            st.integers(0, 2**64 - 1),
            texts,
        )
        | st.builds(LoggedDeletion, st.binary(min_size=16, max_size=16), st.integers(0, 2**62)),
        max_size=10,
    )
)
def test_what_is_appended_is_replayed(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("log")
    log = EventLog.open(folder, fsync=Fsync.OS)
    for entry in entries:
        log.append([entry])
    log.close()
    reopened = EventLog.open(folder)
    assert entries_of(reopened) == entries
    reopened.close()


def test_replay_continues_behind_a_position(log):
    log.append([interaction(time_us=1)])
    position = log.append([interaction(time_us=2)])
    log.rotate()
    log.append([interaction(time_us=3)])
    assert [entry.timestamp_us for entry in entries_of(log, position)] == [3]
    assert [entry.timestamp_us for entry in entries_of(log)] == [1, 2, 3]
    assert [position for position, _ in log.replay()][-1] == log.position


def test_a_torn_tail_is_cut_at_every_length(tmp_path):
    folder = tmp_path / "log"
    log = EventLog.open(folder)
    kept = log.append([interaction(time_us=1), interaction(time_us=2)])
    whole = log.append([interaction(time_us=3)])
    log.close()
    segment = folder / "000000000001.log"
    data = segment.read_bytes()
    for length in range(kept.offset + 1, whole.offset):
        segment.write_bytes(data[:length])
        reopened = EventLog.open(folder)
        assert [entry.timestamp_us for entry in entries_of(reopened)] == [1, 2]
        assert reopened.position == kept
        reopened.append([interaction(time_us=4)])
        assert [entry.timestamp_us for entry in entries_of(reopened)] == [1, 2, 4]
        reopened.close()
        assert (folder / "000000000001.torn").read_bytes() == data[kept.offset : length]


def test_a_segment_cut_within_its_first_bytes_is_begun_again(tmp_path):
    log = EventLog.open(tmp_path / "log")
    log.close()
    segment = tmp_path / "log" / "000000000001.log"
    segment.write_bytes(segment.read_bytes()[:3])
    reopened = EventLog.open(tmp_path / "log")
    reopened.append([interaction()])
    assert entries_of(reopened) == [interaction()]
    reopened.close()


def test_damage_in_a_sealed_segment_is_refused_with_its_place(tmp_path, log):
    log.append([interaction(time_us=1)])
    middle = log.append([interaction(time_us=2)])
    log.append([interaction(time_us=3)])
    log.rotate()
    path = tmp_path / "log" / "000000000001.log"
    data = bytearray(path.read_bytes())
    data[middle.offset + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"000000000001.log is damaged at byte {middle.offset}"):
        entries_of(log)


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "000000000001.log").write_bytes(b"something else entirely")
    with pytest.raises(InputError, match="not an event log segment"):
        EventLog.open(tmp_path / "log")


def test_a_full_disk_refuses_the_entries_and_harms_nothing(log):
    kept = log.append([interaction(time_us=1)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kept.offset + 20, limits[1]))
    try:
        with pytest.raises(ServingError, match="cannot append"):
            log.append([interaction(time_us=2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.position == kept
    log.append([interaction(time_us=3)])
    assert [entry.timestamp_us for entry in entries_of(log)] == [1, 3]


def test_full_segments_ask_for_rotation(tmp_path):
    log = EventLog.open(tmp_path / "log", segment_bytes=200)
    assert not log.is_full
    while not log.is_full:
        log.append([interaction()])
    assert log.rotate() == 1
    assert log.position == Position(2, 8)
    assert log.rotate() is None
    log.close()


def test_sealed_segments_become_parquet_by_day(tmp_path, log):
    log.append(
        [
            interaction("bob", "b", DAY_US + 5, ""),
            interaction("ada", "y", 7),
            interaction("ada", "x", 7),
            interaction("ada", "y", 7),
            interaction("ada", "z", -1),
        ]
    )
    log.rotate()
    log.append([interaction("eve", "not sealed", 1)])
    assert export_parquet(log, tmp_path / "events") == 4
    assert export_parquet(log, tmp_path / "events") == 0
    files = exported(tmp_path / "events")
    assert {
        name: [(row["user_id"], row["item_id"], row["event_type"]) for row in rows]
        for name, rows in files.items()
    } == {
        "date=1969-12-31/part-1.parquet": [("ada", "z", "click")],
        "date=1970-01-01/part-1.parquet": [("ada", "y", "click"), ("ada", "x", "click")],
        "date=1970-01-02/part-1.parquet": [("bob", "b", None)],
    }
    path = tmp_path / "events" / "date=1970-01-01" / "part-1.parquet"
    assert pq.ParquetFile(path).schema_arrow.equals(SCHEMA)


def test_a_deleted_user_is_erased_from_log_and_parquet_but_may_return(tmp_path, log):
    log.append([interaction("ada", "old", 1), interaction("bob", "b", 1)])
    log.rotate()
    export_parquet(log, tmp_path / "events")
    log.append([interaction("ada", "newer", 2), LoggedDeletion(user_key("ada"), 3)])
    log.append([interaction("ada", "back", 4)])
    log.rotate()
    export_parquet(log, tmp_path / "events")
    rows = [row for rows in exported(tmp_path / "events").values() for row in rows]
    assert {(row["user_id"], row["item_id"]) for row in rows} == {("bob", "b"), ("ada", "back")}
    left = [entry for entry in entries_of(log) if isinstance(entry, LoggedInteraction)]
    assert [(entry.user_id, entry.item_id) for entry in left] == [("bob", "b"), ("ada", "back")]


def test_a_dropped_segment_is_gone(tmp_path, log):
    log.append([interaction(time_us=5)])
    log.rotate()
    export_parquet(log, tmp_path / "events")
    (segment,) = log.sealed()
    assert (segment.exported, segment.last_us) == (True, 5)
    log.drop(segment.number)
    assert log.sealed() == []
    assert entries_of(log) == []


@pytest.mark.parametrize("policy", list(Fsync))
def test_every_policy_appends_rotates_and_reopens(tmp_path, policy):
    log = EventLog.open(tmp_path / "log", fsync=policy, fsync_interval_s=0.001)
    log.append([interaction(time_us=1)])
    log.rotate()
    position = log.append([interaction(time_us=2)])
    log.close()
    reopened = EventLog.open(tmp_path / "log", fsync=policy)
    assert reopened.position == position
    assert [entry.timestamp_us for entry in entries_of(reopened)] == [1, 2]
    reopened.close()


@pytest.mark.parametrize(
    ("policy", "synced_before_the_reply"),
    [(Fsync.ALWAYS, True), (Fsync.INTERVAL, False), (Fsync.OS, False)],
)
def test_only_always_syncs_before_it_acknowledges(
    tmp_path, monkeypatch, policy, synced_before_the_reply
):
    log = EventLog.open(tmp_path / "log", fsync=policy, fsync_interval_s=0.001)
    synced, fdatasync = threading.Event(), os.fdatasync
    here, by_reply = threading.get_ident(), []

    def noting(descriptor):
        fdatasync(descriptor)
        synced.set()
        by_reply.append(threading.get_ident() == here)

    monkeypatch.setattr(os, "fdatasync", noting)
    log.append([interaction()])
    assert (True in by_reply) == synced_before_the_reply
    # An interval passes on its own; only sealing syncs what was left to the system.
    assert synced.wait(10) if policy is Fsync.INTERVAL else True
    log.rotate()
    assert synced.is_set()
    log.close()


def test_a_failed_sync_in_the_background_refuses_what_follows(tmp_path, monkeypatch):
    log = EventLog.open(tmp_path / "log", fsync=Fsync.INTERVAL, fsync_interval_s=0.001)
    failed = threading.Event()

    def failing(descriptor):
        failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    log.append([interaction()])
    assert failed.wait(10)
    log._syncer.join(10)
    with pytest.raises(ServingError, match="could not be synced"):
        log.append([interaction()])
    log.close()


def test_a_log_that_lost_its_tail_names_no_place_twice(tmp_path):
    log = EventLog.open(tmp_path / "log")
    identity = log.identity
    log.append([interaction(time_us=1)])
    lost = Position(1, log.position.offset + 60)
    log.continue_after(Position(1, 8))
    assert log.position.segment == 1
    log.continue_after(lost)
    assert log.append([interaction(time_us=2)]) > lost
    assert [entry.timestamp_us for entry in entries_of(log)] == [1, 2]
    log.close()
    assert EventLog.open(tmp_path / "log").identity == identity


def test_a_deletion_has_its_segment_sealed_soon_and_moves_no_entry(tmp_path):
    log = EventLog.open(tmp_path / "log", erase_age_s=0.0)
    log.append([interaction("ada", "gone", 1)])
    after = log.append([interaction("bob", "b", 2)])
    assert not log.is_full
    log.append([LoggedDeletion(user_key("ada"), 3)])
    assert log.is_full
    log.rotate()
    assert not log.is_full
    export_parquet(log, tmp_path / "events")
    assert b"gone" not in (tmp_path / "log" / "000000000001.log").read_bytes()
    assert [type(entry) for entry in entries_of(log, after)] == [LoggedDeletion]
    assert next(position for position, _ in log.replay()) == after
    log.close()
