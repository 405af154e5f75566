"""Where id vectors start: leading singular vectors of what the item graph says beyond popularity.

A vector per item drawn at random takes hundreds of steps to find its neighbors. What item2vec
factorizes implicitly, the pointwise mutual information of neighbors (Levy and Goldberg, NeurIPS
2014), is known from the graph, and decomposing it takes a few sparse products.
"""

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from hiertcn.graph.csr import CSR


def spectral_vectors(csr: CSR, dim: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Factorize the graph's positive pointwise mutual information.

    ``PMI_ij = log(w_ij w / (w_i w_j))`` with ``w_ij`` the weight between two items in both
    directions, ``w_i`` an item's weight and ``w`` the whole graph's; below 0 it counts as 0.

    Args:
        csr: the item graph.
        dim: most columns; fewer if the graph has no more items than that.
        seed: of the randomized decomposition.

    Returns:
        float32 [items, columns] of standard deviation 1 over the items with any information; the
        others' rows are 0. No columns if the graph has too few edges.
    """
    information = _positive_information(csr)
    known = np.diff(information.indptr) > 0
    columns = min(dim, int(known.sum()) - 1)
    if columns < 1:
        return np.empty((csr.items, 0), np.float32)
    # scikit-learn takes two seconds to import.
    from sklearn.utils.extmath import randomized_svd

    left, values, _ = randomized_svd(information, columns, n_iter=4, random_state=seed)
    vectors = left * np.sqrt(values)
    spread = float(vectors[known].std())
    if not spread:
        return np.empty((csr.items, 0), np.float32)
    scaled: NDArray[np.float32] = (vectors / spread).astype(np.float32)
    scaled[~known] = 0.0
    return scaled


def _positive_information(csr: CSR) -> scipy.sparse.csr_array:
    shape = (csr.items, csr.items)
    one_way = scipy.sparse.csr_array(
        (np.asarray(csr.weights, np.float32), np.asarray(csr.indices), np.asarray(csr.indptr)),
        shape=shape,
    )
    both = (one_way + one_way.T).tocsr()
    of_item = both.sum(axis=1)
    rows = np.repeat(np.arange(csr.items), np.diff(both.indptr))
    expected = of_item[rows] * of_item[both.indices] / max(float(of_item.sum()), 1e-30)
    values = np.log(np.maximum(both.data, 1e-30) / np.maximum(expected, 1e-30))
    both.data = np.maximum(values, 0.0).astype(np.float32)
    both.eliminate_zeros()
    return both
