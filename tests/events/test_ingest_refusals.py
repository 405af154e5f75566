"""Bad logs end in one sentence that names the file or field, and leave nothing behind."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiertcn.errors import InputError
from hiertcn.events.ingest import IngestOptions, ingest

_NO_LIMITS = {"min_user_interactions": 0, "min_item_interactions": 0}
_NOON_S = 1_767_268_800
_LOG = f"user_id,item_id,timestamp,event_type\na,1,{_NOON_S},buy\na,2,{_NOON_S + 1},view\n"
_ITEMS = "item_id,sold,shelf\n1,true,1\n2,false,2\n"


def _refused(tmp_path: Path, url, match: str, *, items_url=None, **options) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=match) as caught:
        ingest(
            str(url),
            tmp_path / "ingested",
            items_url=items_url,
            options=IngestOptions(**_NO_LIMITS | options),
        )
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("user_id,item_id,timestamp\n", "has no rows"),
        (
            f"user,item_id,timestamp\na,b,{_NOON_S}\n",
            "no column 'user_id'; it has user.*user_column",
        ),
        (f"user_id,item_id,timestamp\n,b,{_NOON_S}\n", "none of the log's 1 rows.*null_user_id: 1"),
        ("user_id,item_id,timestamp\na,b,soon\n", "unreadable_timestamp: 1"),
        ("user_id,item_id,timestamp\na,b,12\n", "set timestamp_unit"),
        (f"user_id,item_id,timestamp\na,b,{_NOON_S}\na,b,{_NOON_S}000\n", "mixes units"),
    ],
)
def test_bad_csv(tmp_path, text, match):
    (tmp_path / "log.csv").write_text(text)
    _refused(tmp_path, tmp_path / "log.csv", match)


def test_csv_in_another_encoding(tmp_path):
    (tmp_path / "log.csv").write_bytes(
        f"user_id,item_id,timestamp\né,b,{_NOON_S}\n".encode("latin1")
    )
    _refused(tmp_path, tmp_path / "log.csv", "is not UTF-8 text")


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("user_id", pa.array([1.0, 2.0])),
        ("item_id", pa.array([True, False])),
        ("timestamp", pa.array([float(_NOON_S), 2.0])),
        ("timestamp", pa.array([[1], [2]])),
        ("impressions", pa.array([1, 2])),
        ("impressions", pa.array([[1.5], [2.5]])),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.type),
)
def test_wrong_types_name_the_column_and_the_type(tmp_path, column, values):
    log = {"user_id": ["a", "b"], "item_id": ["a", "b"], "timestamp": [_NOON_S, _NOON_S]}
    pq.write_table(pa.table(log | {column: values}), tmp_path / "log.parquet")
    _refused(tmp_path, tmp_path / "log.parquet", f"column '{column}' of .*log.parquet has type")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_half_written_parquet(tmp_path, keep):
    log = {"user_id": ["a", "b"], "item_id": ["a", "b"], "timestamp": [_NOON_S, _NOON_S]}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    content = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(content[: int(len(content) * keep)])
    _refused(tmp_path, tmp_path / "log.parquet", "log.parquet is not a complete parquet file")


def test_parquet_with_a_damaged_page(tmp_path):
    log = {"user_id": ["a"] * 999, "item_id": ["b"] * 999, "timestamp": [_NOON_S] * 999}
    pq.write_table(pa.table(log), tmp_path / "log.parquet", compression="zstd")
    content = bytearray((tmp_path / "log.parquet").read_bytes())
    content[4:40] = bytes(36)
    (tmp_path / "log.parquet").write_bytes(content)
    _refused(tmp_path, tmp_path / "log.parquet", "log.parquet is not a complete parquet file")


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("nowhere.parquet", "does not exist"),
        ("nowhere/*.parquet", "holds no parquet or CSV file"),
        ("memory://nowhere/log.csv", "does not exist"),
        ("nosuchprotocol://bucket/log.csv", "not an address that can be read"),
        ("http://127.0.0.1:1/log.parquet", "127.0.0.1:1/log.parquet"),
    ],
)
def test_unreachable_urls(tmp_path, url, match):
    _refused(tmp_path, url, match)


def test_missing_file_system_package(tmp_path):
    try:
        import s3fs  # noqa: F401
    except ImportError:
        _refused(tmp_path, "s3://bucket/log.parquet", "needs a package that is not installed.*s3fs")
    else:
        pytest.skip("s3fs is installed here")


def test_folder_without_data(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "readme.md").touch()
    _refused(tmp_path, tmp_path / "log", "holds no parquet or CSV file")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"event_types": ("buy", "rent")}, "'rent'.*it has buy, view"),
        ({"event_types": ("buy",), "event_type_column": "kind"}, "no column 'kind'"),
        ({"data_date": "2020-01-01"}, "2 after data_date"),
        ({"min_item_interactions": 9}, "min_item_interactions=9 leaves none.*are 1.*lower"),
        ({"min_user_interactions": 9}, "min_user_interactions=9 leaves none.*are 2.*lower"),
        ({"max_user_interactions": 1}, "max_user_interactions=1 leaves none.*are 2.*raise"),
        ({"item_filter": "colour"}, "'colour', which .*items.csv does not have"),
        ({"item_filter": "shelf"}, "expected a boolean column"),
        ({"item_filter": "shelf=9"}, "item_filter='shelf=9' leaves none"),
        ({"memory_limit": "much"}, "memory_limit is 'much'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_log(tmp_path, options, match):
    (tmp_path / "log.csv").write_text(_LOG)
    (tmp_path / "items.csv").write_text(_ITEMS)
    items_url = str(tmp_path / "items.csv")
    _refused(tmp_path, tmp_path / "log.csv", match, items_url=items_url, **options)


def test_item_filter_without_items(tmp_path):
    (tmp_path / "log.csv").write_text(_LOG)
    _refused(tmp_path, tmp_path / "log.csv", "needs an items file", item_filter="sold")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sku,title\n1,x\n", "no column 'item_id'"),
        ("item_id,title\n,x\n", "no item with an id"),
        ("", "is empty"),
    ],
)
def test_bad_items_file(tmp_path, text, match):
    (tmp_path / "log.csv").write_text(_LOG)
    (tmp_path / "items.csv").write_text(text)
    _refused(tmp_path, tmp_path / "log.csv", match, items_url=str(tmp_path / "items.csv"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"timestamp_unit": "minutes"}, "timestamp_unit is 'minutes'"),
        ({"min_user_interactions": -1}, "min_user_interactions is -1"),
        ({"min_user_interactions": 5, "max_user_interactions": 4}, "max_user_interactions is 4"),
        ({"session_gap_s": 0.0}, "session_gap_s is 0"),
        ({"session_gap_s": float("nan")}, "session_gap_s is nan"),
        ({"max_future_s": -1.0}, "max_future_s is -1"),
        ({"data_date": "tomorrow"}, "data_date is 'tomorrow'"),
        ({"user_column": ""}, "user_column is empty"),
        ({"user_column": "item_id"}, "same name"),
    ],
    ids=str,
)
def test_options_out_of_range(options, match):
    with pytest.raises(InputError, match=match):
        IngestOptions(**options)


def test_one_user_and_one_item_are_a_log(tmp_path):
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp\na,1,{_NOON_S}\n")
    summary = ingest(str(tmp_path / "log.csv"), tmp_path / "o", options=IngestOptions(**_NO_LIMITS))
    assert (summary.events, summary.users, summary.items) == (1, 1, 1)
