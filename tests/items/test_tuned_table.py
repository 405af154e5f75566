"""Laws of a tuned item table: what was learnt is carried over, and nothing else changes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hiertcn.errors import InputError
from hiertcn.items.table import ItemTable, TableDtype
from hiertcn.items.tuned_table import pass_table_on, write_tuned_table

NUMBERS = st.floats(-4, 4, width=16)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    vectors=npst.arrays(
        np.float32, st.tuples(st.just(3), st.integers(1, 6), st.integers(1, 5)), elements=NUMBERS
    ),
    dtype=st.sampled_from(["float16", "float32"]),
    data=st.data(),
)
def test_each_row_moves_by_what_it_learnt(
    tmp_path: Path, vectors: np.ndarray, dtype: TableDtype, data: st.DataObject
) -> None:
    unlearnt = data.draw(npst.arrays(np.bool_, vectors.shape[1]))
    vectors[2, unlearnt] = vectors[1, unlearnt]
    names = ("newer", "start", "trained")
    newer, start, trained = (
        ItemTable.write(tmp_path / name, part, dtype)
        for name, part in zip(names, vectors, strict=True)
    )
    tuned = write_tuned_table(newer, start, trained, tmp_path / "tuned")
    assert tuned.vectors.dtype == dtype
    for row in range(len(newer)):
        expected = vectors[0, row] + (vectors[2, row] - vectors[1, row])
        np.testing.assert_array_equal(tuned.vectors[row], expected.astype(dtype))
    np.testing.assert_array_equal(tuned.vectors[unlearnt], newer.vectors[unlearnt])


def test_tables_of_other_shapes_are_refused(tmp_path: Path) -> None:
    def table(name: str, items: int) -> ItemTable:
        return ItemTable.write(tmp_path / name, np.ones((items, 2), np.float32))

    with pytest.raises(InputError, match=r"trained has the shape \[3, 2\] but .*newer \[4, 2\]"):
        write_tuned_table(
            table("newer", 4), table("start", 4), table("trained", 3), tmp_path / "tuned"
        )
    assert not (tmp_path / "tuned").exists()


def test_a_table_passed_on_outlives_the_first(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    first = ItemTable.write(tmp_path / "first", vectors, "float32")
    passed = pass_table_on(first, tmp_path / "passed")
    assert passed.checksum == first.checksum
    for file in (tmp_path / "first").iterdir():
        file.unlink()
    again = ItemTable.open(tmp_path / "passed")
    again.verify()
    np.testing.assert_array_equal(again.vectors, vectors)
