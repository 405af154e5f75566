"""Features: what becomes one, what is refused, and what is missing stays missing."""

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.items.features import FeatureMatrix, FeatureOptions, encode_features
from hiertcn.items.index import IdIndex

IDS = [f"item {k}" for k in range(12)]
COLOURS = ["red", "green", "blue"] * 4
TITLES = [f"{colour} thing of sort {k}" for k, colour in enumerate(COLOURS)]


def vectors(width: int = 4) -> list[list[float]]:
    found: list[list[float]] = np.random.default_rng(0).normal(3, 2, (12, width)).tolist()
    return found


@pytest.fixture
def index(tmp_path: Path) -> IdIndex:
    return IdIndex.build(IDS, tmp_path / "index")


def encoded(
    tmp_path: Path,
    index: IdIndex,
    data: dict[str, Any],
    *,
    name: str = "features",
    previous: FeatureMatrix | None = None,
    **options: Any,
) -> FeatureMatrix:
    table = pa.table({"item_id": IDS[: len(next(iter(data.values())))], **data})
    pq.write_table(table, tmp_path / "items.parquet")
    return encode_features(
        tmp_path / "items.parquet",
        index,
        tmp_path / name,
        FeatureOptions(**options),
        previous=previous,
    )


def test_no_items_file_gives_no_features(tmp_path: Path, index: IdIndex) -> None:
    matrix = encode_features(None, index, tmp_path / "features")
    assert matrix.values.shape == (12, 0)
    assert not matrix.present.any()
    assert matrix.names == ()
    with pytest.raises(InputError, match="named \\(title\\) but there are no items"):
        encode_features(None, index, tmp_path / "other", FeatureOptions(columns=("title",)))


@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float32(), 4),
        pa.list_(pa.float64()),
        pa.large_list(pa.float16()),
    ],
)
def test_vectors_are_standardised(tmp_path: Path, index: IdIndex, type_: pa.DataType) -> None:
    given_ = np.asarray(vectors(), np.float16)
    column = pa.array([list(row) for row in given_], type_)
    matrix = encoded(tmp_path, index, {"image": column})
    wide = given_.astype(np.float64)
    expected = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    np.testing.assert_allclose(matrix.values, expected, atol=1e-5)
    assert matrix.values.dtype == np.float32
    assert matrix.names == tuple(f"image[{k}]" for k in range(4))
    assert matrix.present.all()
    with pytest.raises(ValueError, match="read-only"):
        matrix.values[0, 0] = 1


def test_constant_coordinates_are_zero(tmp_path: Path, index: IdIndex) -> None:
    column = [[0.1, row[0]] for row in vectors()]
    matrix = encoded(tmp_path, index, {"image": column, "n": [7] * 12}, columns=("image", "n"))
    assert not matrix.values[:, [0, 2]].any()
    tiny = encoded(tmp_path, index, {"n": [0.0, 1e-38] * 6}, name="tiny", columns=("n",))
    assert not tiny.values.any()
    assert np.isfinite(matrix.values).all()


def test_rows_follow_the_index_and_foreign_items_are_passed_over(
    tmp_path: Path, index: IdIndex
) -> None:
    order = [5, 0, 11]
    table = pa.table(
        {
            "item_id": ["foreign", *(IDS[k] for k in order), IDS[5], None],
            "weight": [99.0, 1.0, 2.0, 3.0, 77.0, 55.0],
        }
    )
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=2)
    matrix = encode_features(
        tmp_path / "items.parquet", index, tmp_path / "f", FeatureOptions(columns=("weight",))
    )
    spread = np.std([1, 2, 3])
    np.testing.assert_allclose(matrix.values[order, 0], [-1 / spread, 0, 1 / spread], atol=1e-6)
    assert np.flatnonzero(matrix.present).tolist() == sorted(order)
    assert not matrix.values[~matrix.present].any()


def test_large_numbers_keep_their_differences(tmp_path: Path, index: IdIndex) -> None:
    matrix = encoded(tmp_path, index, {"n": [2_000_000_001, 2_000_010_003] * 6}, columns=("n",))
    np.testing.assert_allclose(matrix.values[:2, 0], [-1, 1], atol=1e-6)


def test_integer_item_ids_are_rendered_in_decimal(tmp_path: Path) -> None:
    index = IdIndex.build(["30", "7"], tmp_path / "index")
    pq.write_table(pa.table({"item_id": [7, 30], "w": [0, 1]}), tmp_path / "items.parquet")
    matrix = encode_features(
        tmp_path / "items.parquet", index, tmp_path / "f", FeatureOptions(columns=("w",))
    )
    assert matrix.values[:, 0].tolist() == [1, -1]


def test_default_takes_what_describes_the_item_and_nothing_that_may_tell_the_future(
    tmp_path: Path, index: IdIndex
) -> None:
    matrix = encoded(
        tmp_path,
        index,
        {
            "image": vectors(),
            "title": TITLES,
            "colour": pa.array(COLOURS).dictionary_encode(),
            "tags": [[colour, "new"] for colour in COLOURS],
            "clicks": list(range(12)),
            "price": [1.5] * 12,
            "bestseller": [True] * 12,
            "last_click": [datetime(2026, 1, 1, tzinfo=UTC)] * 12,
            "first_sold": [f"2026-01-0{k % 3 + 1}" for k in range(12)],
            "url": [f"https://example.org/{k}" for k in range(12)],
            "codes": [[k, k] for k in range(12)],
            "empty": pa.nulls(12),
            "blank": pa.array([" ", None] * 6),
            "no_tags": pa.array([[]] * 12, pa.list_(pa.string())),
            "detail": [{"a": 1}] * 12,
        },
    )
    assert dict(matrix.columns) == {
        "image": "vector",
        "title": "text",
        "colour": "category",
        "tags": "tags",
    }
    assert matrix.values.shape == (12, 4 + 64 * 3)
    assert "may tell the future" in matrix.skipped["clicks"]
    assert "may tell the future" in matrix.skipped["bestseller"]
    assert "timestamp" in matrix.skipped["last_click"]
    assert "dates" in matrix.skipped["first_sold"]
    assert "identifier" in matrix.skipped["url"]
    assert matrix.skipped["blank"] == matrix.skipped["no_tags"] == "has no values"
    assert set(matrix.columns) | set(matrix.skipped) == {
        *("image", "title", "colour", "tags", "clicks", "price", "bestseller", "last_click"),
        *("first_sold", "url", "codes", "empty", "blank", "no_tags", "detail"),
    }


def test_named_columns_are_taken_whatever_the_default_says(tmp_path: Path, index: IdIndex) -> None:
    matrix = encoded(
        tmp_path,
        index,
        {
            "clicks": list(range(12)),
            "price": [Decimal(f"{k}.50") for k in range(12)],
            "good": [True, False] * 6,
            "url": [f"https://example.org/{k}" for k in range(12)],
            "codes": [[k, -k] for k in range(12)],
            "colour": COLOURS,
        },
        columns=("codes", "good", "clicks", "price"),
        category_columns=("url",),
        text_columns=("colour",),
        text_dim=5,
        category_buckets=8,
    )
    assert dict(matrix.columns) == {
        "clicks": "number",
        "price": "number",
        "good": "number",
        "url": "category",
        "codes": "vector",
        "colour": "text",
    }
    assert matrix.values.shape == (12, 3 + 8 + 2 + 5)
    good = matrix.values[:, matrix.names.index("good")]
    assert good.tolist() == [1, -1] * 6


def test_similar_texts_are_near(tmp_path: Path, index: IdIndex) -> None:
    matrix = encoded(tmp_path, index, {"title": TITLES}, text_dim=3)
    unit = matrix.values / np.linalg.norm(matrix.values, axis=1, keepdims=True)
    similarity = unit @ unit.T
    same = np.equal.outer(COLOURS, COLOURS)
    assert similarity[same].min() > similarity[~same].max()


@pytest.mark.parametrize("titles", [["word"] * 12, ["one two three"], ["a", None], ["a b", "c"]])
def test_few_words_leave_the_width_as_asked(
    tmp_path: Path, index: IdIndex, titles: list[str | None]
) -> None:
    matrix = encoded(tmp_path, index, {"title": titles}, text_columns=("title",), text_dim=9)
    assert matrix.values.shape == (12, 9)
    assert np.isfinite(matrix.values).all()
    assert matrix.present.tolist() == [k < len(titles) and bool(titles[k]) for k in range(12)]
    assert matrix.values[matrix.present].any(axis=1).all()


def test_equal_categories_share_a_bucket(tmp_path: Path, index: IdIndex) -> None:
    matrix = encoded(tmp_path, index, {"colour": COLOURS}, category_buckets=64)
    buckets = matrix.values.argmax(axis=1)
    assert (np.count_nonzero(matrix.values, axis=1) == 1).all()
    assert [buckets[0], buckets[1], buckets[2]] * 4 == buckets.tolist()
    assert len(set(buckets)) == 3


def test_order_of_tags_does_not_matter(tmp_path: Path, index: IdIndex) -> None:
    tags = [["a", "b"], ["b", None, "a"], ["a"], [], None, ["a", "a", " "]]
    matrix = encoded(tmp_path, index, {"tags": pa.array(tags, pa.list_(pa.string()))})
    assert np.array_equal(matrix.values[0], matrix.values[1])
    np.testing.assert_allclose(matrix.values[2], matrix.values[5])
    np.testing.assert_allclose(np.linalg.norm(matrix.values[[0, 2]], axis=1), 8, rtol=1e-6)
    assert np.flatnonzero(matrix.present).tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("columns", [(), ("image", "title", "colour", "tags", "price")])
def test_every_block_weighs_about_the_same(
    tmp_path: Path, index: IdIndex, columns: tuple[str, ...]
) -> None:
    matrix = encoded(
        tmp_path,
        index,
        {
            "image": vectors(),
            "title": TITLES,
            "colour": COLOURS,
            "tags": [["a", c] for c in COLOURS],
            "price": range(12),
        },
        columns=columns,
    )
    for column in matrix.columns:
        block = [k for k, name in enumerate(matrix.names) if name.startswith(column)]
        assert np.sqrt(np.mean(matrix.values[:, block] ** 2)) == pytest.approx(1, rel=0.01)


def test_missing_values_are_said_to_be_missing(tmp_path: Path, index: IdIndex) -> None:
    image: list[list[float] | None] = [*vectors()]
    image[2] = image[3] = None
    titles: list[str | None] = [*TITLES]
    titles[3] = titles[4] = None
    titles[5] = "?!"
    matrix = encoded(tmp_path, index, {"image": image, "title": titles})
    assert np.flatnonzero(~matrix.present).tolist() == [3]
    assert not matrix.values[3].any()
    lacking = matrix.values[:, matrix.names.index("image:missing")]
    assert np.flatnonzero(lacking).tolist() == [2]
    assert not matrix.values[2, :4].any()
    assert not matrix.values[4:6, 5:].any()


def test_one_column_needs_no_missing_feature(tmp_path: Path, index: IdIndex) -> None:
    matrix = encoded(tmp_path, index, {"image": [None, *vectors()[1:]]})
    assert matrix.names == tuple(f"image[{k}]" for k in range(4))
    assert np.flatnonzero(~matrix.present).tolist() == [0]


def test_wide_vectors_are_reduced_only_when_asked(tmp_path: Path, index: IdIndex) -> None:
    columns = {"visual": vectors(100), "text": vectors(3)}
    assert encoded(tmp_path, index, columns).values.shape == (12, 103)
    reduced = encoded(tmp_path, index, columns, name="reduced", vector_dim=20)
    assert reduced.values.shape == (12, 23)
    assert reduced.names[0] == "visual:svd[0]"
    # 12 vectors span at most 12 dimensions, so 20 components keep every distance but for scale.
    wide = np.asarray(vectors(100))
    standard = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    ratio = reduced.values[:, :20] @ reduced.values[:, :20].T / (standard @ standard.T)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"v": [[1.0, 2.0], [1.0, np.nan]]}, "item 'item 1' has the value nan in the column 'v'"),
        ({"v": [None, [1.0, None]]}, "item 'item 1' has the value null in the column 'v'"),
        ({"v": [[1.0], [-np.inf]]}, "item 'item 1' has the value -inf in the column 'v'"),
        ({"v": [None, [1.0, 2.0], [3.0]]}, "'item 2' has 1 numbers in the column 'v' .* have 2"),
        ({"v": [None, []]}, None),
        ({"v": [[], [1.0]]}, "item 'item 0' has an empty list in the column 'v'"),
        ({"n": [1.0, None, 1e300]}, r"'item 2' has the value 1e\+300 .* from -1e\+30 to 1e\+30"),
        ({"n": [1.0, None, np.nan]}, "item 'item 2' has the value nan in the column 'n'"),
    ],
)
def test_values_that_are_no_features_are_refused_with_item_and_column(
    tmp_path: Path, index: IdIndex, columns: dict[str, Any], message: str | None
) -> None:
    if message is None:
        columns = {"v": pa.array(columns["v"], pa.list_(pa.float32()))}
        message = "item 'item 1' has an empty list"
    with pytest.raises(InputError, match=message):
        encoded(tmp_path, index, columns, columns=tuple(columns))
    assert not (tmp_path / "features").exists()


def test_lengths_are_compared_across_batches(tmp_path: Path) -> None:
    ids = [str(k) for k in range(5000)]
    index = IdIndex.build(ids, tmp_path / "index")
    lists = [[1.0, 2.0]] * 4999 + [[1.0, 2.0, 3.0]]
    pq.write_table(pa.table({"item_id": ids, "v": lists}), tmp_path / "items.parquet")
    with pytest.raises(InputError, match="item '4999' has 3 numbers in the column 'v'"):
        encode_features(tmp_path / "items.parquet", index, tmp_path / "features")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ("colour", "size")}, "no column 'size'; its columns are colour, when"),
        ({"text_columns": ("size",)}, "no column 'size'"),
        ({"columns": ("item_id",)}, "the item's name, not a feature"),
        ({"columns": ("when",)}, r"'when' is timestamp\[us\] and cannot be a feature"),
        ({"category_columns": ("when",)}, "cannot be encoded as category"),
        ({"columns": ("empty",)}, "'empty' has no value for any indexed item"),
    ],
)
def test_columns_that_cannot_be_taken_are_refused(
    tmp_path: Path, index: IdIndex, options: dict[str, Any], message: str
) -> None:
    columns = {
        "colour": COLOURS,
        "when": [datetime(2026, 1, 1)] * 12,
        "empty": pa.nulls(12, pa.string()),
    }
    with pytest.raises(InputError, match=message):
        encoded(tmp_path, index, columns, **options)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_dim": 0}, "text_dim is 0; expected an integer of at least 1"),
        ({"category_buckets": 1}, "category_buckets is 1"),
        ({"vector_dim": -1}, "vector_dim is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"columns": "title"}, "columns is 'title'; expected a list"),
        ({"text_columns": ("a",), "category_columns": ("a",)}, "a is in both"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FeatureOptions(**options)


def test_files_that_are_no_items_are_refused(tmp_path: Path, index: IdIndex) -> None:
    path = tmp_path / "items.parquet"
    with pytest.raises(InputError, match="cannot be read as parquet"):
        encode_features(path, index, tmp_path / "features")
    pq.write_table(pa.table({"item_id": IDS, "title": TITLES}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as parquet"):
        encode_features(path, index, tmp_path / "features")
    path.write_bytes(whole[:30] + bytes(200) + whole[230:])
    with pytest.raises(InputError, match="breaks off while being read"):
        encode_features(path, index, tmp_path / "features")
    pq.write_table(pa.table({"id": IDS}), path)
    with pytest.raises(InputError, match="no column 'item_id'; its columns are id"):
        encode_features(path, index, tmp_path / "features")
    pq.write_table(pa.table({"item_id": ["foreign"], "title": ["a b"]}), path)
    with pytest.raises(InputError, match=r"none of the 1 items .* is in the item index"):
        encode_features(path, index, tmp_path / "features")
    pq.write_table(pa.table({"item_id": [1.5], "title": ["a b"]}), path)
    with pytest.raises(InputError, match="expected text or integers"):
        encode_features(path, index, tmp_path / "features")
    assert not (tmp_path / "features").exists()
    pq.write_table(pa.table({"item_id": IDS, "title": TITLES}).slice(0, 0), path)
    assert not encode_features(path, index, tmp_path / "features").present.any()


ALL_KINDS: dict[str, Any] = {
    "image": [None, *vectors()[1:]],
    "title": TITLES,
    "colour": COLOURS,
    "tags": [["a", c] for c in COLOURS],
    "price": range(12),
}


def test_the_same_input_gives_the_same_files(tmp_path: Path, index: IdIndex) -> None:
    one = encoded(tmp_path, index, ALL_KINDS, name="one", columns=tuple(ALL_KINDS), vector_dim=2)
    two = encoded(tmp_path, index, ALL_KINDS, name="two", columns=tuple(ALL_KINDS), vector_dim=2)
    for file in one.directory.iterdir():
        assert file.read_bytes() == (two.directory / file.name).read_bytes()


def test_an_earlier_encoding_gives_the_same_item_the_same_features(
    tmp_path: Path, index: IdIndex
) -> None:
    options = {"columns": tuple(ALL_KINDS), "text_dim": 6}
    one = encoded(tmp_path, index, ALL_KINDS, name="one", **options)
    half = {name: list(values)[:6] for name, values in ALL_KINDS.items()}
    half["title"][5] = "words never seen before"
    two = encoded(tmp_path, index, half, name="two", previous=one, **options)
    assert two.names == one.names
    np.testing.assert_allclose(two.values[:5], one.values[:5], atol=1e-6)
    assert two.present.tolist() == [True] * 6 + [False] * 6

    with pytest.raises(InputError, match="options text_dim differ"):
        encoded(tmp_path, index, half, name="three", previous=one, columns=tuple(ALL_KINDS))
    del half["tags"]
    with pytest.raises(InputError, match="lacks tags"):
        encoded(tmp_path, index, half, name="three", previous=one, **options)


def test_a_new_item_is_encoded_alone(tmp_path: Path, index: IdIndex) -> None:
    matrix = encoded(tmp_path, index, ALL_KINDS, columns=tuple(ALL_KINDS))
    batch = pa.record_batch({name: list(values)[7:8] for name, values in ALL_KINDS.items()})
    values, present = matrix.encoding().encode(batch, pa.array(["new"]))
    assert present.tolist() == [True]
    np.testing.assert_allclose(values[0], matrix.values[7], atol=1e-6)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    titles=st.lists(st.none() | st.text(max_size=30), min_size=12, max_size=12),
    tags=st.lists(
        st.none() | st.lists(st.none() | st.text(max_size=5), max_size=4),
        min_size=12,
        max_size=12,
    ),
    numbers=st.lists(st.none() | st.floats(-1e30, 1e30, allow_nan=False), min_size=12, max_size=12),
)
def test_whatever_the_values_features_are_finite_and_masked(
    tmp_path: Path, index: IdIndex, titles: Any, tags: Any, numbers: Any
) -> None:
    columns = {
        "anchor": [1.0] * 6 + [2.0] * 6,
        "tags": pa.array(tags, pa.list_(pa.string())),
        "numbers": pa.array(numbers, pa.float64()),
        "title": pa.array(titles, pa.string()),
    }
    named = {"columns": ("anchor",)}
    if any(n is not None for n in numbers):
        named = {"columns": ("anchor", "numbers")}
    if any(any(c.isalnum() for c in t or "") for t in titles):
        named["text_columns"] = ("title",)
    if any(t and any(x and x.strip() for x in t) for t in tags):
        named["columns"] = (*named["columns"], "tags")
    matrix = encoded(tmp_path, index, columns, **named, text_dim=4)
    assert np.isfinite(matrix.values).all()
    assert matrix.present.all()
    assert matrix.values.shape == (12, len(matrix.names))


@pytest.mark.parametrize(
    "name", ["values.npy", "present.npy", "header.json", "encoding.json", "encoding.safetensors"]
)
def test_damage_is_found(tmp_path: Path, index: IdIndex, name: str) -> None:
    directory = encoded(tmp_path, index, {"image": vectors()}).directory
    file = directory / name
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(InputError):
        FeatureMatrix.open(directory).encoding()
    file.unlink()
    with pytest.raises(InputError):
        FeatureMatrix.open(directory).encoding()
