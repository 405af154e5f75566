"""Laws of the item table: what is written is read back, nothing else is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hiertcn.errors import InputError
from hiertcn.files import sha256
from hiertcn.items.gathering import gather_rows
from hiertcn.items.mapping import HUGE_PAGE_BYTES
from hiertcn.items.table import ItemTable, TableDtype

DTYPES: list[TableDtype] = ["float16", "float32"]


def some_vectors(items: int = 100, dim: int = 17) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(items, dim)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "how", [{}, {"prefault": True}, {"anonymous_huge_pages": True}], ids=["lazy", "fault", "copy"]
)
def test_reads_back_what_was_written(
    tmp_path: Path, dtype: TableDtype, how: dict[str, bool]
) -> None:
    vectors = some_vectors()
    written = ItemTable.write(tmp_path / "table", vectors, dtype)
    table = ItemTable.open(tmp_path / "table", **how)
    assert (len(table), table.dim) == (100, 17)
    assert table.vectors.dtype == dtype
    assert np.array_equal(table.vectors, vectors.astype(dtype))
    assert table.checksum == written.checksum
    table.verify()
    with pytest.raises(ValueError, match="read-only"):
        table.vectors[0, 0] = 1
    assert (tmp_path / "table" / "vectors.bin").stat().st_size == HUGE_PAGE_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 4), (3, 1, 2)])
def test_gather_agrees_with_numpy(
    tmp_path: Path, dtype: TableDtype, shape: tuple[int, ...]
) -> None:
    table = ItemTable.write(tmp_path / "table", some_vectors(), dtype)
    rows = np.random.default_rng(1).integers(0, 100, shape).astype(np.int32)
    expected = np.asarray(table.vectors)[rows].astype(np.float32)
    out = np.full((*shape, 17), np.nan, np.float32)
    assert np.array_equal(table.gather(rows), expected)
    assert table.gather(rows, out=out) is out
    assert np.array_equal(out, expected)


@given(
    npst.arrays(
        np.float16,
        npst.array_shapes(min_dims=2, max_dims=2, max_side=20),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=16),
    )
)
def test_widening_half_precision_is_exact(vectors: np.ndarray) -> None:
    out = np.empty(vectors.shape, np.float32)
    assert gather_rows(vectors, np.arange(len(vectors)), out) == -1
    assert np.array_equal(out, vectors.astype(np.float32))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dim=st.integers(1, 3000), items=st.integers(1, 60))
def test_alignment_holds_for_every_size(tmp_path: Path, dim: int, items: int) -> None:
    table = ItemTable.write(tmp_path / "table", some_vectors(items, dim), "float32")
    assert (table.directory / "vectors.bin").stat().st_size % HUGE_PAGE_BYTES == 0
    assert np.array_equal(table.vectors, some_vectors(items, dim))


def test_unknown_rows_gather_zeros(tmp_path: Path) -> None:
    for dtype in DTYPES:
        table = ItemTable.write(tmp_path / dtype, some_vectors(), dtype)
        found = table.gather([[3, -1]], out=np.full((1, 2, 17), np.nan, np.float32))
        assert np.array_equal(found[0, 0], table.vectors[3].astype(np.float32))
        assert not found[0, 1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_products_agree_with_numpy(tmp_path: Path, dtype: TableDtype) -> None:
    table = ItemTable.write(tmp_path / "table", some_vectors(dim=129), dtype)
    rng = np.random.default_rng(1)
    rows, queries = rng.integers(-1, 101, (4, 60)), rng.normal(size=(4, 129)).astype(np.float32)
    inside = (rows >= 0) & (rows < 100)
    vectors = table.gather(np.where(inside, rows, -1))
    expected = np.einsum("rcd,rd->rc", vectors, queries)
    np.testing.assert_allclose(table.dots(rows, queries), expected, rtol=1e-4, atol=1e-4)
    assert table.dots(rows[:, :0], queries).shape == (4, 0)


def test_chunked_writing_changes_nothing(tmp_path: Path) -> None:
    vectors = some_vectors(items=9000, dim=1000)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    table = ItemTable.write(tmp_path / "table", mapped, "float16")
    assert np.array_equal(table.vectors, vectors.astype(np.float16))


def test_rows_past_the_table_are_refused(tmp_path: Path) -> None:
    table = ItemTable.write(tmp_path / "table", some_vectors())
    with pytest.raises(InputError, match="row 100 lies past"):
        table.gather([1, 100])
    with pytest.raises(InputError, match="expected integers"):
        table.gather([0.5])
    for out in (np.empty((2, 17)), np.empty((1, 17), np.float32), np.empty((17, 2), np.float32).T):
        with pytest.raises(InputError, match="out is"):
            table.gather([0, 1], out=out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float16", r"NaN or infinite in row\(s\) 3, 7"),
        (np.inf, "float32", r"NaN or infinite in row\(s\) 3, 7"),
        (1e6, "float16", r"overflow float16 in row\(s\) 3, 7"),
    ],
)
def test_values_that_cannot_be_stored_are_refused_with_their_rows(
    tmp_path: Path, value: float, dtype: TableDtype, message: str
) -> None:
    vectors = some_vectors()
    vectors[[3, 7], 5] = value
    with pytest.raises(InputError, match=message):
        ItemTable.write(tmp_path / "table", vectors, dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (1, 2, 3)])
def test_shapes_that_are_no_table_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[items, dim\]"):
        ItemTable.write(tmp_path / "table", np.zeros(shape))
    with pytest.raises(InputError, match="expected one of float16, float32"):
        ItemTable.write(tmp_path / "table", np.zeros((1, 1)), "int8")  # type: ignore[arg-type]


def test_damage_is_found(tmp_path: Path) -> None:
    directory = ItemTable.write(tmp_path / "table", some_vectors()).directory
    file = directory / "vectors.bin"
    with file.open("r+b") as contents:
        contents.seek(1000)
        contents.write(b"\x00\x01")
    with pytest.raises(InputError, match=r"vectors\.bin is corrupt"):
        ItemTable.open(directory).verify()
    os.truncate(file, 3000)
    with pytest.raises(InputError, match="has 3000 bytes, expected 2097152"):
        ItemTable.open(directory)
    file.unlink()
    with pytest.raises(InputError, match="has no bytes"):
        ItemTable.open(directory)


def test_an_unchanged_table_is_read_for_its_checksum_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ItemTable.write(tmp_path / "table", some_vectors())
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256(path)

    monkeypatch.setattr("hiertcn.items.table.sha256", counted)
    ItemTable.open(table.directory)
    assert read == []
    table.verify()
    ItemTable.open(table.directory).verify()
    assert read == [table.directory / "vectors.bin"]
    with (table.directory / "vectors.bin").open("r+b") as contents:
        contents.write(b"\x01\x02\x03")
    os.utime(table.directory / "vectors.bin", ns=(1, 1))
    for _ in range(2):
        with pytest.raises(InputError, match="is corrupt"):
            table.verify()
    assert len(read) == 2


@pytest.mark.parametrize(
    "header",
    ["[]", "{}", '{"format": 1}', '{"format": 1, "shape": [-1, 2], "sha256": "", "dtype": "x"}'],
)
def test_a_foreign_header_is_refused(tmp_path: Path, header: str) -> None:
    directory = ItemTable.write(tmp_path / "table", some_vectors()).directory
    (directory / "header.json").write_text(header)
    with pytest.raises(InputError, match=r"header\.json"):
        ItemTable.open(directory)


def test_processes_share_the_pages(tmp_path: Path) -> None:
    vectors = some_vectors(items=40_000, dim=129)
    table = ItemTable.write(tmp_path / "table", vectors)
    script = (
        "import sys; from pathlib import Path; from hiertcn.items.table import ItemTable\n"
        "table = ItemTable.open(Path(sys.argv[1]), prefault=True)\n"
        "entry = Path('/proc/self/smaps').read_text().split('vectors.bin')[1]\n"
        "fields = dict(line.split(':') for line in entry.splitlines()[1:20] if ':' in line)\n"
        "print(fields['Private_Dirty'].split()[0], fields['Rss'].split()[0])"
    )
    if not Path("/proc/self/smaps").exists():
        pytest.skip("no /proc/self/smaps on this platform")
    shown = subprocess.run(
        [sys.executable, "-c", script, str(table.directory)],
        check=True,
        capture_output=True,
        text=True,
    )
    private_dirty_kb, resident_kb = map(int, shown.stdout.split())
    assert private_dirty_kb == 0
    assert resident_kb * 1024 >= vectors.size * 2
