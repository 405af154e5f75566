import datetime
import errno
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiertcn.errors import InputError
from hiertcn.graph import coded_pairs
from hiertcn.graph.csr import CSR
from hiertcn.graph.edges import build_edges, partition_path, stored_dates
from hiertcn.graph.merge import merge_edges
from hiertcn.graph.options import GraphOptions
from hiertcn.items.index import IdIndex

MIDNIGHT_US = 1_767_225_600_000_000
BUILD = """
import sys
from pathlib import Path
from hiertcn.graph.edges import build_edges
from hiertcn.graph.options import GraphOptions
build_edges(Path(sys.argv[1]), Path(sys.argv[2]), GraphOptions(chunk_events=1, threads=1))
"""


def write_days(folder, days, events, items=40, users=30, seed=0):
    rng = np.random.default_rng(seed)
    for day in range(days):
        date = datetime.date(2026, 1, 1) + datetime.timedelta(days=day)
        at = MIDNIGHT_US + day * 86_400_000_000 + rng.integers(0, 3_600_000_000, events)
        table = pa.table(
            {
                "user_id": [f"u{user}" for user in rng.integers(0, users, events)],
                "item_id": [f"i{item}" for item in rng.integers(0, items, events)],
                "timestamp": pa.array(at, pa.timestamp("us", tz="UTC")),
            }
        )
        (folder / f"date={date}").mkdir(parents=True)
        pq.write_table(table, folder / f"date={date}" / "part-0.parquet")
    return folder


def contents(store):
    return {
        date: pq.read_table(partition_path(store, date)).to_pylist() for date in stored_dates(store)
    }


def test_a_killed_build_leaves_whole_partitions_and_the_graph_and_resumes(tmp_path):
    events, store = write_days(tmp_path / "events", 40, 300), tmp_path / "store"
    index = IdIndex.build([f"i{item}" for item in range(40)], tmp_path / "index")
    build_edges(events, tmp_path / "whole", GraphOptions(threads=1))
    graph = merge_edges(tmp_path / "whole", index, tmp_path / "graph", GraphOptions(threads=1))
    command = [sys.executable, "-c", BUILD, str(events), str(store)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(stored_dates(store)) < 3:
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = stored_dates(store)
    assert 3 <= len(kept) < 40
    expected = contents(tmp_path / "whole")
    assert all(contents(store)[date] == expected[date] for date in kept)
    assert list(tmp_path.glob(".spill-*"))
    summary = build_edges(events, store, GraphOptions(threads=1))
    assert summary.kept == len(kept) and contents(store) == expected
    # What the dead process had spilled is gone too.
    assert not list(tmp_path.glob(".spill-*"))
    assert np.array_equal(CSR.open(tmp_path / "graph").indices, graph.indices)


def test_a_failed_merge_leaves_the_graph_in_use(tmp_path):
    events = write_days(tmp_path / "events", 2, 100)
    index = IdIndex.build([f"i{item}" for item in range(40)], tmp_path / "index")
    build_edges(events, tmp_path / "store", GraphOptions(threads=1))
    before = merge_edges(tmp_path / "store", index, tmp_path / "graph", GraphOptions(threads=1))
    partition_path(tmp_path / "store", "2026-01-02").write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match=r"edges\.parquet could not be read .* build_edges again"):
        merge_edges(tmp_path / "store", index, tmp_path / "graph", GraphOptions(threads=1))
    assert np.array_equal(CSR.open(tmp_path / "graph").indices, before.indices)
    assert not list(tmp_path.glob(".graph*"))


def test_partitions_are_the_same_whatever_the_threads_and_the_memory(tmp_path):
    events = write_days(tmp_path / "events", 2, 300_000, users=20_000)
    built = []
    # With 2 MB the users of the two days are worked on in three parts, and a day's pairs in many.
    for threads, memory_limit in ((1, "4GB"), (2, "4GB"), (1, "2MB"), (3, "2MB")):
        store = tmp_path / f"{threads}-{memory_limit}"
        build_edges(events, store, GraphOptions(memory_limit=memory_limit, threads=threads))
        built.append([pq.read_table(partition_path(store, date)) for date in stored_dates(store)])
    assert len(built[0]) == 2
    for found in built[1:]:
        for one, other in zip(built[0], found, strict=True):
            assert one.equals(other, check_metadata=True)


def test_too_little_memory_for_a_query_is_said_with_what_to_do(tmp_path):
    events = write_days(tmp_path / "events", 1, 300_000)
    small = GraphOptions(engine="duckdb", memory_limit="2MB", threads=1)
    with pytest.raises(InputError, match=r"memory_limit of 2MB or of disk .* raise memory_limit"):
        build_edges(events, tmp_path / "store", small)
    assert not stored_dates(tmp_path / "store")
    assert not list(tmp_path.glob(".spill-*"))


def test_a_full_disk_is_said_and_leaves_no_partition(tmp_path, monkeypatch):
    events = write_days(tmp_path / "events", 1, 100)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(coded_pairs, "_pair", full)
    with pytest.raises(InputError, match=r"no space left on the disk"):
        build_edges(events, tmp_path / "store", GraphOptions(threads=1))
    assert not stored_dates(tmp_path / "store")


def test_one_item_and_repeats_of_an_item_make_no_self_loop(tmp_path):
    events = write_days(tmp_path / "events", 1, 50, items=1, users=2)
    index = IdIndex.build(["i0"], tmp_path / "index")
    assert build_edges(events, tmp_path / "store", GraphOptions(threads=1)).edges == 0
    csr = merge_edges(tmp_path / "store", index, tmp_path / "graph", GraphOptions(threads=1))
    assert (csr.items, len(csr.indices)) == (1, 0)


def test_an_item_that_disappears_keeps_its_row_without_neighbors(tmp_path):
    events = write_days(tmp_path / "events", 1, 200, items=5)
    first = IdIndex.build(["gone", *(f"i{item}" for item in range(5))], tmp_path / "index")
    build_edges(events, tmp_path / "store", GraphOptions(threads=1))
    index = IdIndex.build(["new"], tmp_path / "next", first)
    csr = merge_edges(tmp_path / "store", index, tmp_path / "graph", GraphOptions(threads=1))
    assert csr.items == 7 and csr.degrees[0] == csr.degrees[6] == 0
    assert (csr.degrees[1:6] == 4).all()
