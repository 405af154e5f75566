import dataclasses

import numpy as np
import pytest

from benchmarks.protocol_data import ProtocolCase
from benchmarks.protocol_vectors import STARTS, first_vectors
from hiertcn.evaluation.protocol import build_requests
from hiertcn.items.prior import popularity_prior
from tests.models.test_sequence_networks import ITEMS, of_lists


@pytest.fixture(scope="module")
def case():
    # Items 0-4 and 5-9 are never met in one session; the others are in none of the fit part.
    rng = np.random.default_rng(0)
    users = [
        [rng.permutation(5)[:4].tolist(), (5 + rng.permutation(5)[:4]).tolist()] for _ in range(40)
    ]
    fit = of_lists(users)
    store = of_lists([*users, [[10, 1]]])
    return ProtocolCase(
        name="tiny",
        phase="test",
        fit=fit,
        store=store,
        requests=build_requests(store),
        items=ITEMS,
        popularity=np.bincount(fit.item_rows, minlength=ITEMS),
    )


@pytest.mark.parametrize("start", STARTS)
def test_the_last_coordinate_is_the_fit_parts_popularity(case, start):
    vectors = first_vectors(case, 9, start, seed=0)
    assert vectors.shape == (ITEMS, 9) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:, -1], popularity_prior(case.popularity), rtol=1e-6)
    if start == "random":
        # Training draws these rows itself.
        assert not vectors[:, :-1].any()


def test_items_of_one_session_start_close_together(case):
    vectors = first_vectors(case, 9, "graph", seed=0)[:, :-1]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = unit @ unit.T
    apart = similar[:5, 5:10].max()
    assert similar[:5, :5].min() > apart and similar[5:10, 5:10].min() > apart
    np.testing.assert_allclose((vectors[:10] ** 2).sum(axis=1).mean(), 8 / 9, rtol=0.3)


def test_what_comes_after_the_fit_part_changes_nothing(case):
    earlier = dataclasses.replace(case, store=case.fit)
    np.testing.assert_array_equal(
        first_vectors(earlier, 9, "graph", seed=0), first_vectors(case, 9, "graph", seed=0)
    )
