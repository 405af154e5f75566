"""What ingest keeps and writes, on logs small enough to check with a pencil."""

import datetime
import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiertcn.events.ingest import ALL_EVENTS, IngestOptions, ingest
from hiertcn.graph.edges import build_edges

_NO_LIMITS = {"min_user_interactions": 0, "min_item_interactions": 0}
_NOON_S = 1_767_268_800  # 2026-01-01T12:00:00Z


def _csv(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def _ingest(url, output, *, items_url=None, **options):
    return ingest(url, output, items_url=items_url, options=IngestOptions(**_NO_LIMITS | options))


def _kept(output: Path) -> list[tuple[str, str, int]]:
    """User, item and seconds after noon of all kept events, in the order written."""
    rows = []
    for path in sorted((output / "events").rglob("*.parquet")):
        table = pq.ParquetFile(path).read()
        seconds = table["timestamp"].cast(pa.int64()).to_pylist()
        rows += [
            (user, item, second / 1e6 - _NOON_S)
            for user, item, second in zip(
                table["user_id"].to_pylist(), table["item_id"].to_pylist(), seconds, strict=True
            )
        ]
    return rows


def test_writes_the_contract(tmp_path):
    log = pa.table(
        {
            "user_id": pa.array([7, 7, 3], pa.uint32()),
            "item_id": ["b", "a", "a"],
            "timestamp": pa.array([_NOON_S + 5, _NOON_S + 5, _NOON_S - 86_400], pa.int64()),
            "event_type": ["click", "save", "click"],
            "impressions": pa.array([["b", "c"], None, []], pa.list_(pa.string())),
            "ignored": [1.0, 2.0, 3.0],
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    pq.write_table(
        pa.table({"item_id": ["a", "b", "a"], "title": ["first", "second", "again"]}),
        tmp_path / "items.parquet",
    )
    output = tmp_path / "ingested"
    summary = _ingest(
        str(tmp_path / "log.parquet"), output, items_url=str(tmp_path / "items.parquet")
    )

    newest = pq.ParquetFile(output / "events/date=2026-01-01/part-0.parquet").read()
    assert newest.schema.remove_metadata() == pa.schema(
        {
            "user_id": pa.string(),
            "item_id": pa.string(),
            "timestamp": pa.timestamp("us", tz="UTC"),
            "event_type": pa.string(),
            "impressions": pa.list_(pa.field("element", pa.string())),
        }
    )
    # Equal times keep the log's order.
    assert newest["item_id"].to_pylist() == ["b", "a"]
    assert newest["impressions"].to_pylist() == [["b", "c"], None]
    assert (output / "events/date=2025-12-31/part-0.parquet").exists()
    assert pq.read_table(output / "items.parquet").to_pydict() == {
        "item_id": ["a", "b"],
        "title": ["first", "second"],
    }
    assert summary.catalogue is not None
    assert summary.catalogue.duplicates == 1
    assert pq.read_table(output / "rejects.parquet").schema.names == [
        "file",
        "row",
        "reason",
        "user_id",
        "item_id",
        "timestamp",
    ]
    snapshot = json.loads((output / "snapshot.json").read_text())
    assert snapshot["hash"] == summary.hash
    assert snapshot["watermark_us"] == (_NOON_S + 5) * 10**6
    assert snapshot["first_us"] == (_NOON_S - 86_400) * 10**6
    assert (snapshot["events"], snapshot["users"], snapshot["items"]) == (3, 2, 2)
    assert snapshot["has_impressions"] is True
    assert snapshot["event_types"] == ["click", "save"]
    assert json.loads((output / "statistics.json").read_text())["interactions"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ingested",
        "items.parquet",
        "log.parquet",
    ]


def test_no_items_file_writes_no_items(tmp_path):
    _ingest(
        _csv(tmp_path / "log.csv", f"user_id,item_id,timestamp\n1,2,{_NOON_S}\n"), tmp_path / "o"
    )
    assert not (tmp_path / "o/items.parquet").exists()
    columns = pq.ParquetFile(tmp_path / "o/events/date=2026-01-01/part-0.parquet").schema.names
    assert columns == ["user_id", "item_id", "timestamp"]


def test_every_bad_row_has_its_reason(tmp_path):
    rows = [
        f"1,2,{_NOON_S}",
        f"1,2,{_NOON_S}",
        f",2,{_NOON_S}",
        f"1,,{_NOON_S}",
        "1,2,",
        "1,2,-5",
        "1,2,99999999999",
        "1,2,0",
        "1,2,soon",
        f"1,2,{_NOON_S},extra",
    ]
    url = _csv(tmp_path / "log.csv", "user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    summary = _ingest(url, tmp_path / "o")
    rejects = pq.read_table(tmp_path / "o/rejects.parquet").to_pylist()
    assert [(reject["row"], reject["reason"]) for reject in rejects] == [
        (1, "duplicate"),
        (2, "null_user_id"),
        (3, "null_item_id"),
        (4, "null_timestamp"),
        (5, "negative_timestamp"),
        (6, "far_future_timestamp"),
        (7, "timestamp_before_1990"),
        (8, "unreadable_timestamp"),
        (9, "malformed_row"),
    ]
    assert rejects[7]["timestamp"] == "soon"
    assert {reject["file"] for reject in rejects} == {url}
    assert summary.rejected == {reject["reason"]: 1 for reject in rejects}
    assert (summary.rows, summary.events) == (10, 1)


def test_limits_apply_to_items_then_users_once_unless_repeated(tmp_path):
    # Item x: 3 events, y: 2, z: 1. Users a: x x y, b: x z, c: y.
    events = ["a,x,0", "a,x,1", "a,y,2", "b,x,3", "b,z,4", "c,y,5"]
    rows = [event.rsplit(",", 1) for event in events]
    text = "user_id,item_id,timestamp\n" + "".join(
        f"{ids},{_NOON_S + int(second)}\n" for ids, second in rows
    )
    url = _csv(tmp_path / "log.csv", text)
    limits = {"min_item_interactions": 2, "min_user_interactions": 2}

    summary = _ingest(url, tmp_path / "once", **limits)
    assert _kept(tmp_path / "once") == [("a", "x", 0), ("a", "x", 1), ("a", "y", 2)]
    assert summary.filtered == {"min_item_interactions": 1, "min_user_interactions": 2}

    _ingest(url, tmp_path / "stable", repeat_filters=True, **limits)
    assert _kept(tmp_path / "stable") == [("a", "x", 0), ("a", "x", 1)]

    _ingest(url, tmp_path / "few", max_user_interactions=2)
    assert {user for user, _, _ in _kept(tmp_path / "few")} == {"b", "c"}


@pytest.mark.parametrize("item_filter", ["sold", "shelf=1", "sold=true"])
def test_item_filter_keeps_events_of_items_that_fulfil_it(tmp_path, item_filter):
    url = _csv(
        tmp_path / "log.csv",
        f"user_id,item_id,timestamp\na,1,{_NOON_S}\na,2,{_NOON_S}\na,unlisted,{_NOON_S}\n",
    )
    items = _csv(tmp_path / "items.csv", "item_id,sold,shelf\n1,true,1\n2,false,2\n")
    summary = _ingest(url, tmp_path / "o", items_url=items, item_filter=item_filter)
    assert _kept(tmp_path / "o") == [("a", "1", 0)]
    assert summary.filtered == {"item_filter": 2}
    assert pq.read_table(tmp_path / "o/items.parquet")["item_id"].to_pylist() == ["1", "2"]


def test_event_types_and_data_date_filter_before_anything_is_an_error(tmp_path):
    url = _csv(
        tmp_path / "log.csv",
        "user_id,item_id,timestamp,event_type\n"
        f"a,1,{_NOON_S},buy\n"
        f"a,,{_NOON_S},search\n"
        f"a,2,{_NOON_S + 43_199},buy\n"
        f"a,3,{_NOON_S + 43_200},buy\n",
    )
    summary = _ingest(url, tmp_path / "o", event_types=("buy",), data_date="2026-01-01")
    assert _kept(tmp_path / "o") == [("a", "1", 0), ("a", "2", 43_199)]
    assert summary.filtered == {"event_type": 1, "after_data_date": 1}
    assert summary.rejected == {}
    assert summary.watermark_us == (_NOON_S + 43_199) * 10**6


def test_watermark_counts_events_that_the_limits_drop(tmp_path):
    url = _csv(
        tmp_path / "log.csv",
        f"user_id,item_id,timestamp\na,1,{_NOON_S}\na,1,{_NOON_S + 1}\nb,1,{_NOON_S + 9}\n",
    )
    summary = _ingest(url, tmp_path / "o", min_user_interactions=2)
    assert summary.watermark_us == (_NOON_S + 9) * 10**6


def test_csv_texts_are_read_as_times_and_lists(tmp_path):
    url = _csv(
        tmp_path / "log.csv",
        "user_id;item_id;timestamp;impressions\n"
        "u;1;2026-01-01T12:00:00Z;1|2\n"
        'u;2;2026-01-01 14:00:01+02:00;"[""1"", ""2""]"\n'
        "u;3;2026-01-01 12:00:02;[1, 2]\n"
        "u;4;2026-01-01 12:00:03.5;\n"
        "u;5;2026-01-01 12:00:04;[1\n",
    )
    summary = _ingest(url, tmp_path / "o")
    table = pq.ParquetFile(tmp_path / "o/events/date=2026-01-01/part-0.parquet").read()
    assert _kept(tmp_path / "o") == [("u", "1", 0), ("u", "2", 1), ("u", "3", 2), ("u", "4", 3.5)]
    assert table["impressions"].to_pylist() == [["1", "2"], ["1", "2"], ["1", "2"], None]
    assert summary.rejected == {"unreadable_impressions": 1}


@pytest.mark.parametrize(
    "times",
    [
        pa.array([_NOON_S], pa.int64()),
        pa.array([_NOON_S * 10**3], pa.int64()),
        pa.array([_NOON_S * 10**6], pa.uint64()),
        pa.array([_NOON_S * 10**9], pa.int64()),
        pa.array([_NOON_S], pa.timestamp("s")),
        pa.array([_NOON_S * 10**3], pa.timestamp("ms")),
        pa.array([_NOON_S * 10**9], pa.timestamp("ns")),
        pa.array([_NOON_S * 10**6], pa.timestamp("us", tz="America/Lima")),
        pa.array(["2026-01-01T12:00:00Z"]),
        pa.array([str(_NOON_S)]),
    ],
    ids=str,
)
def test_all_time_types_are_the_same_instant(tmp_path, times):
    log = pa.table({"user_id": ["a"], "item_id": ["b"], "timestamp": times})
    pq.write_table(log, tmp_path / "log.parquet")
    _ingest(str(tmp_path / "log.parquet"), tmp_path / "o")
    assert _kept(tmp_path / "o") == [("a", "b", 0)]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([5], pa.int8()),
        pa.array([5], pa.int64()),
        pa.array([5], pa.uint64()),
        pa.array(["5"], pa.large_string()),
        pa.array(["5"]).dictionary_encode(),
        pa.array([b"5"], pa.binary()),
    ],
    ids=lambda ids: str(ids.type).partition("<")[0],
)
def test_all_id_types_become_text(tmp_path, ids):
    log = pa.table({"user_id": ids, "item_id": ids, "timestamp": [_NOON_S]})
    pq.write_table(log, tmp_path / "log.parquet")
    _ingest(str(tmp_path / "log.parquet"), tmp_path / "o")
    assert _kept(tmp_path / "o") == [("5", "5", 0)]


def test_reads_folders_globs_and_urls_of_mixed_files(tmp_path):
    folder = tmp_path / "log" / "event_type=a%20click" / "date=2026-01-01"
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table({"user_id": [1], "item_id": [2], "timestamp": [_NOON_S]}),
        folder / "part.parquet",
    )
    text = f"user_id,item_id,timestamp,event_type\n1,3,{_NOON_S + 1},click\n".encode()
    (tmp_path / "log" / "rest.csv.gz").write_bytes(gzip.compress(text))
    (tmp_path / "log" / "_SUCCESS").touch()
    (tmp_path / "log" / ".rest.csv").write_text("half")
    expected = [("1", "2", 0), ("1", "3", 1)]
    for place, url in enumerate(
        [str(tmp_path / "log"), f"file://{tmp_path}/log", f"{tmp_path}/log/**"]
    ):
        summary = _ingest(url, tmp_path / str(place))
        assert _kept(tmp_path / str(place)) == expected
        assert summary.event_types == ["a click", "click"]


def test_reads_remote_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    with memory.open("/test-ingest/log.csv", "wb") as file:
        file.write(f"user_id,item_id,timestamp\n,2,{_NOON_S}\n1,2,{_NOON_S}\n".encode())
    with memory.open("/test-ingest/items.csv", "wb") as file:
        file.write(b'item_id,image\n2,"[0.5, 1]"\n')
    _ingest(
        "memory://test-ingest/log.csv", tmp_path / "o", items_url="memory://test-ingest/items.csv"
    )
    assert _kept(tmp_path / "o") == [("1", "2", 0)]
    (reject,) = pq.read_table(tmp_path / "o/rejects.parquet").to_pylist()
    assert reject["file"].startswith("memory://")
    items = pq.read_table(tmp_path / "o/items.parquet")
    assert items["item_id"].type == pa.string()
    assert items["image"].to_pylist() == [[0.5, 1.0]]


def test_columns_of_other_names(tmp_path):
    url = _csv(tmp_path / "log.csv", f"who,what,when,how,shown\na,b,{_NOON_S},buy,b|c\n")
    items = _csv(tmp_path / "items.csv", "what,title\nb,Title\n")
    summary = _ingest(
        url,
        tmp_path / "o",
        items_url=items,
        user_column="who",
        item_column="what",
        timestamp_column="when",
        event_type_column="how",
        impressions_column="shown",
    )
    assert _kept(tmp_path / "o") == [("a", "b", 0)]
    assert summary.event_types == ["buy"]
    assert pq.read_table(tmp_path / "o/items.parquet").column_names == ["item_id", "title"]


def test_the_hash_follows_content_and_options(tmp_path):
    text = f"user_id,item_id,timestamp\na,b,{_NOON_S}\na,c,{_NOON_S}\n"
    url = _csv(tmp_path / "log.csv", text)
    first = _ingest(url, tmp_path / "1").hash
    assert _ingest(url, tmp_path / "2", memory_limit="1GB").hash == first
    assert _ingest(url, tmp_path / "3", session_gap_s=60.0).hash != first
    _csv(tmp_path / "log.csv", text.replace("a,c", "a,d"))
    assert _ingest(url, tmp_path / "4").hash != first


def test_a_second_ingest_replaces_the_first(tmp_path):
    url = _csv(tmp_path / "log.csv", f"user_id,item_id,timestamp\na,b,{_NOON_S}\n")
    _ingest(url, tmp_path / "o")
    _csv(tmp_path / "log.csv", f"user_id,item_id,timestamp\na,b,{_NOON_S + 86_400}\n")
    _ingest(url, tmp_path / "o")
    assert [path.name for path in (tmp_path / "o/events").iterdir()] == ["date=2026-01-02"]


def test_days_are_utc_days(tmp_path):
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    late = (start - datetime.timedelta(microseconds=1)).isoformat()
    url = _csv(
        tmp_path / "log.csv", f"user_id,item_id,timestamp\na,b,{late}\na,b,{start.isoformat()}\n"
    )
    _ingest(url, tmp_path / "o")
    days = sorted(path.name for path in (tmp_path / "o/events").iterdir())
    assert days == ["date=2025-12-31", "date=2026-01-01"]


def test_a_past_day_of_all_events_stays_as_it_was_when_users_reach_the_limit(tmp_path):
    day_s = 86_400
    first = [("a", "x", 0), ("a", "y", 60), ("b", "x", 5), ("c", "z", 9)]
    second = [("b", "y", day_s), ("b", "z", day_s + 1)]
    options = {"min_user_interactions": 2, "max_user_interactions": 3}
    for name, events in (("one", first), ("two", first + second)):
        text = "".join(f"{user},{item},{_NOON_S + at}\n" for user, item, at in events)
        url = _csv(tmp_path / f"{name}.csv", f"user_id,item_id,timestamp\n{text}")
        _ingest(url, tmp_path / name, **options)
    assert {user for user, *_ in _kept(tmp_path / "one")} == {"a"}
    assert {user for user, *_ in _kept(tmp_path / "two")} == {"a", "b"}

    store = tmp_path / "edges"
    assert build_edges(tmp_path / "one" / ALL_EVENTS, store).rebuilt == 1
    assert build_edges(tmp_path / "two" / ALL_EVENTS, store).rebuilt == 1
    past = "date=2026-01-01/part-0.parquet"
    days = [pq.read_table(tmp_path / name / ALL_EVENTS / past) for name in ("one", "two")]
    assert days[0].equals(days[1])
    assert days[0].num_rows == len(first)


def test_all_events_leave_out_users_of_too_many_in_one_day_and_are_absent_without_limits(tmp_path):
    events = "".join(f"bot,x,{_NOON_S + at}\n" for at in range(4)) + f"a,x,{_NOON_S}\n"
    url = _csv(tmp_path / "log.csv", f"user_id,item_id,timestamp\n{events}")
    _ingest(url, tmp_path / "limited", max_user_interactions=3)
    found = pq.read_table(tmp_path / "limited" / ALL_EVENTS, columns=["user_id"])
    assert found.column("user_id").to_pylist() == ["a"]
    _ingest(url, tmp_path / "all")
    assert not (tmp_path / "all" / ALL_EVENTS).exists()
