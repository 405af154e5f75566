"""Filters by item attribute against a slow reading of the same values, and what is refused."""

import datetime
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.items.attributes import ItemAttributes
from hiertcn.items.index import IdIndex

ITEMS = 12
UTC = datetime.UTC


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> IdIndex:
    folder = tmp_path_factory.mktemp("index")
    IdIndex.build([f"item-{row}" for row in range(ITEMS)], folder / "index")
    return IdIndex.open(folder / "index")


def write(folder: Path, index: IdIndex, items: pa.Table, **options: object) -> ItemAttributes:
    pq.write_table(items, folder / "items.parquet")
    return ItemAttributes.write(folder / "attributes", index, folder / "items.parquet", **options)


VALUES = {
    "category": (pa.dictionary(pa.int32(), pa.string()), st.sampled_from(["red", "blue", "green"])),
    "tags": (pa.list_(pa.string()), st.lists(st.sampled_from(["a", "b", "c"]), max_size=3)),
    "stock": (pa.int16(), st.integers(-3, 3)),
    "price": (pa.float32(), st.sampled_from([-1.5, 0.0, 2.25, 10.0])),
    "new": (pa.bool_(), st.booleans()),
    "added": (
        pa.timestamp("ms"),
        st.datetimes(datetime.datetime(2026, 1, 1), datetime.datetime(2026, 1, 3)).map(
            lambda when: when.replace(microsecond=0)
        ),
    ),
}
TEXTS = {
    "category": st.sampled_from(["red", "blue", "violet"]),
    "tags": st.sampled_from(["a", "b", "z"]),
    "stock": st.sampled_from(["-1", "0", "2", "1.5"]),
    "price": st.sampled_from(["-1.5", "0", "2.25", "1e1"]),
    "new": st.sampled_from(["true", "false"]),
    "added": st.sampled_from(["2026-01-02", "2026-01-01T12:00:00Z", "2026-01-02T01:00:00+02:00"]),
}


def span(column: str, text: str):
    if column in ("category", "tags"):
        return text, text
    if column == "new":
        return text == "true", text == "true"
    if column != "added":
        return float(text), float(text)
    if len(text) == 10:
        day = datetime.datetime.fromisoformat(text).replace(tzinfo=UTC)
        return day, day + datetime.timedelta(days=1, microseconds=-1)
    return (datetime.datetime.fromisoformat(text),) * 2


def slow_passes(column: str, value, condition: AttributeFilter) -> bool:
    """The rules as the documentation words them, one value at a time."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if column == "added":
        values = [when.replace(tzinfo=UTC) for when in values]

    def matches(texts) -> bool:
        return any(
            low <= one <= high
            for one in values
            for low, high in (span(column, text) for text in texts)
        )

    if condition.any_of and not matches(condition.any_of):
        return False
    if condition.none_of and matches(condition.none_of):
        return False
    if condition.min is not None and not any(
        one >= span(column, condition.min)[0] for one in values
    ):
        return False
    return condition.max is None or any(one <= span(column, condition.max)[1] for one in values)


@st.composite
def columns_and_conditions(draw):
    column = draw(st.sampled_from(sorted(VALUES)))
    type_, values = VALUES[column]
    held = draw(st.lists(st.none() | values, min_size=ITEMS - 2, max_size=ITEMS - 2))
    texts = TEXTS[column]
    bounds = st.none() | texts if column in ("stock", "price", "added") else st.none()
    condition = AttributeFilter(
        column=column,
        any_of=tuple(draw(st.lists(texts, max_size=2))),
        none_of=tuple(draw(st.lists(texts, max_size=2))),
        min=draw(bounds),
        max=draw(bounds),
    )
    return pa.array(held, type_), held, condition


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns_and_conditions(), st.randoms(use_true_random=False))
def test_what_passes_is_what_the_rules_say(tmp_path, index, case, random) -> None:
    array, held, condition = case
    # Rows in the file's own order, and an item that the index does not know.
    rows = random.sample(range(ITEMS), ITEMS - 2)
    items = pa.table({"item_id": [f"item-{row}" for row in rows], condition.column: array})
    attributes = write(tmp_path, index, items)
    value_of = dict(zip(rows, held, strict=True))
    expected = [slow_passes(condition.column, value_of.get(row), condition) for row in range(ITEMS)]
    assert attributes.passing(condition).tolist() == expected


def test_titles_and_unknown_items(tmp_path: Path, index: IdIndex) -> None:
    items = pa.table(
        {
            "item_id": ["item-3", "stranger", "item-1"],
            "title": ["Three", "None", " "],
            "n": [1, 2, 3],
        }
    )
    attributes = write(tmp_path, index, items, columns=["n"])
    assert attributes.titles(np.array([3, 1, 0])) == ["Three", None, None]
    assert attributes.kinds == {"title": "text", "n": "integer"}
    assert len(attributes) == ITEMS


def test_the_usable_columns_are_taken_and_the_others_named(tmp_path: Path, index: IdIndex) -> None:
    items = pa.table(
        {
            "item_id": ["item-0", "item-1"],
            "name": ["x" * 400, "y" * 400],
            "description": ["long " * 80, "longer " * 80],
            "vector": [[0.5, 1.0], [1.0, 2.0]],
            "price": pa.array([Decimal("1.50"), Decimal("2")]),
            "day": [datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)],
        }
    )
    attributes = write(tmp_path, index, items)
    assert attributes.kinds == {"name": "text", "price": "number", "day": "time"}
    assert "bytes on average" in attributes.skipped["description"]
    assert "cannot be filtered" in attributes.skipped["vector"]
    named = write(tmp_path, index, items, columns=["description"])
    assert named.kinds == {"name": "text", "description": "text"}
    with pytest.raises(InputError, match=r"'vector' is list<.*cannot be filtered"):
        write(tmp_path, index, items, columns=["vector"])
    with pytest.raises(InputError, match=r"no column 'colour' .* its columns are name, desc"):
        write(tmp_path, index, items, columns=["colour"])


def test_no_items_file_means_no_attributes(tmp_path: Path, index: IdIndex) -> None:
    attributes = ItemAttributes.write(tmp_path / "none", index, tmp_path / "absent.parquet")
    assert (len(attributes), attributes.kinds) == (ITEMS, {})
    assert attributes.titles(np.array([0])) == [None]
    with pytest.raises(InputError, match=r"filters\[2\]\.column is 'x'.* none, as the release"):
        attributes.passing(AttributeFilter(column="x", any_of=("y",)), "filters[2]")
    with pytest.raises(InputError, match="no items to take them from"):
        ItemAttributes.write(tmp_path / "none", index, None, columns=["x"])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (AttributeFilter(column="colour", any_of=("red",)), "column is 'colour'; the columns to"),
        (
            AttributeFilter(column="text", any_of=("a",)),
            r"column is 'text', which was left out \(texts of",
        ),
        (AttributeFilter(column="kind", min="a"), "min is 'a' but the column 'kind' is of kind te"),
        (AttributeFilter(column="new", max="true"), "max is 'true' but the column 'new' is of ki"),
        (AttributeFilter(column="price", min="cheap"), "min is 'cheap'; expected a decimal"),
        (AttributeFilter(column="price", any_of=("1", "nan")), r"any_of\[1\] is 'nan'; expected a"),
        (AttributeFilter(column="new", none_of=("maybe",)), r"none_of\[0\] is 'maybe'; expected t"),
        (AttributeFilter(column="day", max="2026-13-01"), "max is '2026-13-01'; expected a time"),
        (AttributeFilter(column="day", max="2026-01-01T00:00:00"), "max is .* expected a time in"),
    ],
)
def test_what_does_not_fit_a_column_is_named(tmp_path, index, condition, message) -> None:
    items = pa.table(
        {
            "item_id": ["item-0", "item-1"],
            "kind": ["a", "b"],
            "text": ["long " * 80] * 2,
            "price": [1.0, 2.0],
            "new": [True, False],
            "day": [datetime.date(2026, 1, 1)] * 2,
        }
    )
    with pytest.raises(InputError, match=rf"^filters\[0\]\.{message}"):
        write(tmp_path, index, items).passing(condition, "filters[0]")


@pytest.mark.parametrize("how", ["truncate", "delete", "not arrow", "another format"])
def test_damaged_attributes_are_refused(tmp_path: Path, index: IdIndex, how: str) -> None:
    write(tmp_path, index, pa.table({"item_id": ["item-0"], "n": [1]}))
    path = tmp_path / "attributes" / "attributes.arrow"
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "another format":
        header = path.with_name("header.json")
        header.write_text(json.dumps({**json.loads(header.read_text()), "format": 9}))
    else:
        path.write_bytes(content[:-1] if how == "truncate" else bytes(len(content)))
    with pytest.raises(InputError, match=r"attributes\.arrow|header\.json"):
        ItemAttributes.open(tmp_path / "attributes")
