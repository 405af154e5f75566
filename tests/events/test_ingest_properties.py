"""Laws of ingest, on arbitrary logs."""

import csv
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.events.ingest import IngestOptions, IngestSummary, ingest

_START_S = 1_767_225_600
_PRESENT_IDS = st.sampled_from(["a", "b", "ü,;|", 'q"uote', "line\nbreak", "7"])
_IDS = st.none() | _PRESENT_IDS
_TIMES = st.one_of(
    st.none(), st.just(-3), st.just(10**12 // 5), st.integers(_START_S, _START_S + 200_000)
)
_GOOD_ROW = st.tuples(
    st.sampled_from(["a", "b"]), _PRESENT_IDS, st.integers(_START_S, _START_S + 200_000)
)
_ROWS = st.tuples(
    st.lists(_GOOD_ROW, min_size=4, max_size=20),
    st.lists(st.tuples(_IDS, _IDS, _TIMES), max_size=15),
).flatmap(lambda parts: st.permutations(parts[0] + parts[1]))
_LIMITS = st.fixed_dictionaries(
    {
        "min_item_interactions": st.integers(0, 3),
        "min_user_interactions": st.integers(0, 3),
        "max_user_interactions": st.integers(3, 8),
        "repeat_filters": st.booleans(),
    }
)
_EFFORT = settings(max_examples=10)


def _ingest(rows, folder: Path, **options) -> IngestSummary | None:
    users, items, times = zip(*rows, strict=True)
    log = pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "timestamp": pa.array(times, pa.int64()),
        }
    )
    pq.write_table(log, folder / "log.parquet")
    try:
        return ingest(
            str(folder / "log.parquet"),
            folder / "ingested",
            options=IngestOptions(timestamp_unit="s", **options),
        )
    except InputError:
        return None


def _events(folder: Path) -> list[tuple[str, str, int]]:
    table = ds.dataset(folder / "ingested/events").to_table()
    seconds = [time // 10**6 for time in table["timestamp"].cast(pa.int64()).to_pylist()]
    return list(
        zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), seconds, strict=True)
    )


def _slow_reference(rows, options) -> set[tuple[str, str, int]]:
    kept = {row for row in rows if None not in row and _START_S <= row[2] <= _START_S + 200_000}
    while True:
        before = len(kept)
        items = [item for _, item, _ in kept]
        kept = {row for row in kept if items.count(row[1]) >= options["min_item_interactions"]}
        users = [user for user, _, _ in kept]
        kept = {row for row in kept if users.count(row[0]) >= options["min_user_interactions"]}
        users = [user for user, _, _ in kept]
        kept = {row for row in kept if users.count(row[0]) <= options["max_user_interactions"]}
        if len(kept) == before or not options["repeat_filters"]:
            return kept


@_EFFORT
@given(rows=_ROWS, limits=_LIMITS, data=st.data())
def test_kept_events_are_the_slow_references_in_any_order_of_rows(rows, limits, data):
    expected = _slow_reference(rows, limits)
    for order in (rows, data.draw(st.permutations(rows))):
        with tempfile.TemporaryDirectory() as name:
            summary = _ingest(order, Path(name), **limits)
            if summary is None:
                assert not expected
                continue
            events = _events(Path(name))
            assert set(events) == expected
            assert len(events) == len(expected) == summary.events


@_EFFORT
@given(rows=_ROWS, limits=_LIMITS)
def test_every_row_is_kept_filtered_or_rejected(rows, limits):
    with tempfile.TemporaryDirectory() as name:
        summary = _ingest(rows, Path(name), **limits)
        if summary is None:
            return
        dropped = sum(summary.rejected.values()) + sum(summary.filtered.values())
        assert summary.events + dropped == summary.rows == len(rows)
        rejects = pq.read_table(Path(name) / "ingested/rejects.parquet")
        assert len(rejects) == sum(summary.rejected.values())
        assert len(set(rejects["row"].to_pylist())) == len(rejects)


@_EFFORT
@given(rows=_ROWS)
def test_ingesting_what_was_ingested_changes_nothing(rows):
    limits = {"min_item_interactions": 0, "min_user_interactions": 0}
    with tempfile.TemporaryDirectory() as name:
        assert _ingest(rows, Path(name), **limits) is not None
        again = ingest(
            str(Path(name) / "ingested/events"),
            Path(name) / "again/ingested",
            options=IngestOptions(**limits),
        )
        assert again.rejected == {}
        assert _events(Path(name) / "again") == _events(Path(name))


@_EFFORT
@given(rows=_ROWS)
def test_csv_and_parquet_are_the_same_log(rows):
    limits = {"min_item_interactions": 0, "min_user_interactions": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = _ingest(rows, folder, **limits)
        assert expected is not None
        with (folder / "log.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "item_id", "timestamp"])
            writer.writerows(rows)
        summary = ingest(
            str(folder / "log.csv"),
            folder / "from_csv/ingested",
            options=IngestOptions(timestamp_unit="s", **limits),
        )
        assert _events(folder / "from_csv") == _events(folder)
        assert (summary.rows, summary.rejected) == (expected.rows, expected.rejected)
