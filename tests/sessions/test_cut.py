import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.items.index import IdIndex
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.store import SessionStore
from tests.session_logs import MINUTE_US, START_US, write_events

GAP_US = 30 * MINUTE_US


def event(user, item, minutes, **more):
    return {
        "user_id": user,
        "item_id": item,
        "timestamp": START_US + round(minutes * MINUTE_US),
        **more,
    }


def sessions_of(store):
    """Return {user: [[(item row, microseconds since START_US), ...] per session]}."""
    out = {}
    for user, name in enumerate(store.user_ids.to_pylist()):
        out[name] = [
            [
                (int(store.item_rows[i]), int(store.timestamps_us[i]) - START_US)
                for i in range(store.session_offsets[s], store.session_offsets[s + 1])
            ]
            for s in range(store.user_offsets[user], store.user_offsets[user + 1])
        ]
    return out


def test_literal_log(tmp_path):
    events = write_events(
        tmp_path / "events",
        [
            event("zoe", "b", 0),
            event("zoe", "a", 30),
            event("zoe", "b", 60.1),
            event("amy", "a", 5),
            event("amy", "gone", 10),
            event("amy", "b", 34),
        ],
    )
    items = IdIndex.build(["a", "b"], tmp_path / "index")
    summary = build_sessions(events, items, tmp_path / "store")
    store = SessionStore.open(tmp_path / "store")
    minute = MINUTE_US
    assert sessions_of(store) == {
        "amy": [[(0, 5 * minute), (1, 34 * minute)]],
        "zoe": [[(1, 0), (0, 30 * minute)], [(1, 60 * minute + minute // 10)]],
    }
    assert (summary.users, summary.sessions, summary.interactions) == (2, 3, 5)
    assert (summary.unknown_items, summary.impressions) == (1, None)
    assert store.meta.watermark_us == START_US + 60 * minute + minute // 10
    assert store.meta.gap_us == GAP_US and store.meta.items == 2
    assert not store.has_impressions


def test_equal_times_keep_the_order_of_the_log(tmp_path):
    order = [7, 3, 9, 1, 8, 0, 2]
    events = write_events(tmp_path / "events", [event("u", f"i{item}", 1) for item in order])
    items = IdIndex.build([f"i{item}" for item in range(10)], tmp_path / "index")
    build_sessions(events, items, tmp_path / "store")
    assert SessionStore.open(tmp_path / "store").item_rows.tolist() == order


def test_impressions_keep_their_interaction_and_drop_unknown_items(tmp_path):
    events = write_events(
        tmp_path / "events",
        [
            event("u", "a", 0, impressions=["b", "gone", "a"]),
            event("u", "gone", 1, impressions=["a", "b"]),
            event("u", "b", 2, impressions=None),
            event("u", "b", 3, impressions=["gone"]),
            event("u", "a", 4, impressions=["a", "b"]),
        ],
    )
    items = IdIndex.build(["a", "b"], tmp_path / "index")
    summary = build_sessions(events, items, tmp_path / "store")
    store = SessionStore.open(tmp_path / "store")
    assert store.impression_rows.tolist() == [1, 0, 0, 1]
    assert store.impression_offsets.tolist() == [0, 2, 2, 2, 4]
    assert summary.unknown_impressions == 2
    rows, counts = store.impressions(np.array([0, 3]))
    assert rows.tolist() == [1, 0, 0, 1] and counts.tolist() == [2, 2]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    log=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 400)),
        min_size=1,
        max_size=60,
    ),
    known=st.integers(1, 6),
    gap_minutes=st.sampled_from([1, 10, 30]),
    batch=st.sampled_from([1, 3, 1000]),
)
def test_agrees_with_a_loop(tmp_path_factory, monkeypatch, log, known, gap_minutes, batch):
    tmp_path = tmp_path_factory.mktemp("log")
    # Small batches put user and session boundaries across them.
    monkeypatch.setattr("hiertcn.sessions.cut._BATCH_ROWS", batch)
    expected = {}
    for user, item, minutes in sorted(log, key=lambda row: (row[0], row[2])):
        if item >= known:
            continue
        sessions = expected.setdefault(f"u{user}", [])
        time = minutes * MINUTE_US
        if not sessions or time - sessions[-1][-1][1] > gap_minutes * MINUTE_US:
            sessions.append([])
        sessions[-1].append((item, time))
    rows = [event(f"u{user}", f"i{item}", minutes) for user, item, minutes in log]
    events = write_events(tmp_path / "events", rows)
    items = IdIndex.build([f"i{item}" for item in range(known)], tmp_path / "index")
    if not expected:
        with pytest.raises(InputError, match="none of the"):
            build_sessions(events, items, tmp_path / "store", gap_s=gap_minutes * 60)
        assert not (tmp_path / "store").exists()
        return
    build_sessions(events, items, tmp_path / "store", gap_s=gap_minutes * 60)
    assert sessions_of(SessionStore.open(tmp_path / "store")) == expected


def test_event_types_are_numbered_by_how_often_they_occur(tmp_path):
    kinds = ["save", "click", None, "click", "click", "save", "hide"]
    rows = [event(f"u{n}", "a", n) | {"event_type": kind} for n, kind in enumerate(kinds)]
    items = IdIndex.build(["a"], tmp_path / "index")
    build_sessions(write_events(tmp_path / "events", rows), items, tmp_path / "store")
    store = SessionStore.open(tmp_path / "store")
    assert store.meta.event_types == ("click", "save", "hide")
    assert store.event_types.tolist() == [2, 1, 0, 1, 1, 2, 3]
    plain = write_events(tmp_path / "plain", [event("u", "a", 0)])
    build_sessions(plain, items, tmp_path / "without")
    assert SessionStore.open(tmp_path / "without").event_types is None


def test_bad_input(tmp_path):
    items = IdIndex.build(["a"], tmp_path / "index")
    with pytest.raises(InputError, match="no parquet file"):
        build_sessions(tmp_path / "nothing", items, tmp_path / "store")
    events = write_events(tmp_path / "events", [event("u", "a", 0)])
    with pytest.raises(InputError, match="positive number of seconds"):
        build_sessions(events, items, tmp_path / "store", gap_s=0)
    half = events / "date=2026-01-01" / "part-0.parquet"
    half.write_bytes(half.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot read the events"):
        build_sessions(events, items, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_damaged_store_is_refused(tmp_path):
    events = write_events(tmp_path / "events", [event("u", "a", 0), event("u", "a", 1)])
    items = IdIndex.build(["a"], tmp_path / "index")
    build_sessions(events, items, tmp_path / "store")
    column = tmp_path / "store" / "item_rows.npy"
    column.write_bytes(column.read_bytes()[:-4])
    with pytest.raises(InputError, match="item_rows"):
        SessionStore.open(tmp_path / "store")
    column.unlink()
    with pytest.raises(InputError, match="item_rows"):
        SessionStore.open(tmp_path / "store")
