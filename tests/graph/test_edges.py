import datetime
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.graph.edges import build_edges, partition_path, stored_dates
from hiertcn.graph.options import GraphOptions
from hiertcn.items.hashing import xxh64

MIDNIGHT_S = 1_767_225_600  # 2026-01-01
OPTIONS = GraphOptions(window_s=600, max_followers=3, threads=1)

logs = st.lists(
    st.tuples(
        st.sampled_from(["u", "v"]),
        st.sampled_from(["a", "b", "c", "d"]),
        # Around two midnights, so that pairs cross them.
        st.integers(-900, 900).map(lambda s: MIDNIGHT_S + 86_400 + s)
        | st.integers(-600, 600).map(lambda s: MIDNIGHT_S + 2 * 86_400 + s),
    ),
    min_size=1,
    max_size=25,
    unique=True,
)


def write_log(folder, log):
    days = {}
    for user, item, second in log:
        date = datetime.datetime.fromtimestamp(second, datetime.UTC).date().isoformat()
        days.setdefault(date, []).append((user, item, second))
    for date, rows in days.items():
        path = folder / f"date={date}"
        path.mkdir(parents=True, exist_ok=True)
        users, items, seconds = zip(*rows, strict=True)
        times = pa.array([s * 1_000_000 for s in seconds], pa.timestamp("us", tz="UTC"))
        table = pa.table({"user_id": users, "item_id": items, "timestamp": times})
        pq.write_table(table, path / "part-0.parquet")
    return folder


def read_store(store):
    return {
        (date, row["source"], row["target"]): row["count"]
        for date in stored_dates(store)
        for row in pq.read_table(partition_path(store, date)).to_pylist()
    }


def reference(log, window_s, max_followers):
    def order(event):
        user, item, second = event
        hashes = xxh64(pa.array([user, item], pa.large_string()), 42).tolist()
        user_hash, item_hash = (value % 2**20 for value in hashes)
        factor = (user_hash + second) % (2**31 - 2) + 1
        return second, (item_hash + 1) * factor % (2**31 - 1), item

    counts = Counter()
    for user in {event[0] for event in log}:
        events = sorted((event for event in log if event[0] == user), key=order)
        for place, (_, item, second) in enumerate(events):
            for _, other, later in events[place + 1 : place + 1 + max_followers]:
                if later - second <= window_s and item != other:
                    date = datetime.datetime.fromtimestamp(later, datetime.UTC).date()
                    counts[(date.isoformat(), *sorted((item, other)))] += 1
    return dict(counts)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(log=logs, data=st.data())
def test_edges_equal_the_reference_whatever_the_rows_order_chunks_threads_or_memory(
    log, data, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("log")
    shuffled = data.draw(st.permutations(log))
    options = GraphOptions(
        window_s=600,
        max_followers=3,
        threads=data.draw(st.integers(1, 3)),
        chunk_events=data.draw(st.sampled_from([1, 99])),
        # So little that each item's pairs are counted by themselves, and then a day's at once.
        memory_limit=data.draw(st.sampled_from(["40B", "4GB"])),
    )
    summary = build_edges(write_log(folder / "events", shuffled), folder / "store", options)
    expected = reference(log, 600, 3)
    assert read_store(folder / "store") == expected
    assert summary.edges == len(expected)


def test_a_new_day_leaves_old_partitions_and_together_they_are_one_build(tmp_path):
    log = [
        ("u", item, MIDNIGHT_S + 86_400 * day + offset)
        for day in range(3)
        for item, offset in (("a", 30), ("b", 100), ("c", 86_399))
    ]
    store = tmp_path / "store"
    for day in range(3):
        todays = [event for event in log if (event[2] - MIDNIGHT_S) // 86_400 == day]
        write_log(tmp_path / "events", todays)
        summary = build_edges(tmp_path / "events", store, OPTIONS)
        assert summary.rebuilt == 1
    together = tmp_path / "together"
    build_edges(tmp_path / "events", together, OPTIONS)
    assert read_store(store) == read_store(together) == reference(log, 600, 3)


def test_an_unchanged_day_is_not_rebuilt_and_a_changed_one_rebuilds_what_depends_on_it(tmp_path):
    log = [("u", "a", MIDNIGHT_S + 10), ("u", "b", MIDNIGHT_S + 20)]
    log += [("u", "c", MIDNIGHT_S + 86_400 + 10), ("u", "d", MIDNIGHT_S + 86_400 + 20)]
    events, store = write_log(tmp_path / "events", log), tmp_path / "store"
    build_edges(events, store, OPTIONS)
    inode = partition_path(store, "2026-01-01").stat().st_ino
    assert build_edges(write_log(events, log[::-1]), store, OPTIONS).rebuilt == 0
    assert partition_path(store, "2026-01-01").stat().st_ino == inode
    late = ("u", "e", MIDNIGHT_S + 86_399)
    assert build_edges(write_log(events, [*log, late]), store, OPTIONS).rebuilt == 2
    assert read_store(store) == reference([*log, late], 600, 3)
    wider = GraphOptions(window_s=700, max_followers=3, threads=1)
    assert build_edges(events, store, wider).rebuilt == 2


def test_a_damaged_partition_is_built_again_and_a_vanished_day_removed(tmp_path):
    log = [("u", i, MIDNIGHT_S + 86_400 * d + k) for d in range(3) for k, i in enumerate("ab")]
    events, store = write_log(tmp_path / "events", log), tmp_path / "store"
    build_edges(events, store, OPTIONS)
    partition_path(store, "2026-01-01").write_bytes(b"PAR1 torn")
    assert build_edges(events, store, OPTIONS).rebuilt == 1
    (events / "date=2026-01-02" / "part-0.parquet").unlink()
    assert build_edges(events, store, OPTIONS).removed == 1
    assert stored_dates(store) == ["2026-01-01", "2026-01-03"]


def test_lost_partitions_come_back_as_they_were_and_are_current(tmp_path):
    log = [
        ("u", item, MIDNIGHT_S + 86_400 * day + offset)
        for day in range(4)
        for item, offset in (("a", 30), ("b", 100), ("c", 86_399))
    ]
    events, store = write_log(tmp_path / "events", log), tmp_path / "store"
    build_edges(events, store, OPTIONS)
    expected = read_store(store)
    for lost in (["2026-01-02", "2026-01-03"], ["2026-01-03", "2026-01-04"], ["2026-01-01"]):
        for date in lost:
            partition_path(store, date).unlink()
        assert build_edges(events, store, OPTIONS).rebuilt == len(lost)
        assert read_store(store) == expected
        assert build_edges(events, store, OPTIONS).rebuilt == 0


def test_a_long_history_out_of_order_and_baskets_at_one_instant_equal_the_reference(tmp_path):
    draw = random.Random(0)
    # More events than are sorted with one gap, a third of them in baskets, in any order.
    log = {
        (user, f"item {draw.randrange(50)}", MIDNIGHT_S + draw.choice((draw.randrange(9_000), 60)))
        for user, events in (("often", 3_000), ("seldom", 3), ("once", 1))
        for _ in range(events)
    }
    shuffled = draw.sample(sorted(log), len(log))
    for threads in (1, 2):
        options = GraphOptions(window_s=600, max_followers=20, threads=threads)
        store = tmp_path / f"store-{threads}"
        build_edges(write_log(tmp_path / "events", shuffled), store, options)
        assert read_store(store) == reference(log, 600, 20)


def test_one_event_makes_an_empty_partition(tmp_path):
    events = write_log(tmp_path / "events", [("u", "a", MIDNIGHT_S)])
    summary = build_edges(events, tmp_path / "store", OPTIONS)
    assert (summary.edges, summary.days) == (0, 1)
    assert not [p for p in Path(tmp_path).iterdir() if p.name.startswith(".")]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no date=YYYY-MM-DD"):
        build_edges(tmp_path / "nowhere", tmp_path / "store", OPTIONS)
    folder = tmp_path / "events" / "date=2026-01-01"
    folder.mkdir(parents=True)
    (folder / "part-0.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(InputError, match=r"part-0\.parquet is not a whole parquet file"):
        build_edges(tmp_path / "events", tmp_path / "store", OPTIONS)
    pq.write_table(pa.table({"user_id": ["u"]}), folder / "part-0.parquet")
    with pytest.raises(InputError, match="has no column 'item_id'"):
        build_edges(tmp_path / "events", tmp_path / "store", OPTIONS)
    times = pa.array([0], pa.timestamp("us", tz="UTC"))
    nobody = pa.table({"user_id": ["u"], "item_id": pa.nulls(1, pa.string()), "timestamp": times})
    pq.write_table(nobody, folder / "part-0.parquet")
    with pytest.raises(InputError, match=r"part-0\.parquet has an event without 'item_id'"):
        build_edges(tmp_path / "events", tmp_path / "store", OPTIONS)
    with pytest.raises(InputError, match="memory_limit is 'lots'"):
        build_edges(tmp_path / "events", tmp_path / "store", GraphOptions(memory_limit="lots"))
    with pytest.raises(InputError, match="window_s is 0"):
        GraphOptions(window_s=0)
