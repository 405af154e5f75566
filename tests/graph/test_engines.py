import datetime
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiertcn.errors import InputError
from hiertcn.graph.csr import CSR
from hiertcn.graph.edges import build_edges, partition_path, stored_dates
from hiertcn.graph.interactions import decayed_interaction_counts
from hiertcn.graph.merge import merge_edges
from hiertcn.graph.options import GraphOptions
from hiertcn.items.index import IdIndex

MIDNIGHT_US = 1_767_225_600_000_000


@pytest.fixture(scope="session")
def spark_session(required_module, required_program):
    """One Spark for all tests: starting it takes longer than they do."""
    required_module("pyspark")
    required_program("java")
    from pyspark.sql import SparkSession

    session = (
        SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", "1")
        .config("spark.default.parallelism", "1")
        # Compiling each query to Java takes longer than interpreting it over a few hundred rows.
        .config("spark.sql.codegen.wholeStage", "false")
        .config("spark.sql.codegen.factoryMode", "NO_CODEGEN")
        .config("spark.driver.extraJavaOptions", "-XX:TieredStopAtLevel=1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .getOrCreate()
    )
    yield session
    session.stop()


@pytest.fixture
def log(tmp_path):
    """Three days with pairs over midnight, baskets at one instant and text beyond ASCII."""
    draw = random.Random(0)
    items = [f"item {k}" for k in range(12)] + ["é", "z", "日本"]
    for day in range(3):
        rows = set()
        for _ in range(150):
            second = draw.choice((5, 300, 86_399)) + draw.choice((0, 0, 0.25, 60))
            at = MIDNIGHT_US + day * 86_400_000_000 + min(int(second * 1e6), 86_399_999_999)
            rows.add((f"ü{draw.randrange(6)}", draw.choice(items), at))
        users, ids, times = zip(*sorted(rows), strict=True)
        date = datetime.date(2026, 1, 1) + datetime.timedelta(days=day)
        folder = tmp_path / "events" / f"date={date}"
        folder.mkdir(parents=True)
        stamps = pa.array(times, pa.timestamp("us", tz="UTC"))
        table = pa.table({"user_id": users, "item_id": ids, "timestamp": stamps})
        pq.write_table(table, folder / "part-0.parquet")
    IdIndex.build(items[:-1], tmp_path / "index")
    return tmp_path


def test_all_engines_write_the_same_partitions_and_the_same_graph(log, spark_session):
    index = IdIndex.open(log / "index")
    options = {
        engine: GraphOptions(engine=engine, max_followers=4, top_n=5, half_life_days=1, threads=1)
        for engine in ("compiled", "duckdb", "spark")
    }
    for engine, chosen in options.items():
        summary = build_edges(log / "events", log / engine, chosen)
        merge_edges(log / engine, index, log / f"graph-{engine}", chosen)
        assert summary.edges > 100
    for date in stored_dates(log / "duckdb"):
        one, *others = (pq.read_table(partition_path(log / name, date)) for name in options)
        assert one.num_rows
        assert all(one.equals(other, check_metadata=True) for other in others)
    one, *others = (CSR.open(log / f"graph-{name}") for name in options)
    for name in ("indptr", "indices", "weights"):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for other in others)
    statistics = [(log / f"graph-{name}" / "statistics.json").read_text() for name in options]
    assert statistics[0] == statistics[1] == statistics[2]
    # A store that one engine built is current for the other.
    assert build_edges(log / "events", log / "spark", options["compiled"]).rebuilt == 0
    one, *others = (
        decayed_interaction_counts(log / "events", index, chosen) for chosen in options.values()
    )
    assert all(np.array_equal(one, other) for other in others)


def started_spark(log, memory):
    """What building edges prints in a process of its own, where no Spark runs that would do."""
    program = (
        "import sys; from pathlib import Path; from hiertcn.graph.edges import build_edges;"
        "from hiertcn.graph.options import GraphOptions; from pyspark.sql import SparkSession;"
        "stop = SparkSession.stop\n"
        "def told(session):\n"
        "    print('memory', session.conf.get('spark.driver.memory')); stop(session)\n"
        "SparkSession.stop = told\n"
        "options = GraphOptions(engine='spark', memory_limit=sys.argv[2], threads=1)\n"
        "log = Path(sys.argv[1]); build_edges(log / 'events', log / 'store', options)\n"
    )
    command = [sys.executable, "-c", program, str(log), memory]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_spark_is_started_with_the_memory_that_was_asked_for(
    log, required_module, required_program
):
    required_module("pyspark")
    required_program("java")
    little = started_spark(log, "100MB")
    assert "InputError: Spark at this machine could not be started" in little.stderr
    assert "must be at least 471859200" in little.stderr.splitlines()[-1]
    enough = started_spark(log, "1GB")
    assert enough.returncode == 0, enough.stderr
    assert "memory 953m" in enough.stdout.splitlines()
    assert len(stored_dates(log / "store")) == 3


def test_a_missing_extra_is_named(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    with pytest.raises(InputError, match=r"needs the extra spark .* install 'hiertcn\[spark\]'"):
        build_edges(log / "events", log / "store", GraphOptions(engine="spark"))


def test_engine_options_are_checked():
    with pytest.raises(InputError, match="engine is 'flink'; expected compiled, duckdb or spark"):
        GraphOptions(engine="flink")
    with pytest.raises(InputError, match="spark_master is 'yarn' but the engine is compiled"):
        GraphOptions(spark_master="yarn")
