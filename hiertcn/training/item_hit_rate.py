"""Item-to-item retrieval on held-out edges: is the answer among the query's nearest items?

The whole catalog competes, less the query itself and the neighbors it is known to have in the
training graph (else they would fill the list). Ties count against the answer, so constant vectors
score 0.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hiertcn.training.item_batches import ItemFeatures, feature_tensors
from hiertcn.training.item_pairs import HeldOutEdges

_QUERIES_PER_SLICE = 512


def hit_rate(vectors: NDArray[np.float32], held: HeldOutEdges, *, k: int = 10) -> float:
    """Return the share of held-out edges whose answer is among the ``k`` best by dot product.

    Args:
        vectors: float32 [items, dim].
        held: edges to ask for; ``nan`` if there are none.
        k: length of the list.
    """
    return float((answer_ranks(vectors, held) <= k).mean()) if len(held.queries) else float("nan")


def answer_ranks(vectors: NDArray[np.float32], held: HeldOutEdges) -> NDArray[np.int64]:
    """Return each answer's rank from 1, int64 [edges], ties against it."""
    indptr, indices = held.training.indptr, held.training.indices
    ranks = np.empty(len(held.queries), np.int64)
    for start in range(0, len(ranks), _QUERIES_PER_SLICE):
        part = slice(start, start + _QUERIES_PER_SLICE)
        queries, answers = held.queries[part], held.answers[part]
        scores = vectors[queries] @ vectors.T
        here = np.arange(len(queries))
        scores[here, queries] = -np.inf
        of_answer = scores[here, answers].copy()
        for place, query in enumerate(queries):
            scores[place, indices[indptr[query] : indptr[query + 1]]] = -np.inf
        scores[here, answers] = of_answer
        ranks[part] = (scores >= of_answer[:, None]).sum(axis=1)
    return ranks


def baseline_hit_rates(features: ItemFeatures | None, held: HeldOutEdges) -> dict[str, float]:
    """Return the hit rates of the features alone, of popularity and of random vectors.

    Args:
        features: the items' own; None where they have none.
        held: edges to ask for; nothing is returned if there are none.
    """
    if not len(held.queries):
        return {}
    training = held.training
    rates = {}
    if features is not None and features.values.shape[1]:
        given, _ = feature_tensors(features, np.arange(training.items))
        rates["features"] = hit_rate(torch.nn.functional.normalize(given).numpy(), held)
    degree = np.bincount(training.indices, weights=training.weights, minlength=training.items)
    rates["popularity"] = hit_rate(_popularity_vectors(degree), held)
    noise = np.random.default_rng(0).normal(size=(training.items, 64)).astype(np.float32)
    rates["random"] = hit_rate(noise / np.linalg.norm(noise, axis=1, keepdims=True), held)
    return rates


def _popularity_vectors(degree: NDArray[Any]) -> NDArray[np.float32]:
    """Two coordinates whose dot product is a monotone function of the answer's degree."""
    angle = (np.argsort(np.argsort(degree)) + 1.0) / (len(degree) + 1.0)
    return np.stack([angle, np.ones_like(angle)], axis=1).astype(np.float32)
