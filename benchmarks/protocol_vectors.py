"""Where the compared networks' learned item vectors start, under the evaluation protocol.

At random, or where the item encoder's id vectors start in the pipeline: at the leading singular
vectors of what the item graph of the fit part says beyond popularity.
"""

from typing import Any, Final, Literal

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from benchmarks.protocol_data import ProtocolCase
from hiertcn.graph.csr import CSR
from hiertcn.graph.options import GraphOptions
from hiertcn.items.prior import popularity_prior
from hiertcn.sessions.store import SessionStore
from hiertcn.training.item_spectral_start import spectral_vectors
from hiertcn.training.options import ItemVectorKind

Start = Literal["random", "graph"]
STARTS: Final = ("random", "graph")

ITEM_VECTORS: Final[dict[Start, ItemVectorKind]] = {"random": "learned", "graph": "fine-tuned"}
"""The training option that goes with a start."""


def first_vectors(case: ProtocolCase, dim: int, start: Start, seed: int) -> NDArray[np.float32]:
    """Return what training begins with, for all rows of the case's sessions.

    Args:
        case: its fit part alone is read.
        dim: width, the popularity prior's coordinate included.
        start: ``random`` gives zeros, which training replaces by random rows of unit length;
            ``graph`` rows of unit length on average, random ones for items without an edge.
        seed: of what is random.

    Returns:
        float32 ``[rows, dim]``; the last coordinate is the popularity prior.
    """
    counts = np.bincount(case.fit.item_rows, minlength=case.store.meta.items)
    vectors = np.zeros((len(counts), dim), np.float32)
    if start == "graph":
        rng = np.random.default_rng(seed)
        found = spectral_vectors(_item_graph(case.fit, len(counts)), dim - 1, seed=seed)
        lonely = ~found.any(axis=1)
        found[lonely] = rng.standard_normal((int(lonely.sum()), found.shape[1]))
        vectors[:, : found.shape[1]] = found / np.sqrt(dim)
    vectors[:, -1] = popularity_prior(counts)
    return vectors


def _item_graph(store: SessionStore, items: int) -> CSR:
    """Count the items of one session at most ``max_followers`` places apart, as the pipeline's."""
    rows = np.asarray(store.item_rows, np.int64)
    session = np.repeat(np.arange(len(store.session_offsets) - 1), np.diff(store.session_offsets))
    times_us = np.asarray(store.timestamps_us)
    options = GraphOptions()
    graph: Any = scipy.sparse.csr_array((items, items), dtype=np.float32)
    for distance in range(1, options.max_followers + 1):
        near = (session[distance:] == session[:-distance]) & (
            times_us[distance:] - times_us[:-distance] <= options.window_s * 1e6
        )
        near &= rows[distance:] != rows[:-distance]
        ends = rows[:-distance][near], rows[distance:][near]
        graph = graph + scipy.sparse.csr_array(
            (np.ones(len(ends[0]), np.float32), ends), shape=graph.shape
        )
    return CSR(
        indptr=graph.indptr.astype(np.int64),
        indices=graph.indices.astype(np.int32),
        weights=graph.data.astype(np.float32),
    )
