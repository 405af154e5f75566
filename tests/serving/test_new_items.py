"""The durable set of new items: what was upserted last is there, whatever was dropped or saved."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError, OverloadError
from hiertcn.events.ingest import ingest
from hiertcn.events.options import IngestOptions
from hiertcn.serving.log.event_export import export_parquet
from hiertcn.serving.log.event_log import EventLog, LoggedInteraction
from hiertcn.serving.log.item_export import export_items
from hiertcn.serving.log.logged_items import LoggedItem, pack, unpack
from hiertcn.serving.new_items.new_items import SAVED_FILE, NewItems

TEXTS = st.text(max_size=12)
NUMBERS = st.floats(-1e30, 1e30)
ATTRIBUTES = st.dictionaries(
    TEXTS,
    TEXTS
    | NUMBERS
    | st.lists(TEXTS, max_size=3).map(tuple)
    | st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=5).map(
        lambda values: np.array(values, np.float32)
    ),
    max_size=4,
)


def item(name: str, version: int, **attributes) -> LoggedItem:
    return LoggedItem(item_id=name, version=version, received_us=7, attributes=attributes)


def _equal(one: LoggedItem, other: LoggedItem) -> bool:
    return pack(one) == pack(other)


@given(
    name=st.text(min_size=1, max_size=20),
    attributes=ATTRIBUTES,
    neighbors=st.lists(st.text(min_size=1), max_size=3).map(tuple),
)
def test_an_entry_is_read_as_it_was_written(name, attributes, neighbors):
    given_item = LoggedItem(
        item_id=name,
        version=2**40,
        received_us=-1,
        attributes=attributes,
        neighbors=neighbors,
        weights=(0.5,) * len(neighbors),
    )
    found = unpack(pack(given_item))
    assert list(found.attributes) == list(attributes)
    for column, value in attributes.items():
        assert type(found.attributes[column]) is type(value)
        np.testing.assert_array_equal(found.attributes[column], value)
    assert (found.item_id, found.version, found.received_us) == (name, 2**40, -1)
    assert (found.neighbors, found.weights) == (neighbors, given_item.weights)


@settings(max_examples=25)
@given(
    steps=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True)
        | st.sampled_from(["rotate", "save and drop", "restart", "interaction"]),
        max_size=14,
    )
)
def test_the_last_upsert_of_each_item_survives_rotation_and_restart(steps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    saved = folder / SAVED_FILE
    log, new_items = EventLog.open(folder / "log"), NewItems()
    expected: dict[str, LoggedItem] = {}
    for step in steps:
        if step == "rotate":
            log.rotate()
        elif step == "interaction":
            log.append([LoggedInteraction("u", "i", 1, 1, 0, "")])
        elif step == "save and drop":
            export_parquet(log, folder / "events")
            new_items.save(saved)
            for segment in log.sealed():
                log.drop(segment.number)
        elif step == "restart":
            log.close()
            log, new_items = EventLog.open(folder / "log"), NewItems()
            new_items.load(saved, log)
        else:
            entries = [item(f"i{n}", new_items.next_version(), t="x" * n) for n in step]
            log.append(entries)
            for entry in entries:
                new_items.put(entry)
                expected[entry.item_id] = entry
        found = {one.item_id: one for one in new_items.since(0)}
        assert found.keys() == expected.keys()
        assert all(_equal(found[name], expected[name]) for name in expected)
        versions = [one.version for one in new_items.since(0)]
        assert versions == sorted(versions)
        assert all(one.version > 3 for one in new_items.since(3))
    log.close()


def test_an_older_version_never_comes_back():
    new_items = NewItems()
    new_items.put(item("a", 5))
    new_items.put(item("a", 4))
    assert [one.version for one in new_items.since(0)] == [5]
    assert new_items.next_version() == 6
    new_items.forget(["a", "b"])
    assert len(new_items) == 0
    assert new_items.next_version() == 7


def test_room_is_held_for_what_is_under_way():
    new_items = NewItems(most=2, most_bytes=1 << 10)
    new_items.put(item("a", 1))
    with (
        new_items.room_for([item("a", 2), item("b", 3)]),
        pytest.raises(OverloadError, match=r"3 new items, more than the 2"),
        new_items.room_for([item("c", 4)]),
    ):
        pass
    with new_items.room_for([item("c", 4)]):
        pass
    with (
        pytest.raises(OverloadError, match=r"smaller attributes"),
        new_items.room_for([item("a", 5, text="x" * 2000)]),
    ):
        pass


def test_a_damaged_file_is_named(tmp_path: Path):
    log, new_items = EventLog.open(tmp_path / "log"), NewItems()
    log.append([item("a", 1, title="one")])
    log.close()
    segment = next((tmp_path / "log").glob("*.log"))
    good = segment.read_bytes()
    log = EventLog.open(tmp_path / "log")
    for data in (good[:-3] + b"xyz", good[:9] + b"\xff" + good[10:]):
        segment.write_bytes(data)
        with pytest.raises(InputError, match=r"000001\.log is damaged"):
            NewItems().load(tmp_path / SAVED_FILE, log)
    segment.write_bytes(good)
    new_items.load(tmp_path / SAVED_FILE, log)
    new_items.put(item("b", 2))
    new_items.save(tmp_path / SAVED_FILE)
    (tmp_path / SAVED_FILE).write_bytes(b"something else")
    with pytest.raises(InputError, match=r"new_items\.log is not an event log segment"):
        NewItems().load(tmp_path / SAVED_FILE, log)
    log.close()


def test_parquet_has_one_row_an_item_and_is_read_by_the_daily_run(tmp_path: Path):
    folder = tmp_path / "state" / "items"
    vector = np.array([1.5, 2.5], np.float32)
    export_items(
        [
            item("a", 1, title="old", image=vector, price=1.0),
            item("b", 2, title="other", tags=("x", "y"), price="dear"),
        ],
        folder,
        1,
    )
    export_items([item("a", 3, title="new")], folder, 2)
    export_items([item("a", 3, title="new")], folder, 2)
    rows = {
        row["item_id"]: row
        for path in sorted(folder.glob("*.parquet"))
        for row in pq.ParquetFile(path).read().to_pylist()
    }
    assert rows["a"] == {"item_id": "a", "title": "new"}
    assert rows["b"]["tags"] == ["x", "y"]
    # The two prices of the first file are of different kinds.
    assert rows["b"]["price"] == "dear"
    export_items([item("b", 4, title="gone")], folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["part-2.parquet", "part-3.parquet"]

    events = tmp_path / "events.csv"
    events.write_text(
        "user_id,item_id,timestamp\n" + "".join(f"u{n},{i},{n}\n" for n in range(3) for i in "ab")
    )
    ingest(
        str(events),
        tmp_path / "ingested",
        items_url=str(folder),
        options=IngestOptions(min_user_interactions=1, min_item_interactions=1, timestamp_unit="s"),
    )
    read = pq.ParquetFile(tmp_path / "ingested" / "items.parquet").read().to_pylist()
    assert {row["item_id"]: row["title"] for row in read} == {"a": "new", "b": "gone"}
