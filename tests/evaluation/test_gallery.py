"""The gallery's neighbours against plain numpy, and what it shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import hiertcn.evaluation.gallery as gallery_module
from hiertcn.evaluation.gallery import gallery_section, nearest
from hiertcn.evaluation.report import write_report
from hiertcn.items.inverted_lists import QuantizationCost


def names(rows):
    return [f"item {row}" for row in rows]


@settings(max_examples=40)
@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 30), st.integers(1, 5)),
        elements=st.floats(-4, 4, width=16),
    ),
    st.integers(1, 8),
)
def test_neighbours_are_the_largest_cosines(vectors, k):
    queries = np.arange(len(vectors))
    rows, cosines = nearest(vectors, queries, k)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths == 0, 1, lengths)
    expected = unit @ unit.T
    np.fill_diagonal(expected, -np.inf)
    assert rows.shape == (len(vectors), min(k, len(vectors) - 1))
    assert not (rows == queries[:, None]).any()
    np.testing.assert_allclose(np.take_along_axis(expected, rows, axis=1), cosines, atol=1e-5)
    best = -np.sort(-expected, axis=1)[:, : rows.shape[1]]
    np.testing.assert_allclose(cosines, best, atol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float16)
    whole = nearest(vectors, np.array([3, 40]), 5)
    monkeypatch.setattr(gallery_module, "_CHUNK_ROWS", 7)
    parts = nearest(vectors, np.array([3, 40]), 5)
    assert np.array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-6)


def test_shows_popular_and_rare_items_that_were_seen(tmp_path):
    counts = np.concatenate([np.arange(40), np.zeros(10, int)])
    section = gallery_section(
        np.random.default_rng(0).normal(size=(50, 4)),
        counts,
        names,
        shown=3,
        quantization=QuantizationCost(lost=0.001, lost_without_reranking=0.02),
    )
    popular, rare = section.tables
    assert [row.label for row in popular.rows] == ["item 39", "item 38", "item 37"]
    assert len(rare.rows) == 3
    assert all(1 <= int(row.cells[0].text) <= 4 for row in rare.rows)
    assert all(len(row.cells) == 6 for row in (*popular.rows, *rare.rows))
    assert "2.00%" in section.paragraphs[1]
    assert "0.10%" in section.paragraphs[1]
    write_report(tmp_path / "report.html", gallery=section)
    page = (tmp_path / "report.html").read_text()
    assert "Item neighbors" in page
    assert "item 39" in page


@pytest.mark.parametrize("items", [1, 2, 4])
def test_few_items_are_shown_as_they_are(items):
    section = gallery_section(np.eye(items), np.ones(items), names, shown=3)
    assert sum(len(table.rows) for table in section.tables) == items
