"""Laws of the id index: append-only rows, exact text, constant-time open, refusals."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.items.hashing import xxh64
from hiertcn.items.index import IdIndex
from hiertcn.items.texts import Texts

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PER_EXAMPLE_FOLDER = settings(
    max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[], Path]:
    """Return a maker of new folder names."""
    made = iter(range(10**6))
    return lambda: tmp_path / f"index-{next(made)}"


@PER_EXAMPLE_FOLDER
@given(first=st.lists(TEXT), second=st.lists(TEXT), foreign=st.lists(TEXT))
def test_agrees_with_a_dictionary_and_keeps_rows_when_appended(
    folder: Callable[[], Path], first: list[str], second: list[str], foreign: list[str]
) -> None:
    before = IdIndex.build(first, folder())
    after = IdIndex.build(second, folder(), before)

    rows = {id_: row for row, id_ in enumerate(dict.fromkeys(first + second))}
    queries = first + second + foreign
    assert len(before) == len(set(first))
    assert after.ids(range(len(after))) == list(rows)
    assert after.rows(queries).tolist() == [rows.get(id_, -1) for id_ in queries]
    assert before.rows(first).tolist() == [rows[id_] for id_ in first]


@PER_EXAMPLE_FOLDER
@given(ids=st.lists(TEXT, min_size=1), data=st.data())
def test_takes_every_arrow_form_of_text(
    folder: Callable[[], Path], ids: list[str], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(ids)))
    plain = pa.array(ids, pa.string())
    forms = [
        pa.array(ids, pa.large_string()),
        pa.array(ids, pa.string_view()),
        plain.dictionary_encode(),
        pa.chunked_array([plain[:cut], plain[cut:]]),
        pa.chunked_array([plain[:cut].dictionary_encode(), plain[cut:].dictionary_encode()]),
        pa.concat_arrays([pa.array(["before"]), plain])[1:],
        np.array(ids, dtype=object),
    ]
    expected = IdIndex.build(ids, folder())
    for form in forms:
        built = IdIndex.build(form, folder())
        assert built.id_array.equals(expected.id_array)
        assert built.rows(form).tolist() == expected.rows(ids).tolist()


@given(strings=st.lists(TEXT), seed=st.integers(0, 2**64 - 1))
def test_hash_is_xxh64(strings: list[str], seed: int) -> None:
    reference = pytest.importorskip("xxhash")
    found = xxh64(pa.array(strings, pa.large_string()), seed)
    assert found.tolist() == [reference.xxh64_intdigest(s.encode(), seed) for s in strings]


def test_hash_has_the_published_values() -> None:
    found = xxh64(pa.array(["", "a", "abc", "0123456789" * 4], pa.large_string()))
    assert found[:3].tolist() == [0xEF46DB3751D8E999, 0xD24EC4F1A98C6E5B, 0x44BC2CF5AD770999]


def test_texts_laid_end_to_end_are_found_as_strings_are(tmp_path: Path) -> None:
    ids = ["a", "bb", "", "日本", "x" * 40]
    index = IdIndex.build(ids, tmp_path / "index")
    asked = ["bb", "nothing", "", "x" * 40, "日", "日本"]
    parts = [Texts.of(asked[:2]), Texts.of([]), Texts.of(asked[2:])]
    joined = Texts.joined(parts)
    assert [joined[place] for place in range(len(joined))] == asked
    assert index.rows(joined).tolist() == index.rows(asked).tolist() == [1, -1, 2, 4, -1, 3]
    assert index.rows(Texts.of([])).tolist() == []


def test_null_queries_are_unknown(tmp_path: Path) -> None:
    index = IdIndex.build(["", "a"], tmp_path / "index")
    assert index.rows(["a", None, "", "b"]).tolist() == [1, -1, 0, -1]  # type: ignore[list-item]
    assert index.rows([]).tolist() == []
    assert index.rows(pa.nulls(2)).tolist() == [-1, -1]


def test_empty_index_knows_nothing(tmp_path: Path) -> None:
    index = IdIndex.build([], tmp_path / "index")
    assert len(index) == 0
    assert index.rows(["a"]).tolist() == [-1]
    assert index.ids([]) == []
    assert IdIndex.build(["a"], tmp_path / "next", index).rows(["a"]).tolist() == [0]


def test_a_previous_index_is_not_modified(tmp_path: Path) -> None:
    previous = IdIndex.build(["a", "b"], tmp_path / "previous")
    contents = {f.name: f.read_bytes() for f in previous.directory.iterdir()}
    IdIndex.build(["c"], tmp_path / "next", previous)
    assert {f.name: f.read_bytes() for f in previous.directory.iterdir()} == contents
    with pytest.raises(InputError, match="never modified"):
        IdIndex.build(["c"], tmp_path / "next" / ".." / "previous", previous)


def test_the_same_ids_give_the_same_files(tmp_path: Path) -> None:
    one = IdIndex.build(["a", "b", "c"], tmp_path / "one")
    other = IdIndex.build(["b", "c"], tmp_path / "other", IdIndex.build(["a"], tmp_path / "a"))
    for file in one.directory.iterdir():
        assert file.read_bytes() == (other.directory / file.name).read_bytes()


def weak_hash(strings: pa.Array, seed: int) -> NDArray[np.uint64]:
    """Hash to the length of the text, shifted up, unless a seed asks for the real hash."""
    if seed:
        return xxh64(strings, seed)
    lengths = [len(s.as_py().encode()) if s.is_valid else 0 for s in strings]
    return np.asarray(lengths, np.uint64) << np.uint64(56)


def test_colliding_ids_are_refused_with_both_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'left' and 'twin' have the same 64-bit hash"):
        IdIndex.build(["a", "left", "left", "twin"], tmp_path / "index", hash_ids=weak_hash)
    assert list(tmp_path.iterdir()) == []

    first = IdIndex.build(["a", "left"], tmp_path / "first", hash_ids=weak_hash)
    with pytest.raises(InputError, match="'left' and 'twin'"):
        IdIndex.build(["twin"], tmp_path / "second", first, hash_ids=weak_hash)
    separated = IdIndex.build(["twin"], tmp_path / "third", first, hash_ids=weak_hash, hash_seed=1)
    assert separated.rows(["a", "left", "twin"]).tolist() == [0, 1, 2]


def test_a_foreign_id_with_a_known_hash_is_unknown(tmp_path: Path) -> None:
    index = IdIndex.build(["a", "bb", "", "cccc"], tmp_path / "index", hash_ids=weak_hash)
    assert index.rows(["bb", "xx", "bx", "", "z"]).tolist() == [1, -1, -1, 2, -1]
    with pytest.raises(InputError, match="built with the hash 'weak_hash'"):
        IdIndex.open(index.directory)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", None], "position 1 is null"),
        ([1, 2], "one string per id"),
        (pa.array([1, 2]), "type int64"),
        (["\ud800"], "UTF-8"),
    ],
)
def test_ids_that_are_no_text_are_refused(tmp_path: Path, ids: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        IdIndex.build(ids, tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_outside_the_index_have_no_id(tmp_path: Path, row: int) -> None:
    index = IdIndex.build(["a", "b"], tmp_path / "index")
    with pytest.raises(InputError, match=f"row {row} has no id"):
        index.ids([0, row])


@pytest.mark.parametrize("name", ["ids.arrow", "hashes.npy", "rows.npy", "buckets.npy"])
def test_damage_is_found(tmp_path: Path, name: str) -> None:
    index = IdIndex.build([f"item {k}" for k in range(1000)], tmp_path / "index")
    index.verify()
    file = index.directory / name
    contents = bytearray(file.read_bytes())

    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    with pytest.raises(InputError, match=f"{name} is corrupt"):
        IdIndex.open(index.directory).verify()

    file.write_bytes(contents[:-1])
    with pytest.raises(InputError, match=f"{name} has .* expected"):
        IdIndex.open(index.directory)

    file.unlink()
    with pytest.raises(InputError, match=f"{name} has no bytes"):
        IdIndex.open(index.directory)


@pytest.mark.parametrize("header", ["{}", "[]", "{", '{"format": 99}'])
def test_a_foreign_header_is_refused(tmp_path: Path, header: str) -> None:
    IdIndex.build(["a"], tmp_path / "index")
    (tmp_path / "index" / "header.json").write_text(header)
    with pytest.raises(InputError, match=r"header\.json"):
        IdIndex.open(tmp_path / "index")


def test_threads_share_one_index(tmp_path: Path) -> None:
    ids = [f"item {k}" for k in range(20_000)]
    index = IdIndex.build(ids, tmp_path / "index")
    found: list[list[int]] = []

    def look_up() -> None:
        found.append(index.rows(ids).tolist())

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(len(ids)))] * 4
