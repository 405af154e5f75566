"""PyG's loaders on our graphs: a ``BaseSampler`` that needs no compiled extension.

``torch_geometric.loader.NodeLoader`` and ``LinkLoader`` ask a sampler for the neighborhood of some
nodes; PyG's own needs ``pyg-lib`` or ``torch-sparse``. This one reads our memory-mapped CSR and
samples as PyG's does: hop by hop, each node once, every node of the last hop's new ones draws its
neighbors, and an edge points from the neighbor to the node that drew it.

    data = graph_data(csr, x=features)
    sampler = CSRSampler(csr, [10, 5])
    loader = NodeLoader(data, sampler, input_nodes=None, batch_size=512)

Sampling is uniform without replacement, or by edge weight. The random stream is torch's, so
``torch.manual_seed`` and the workers of a loader behave as elsewhere. Several threads must not
share a sampler.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.sampler import (
    BaseSampler,
    EdgeSamplerInput,
    NegativeSampling,
    NodeSamplerInput,
    SamplerOutput,
)
from torch_geometric.sampler.neighbor_sampler import edge_sample, node_sample

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.graph.csr import CSR
from hiertcn.graph.walks import NO_ITEM, Neighborhoods

ALL: Final = -1


class CSRSampler(BaseSampler):  # type: ignore[misc]
    """Samples neighbors from a CSR; holds 4 bytes per item beside the mapped arrays.

    Args:
        csr: the graph; row ``i`` lists the neighbors that node ``i`` draws from.
        num_neighbors: neighbors drawn per node and hop, -1 for all.
        weighted: draw by edge weight (without replacement, Efraimidis and Spirakis 2006) instead
            of uniformly.

    Raises:
        InputError: there is no hop, or a number is below -1.
    """

    def __init__(self, csr: CSR, num_neighbors: Sequence[int], *, weighted: bool = False) -> None:
        if not num_neighbors or min(num_neighbors) < ALL:
            raise InputError(
                f"num_neighbors is {list(num_neighbors)}; expected a number per hop, at least -1 "
                "(all neighbors)"
            )
        self._csr = csr
        self._num_neighbors = list(num_neighbors)
        self._weighted = weighted
        self._place = np.full(csr.items, -1, np.int32)

    def sample_from_nodes(self, index: NodeSamplerInput, **kwargs: Any) -> SamplerOutput:
        """Return the subgraph around ``index.node``; see ``torch_geometric.sampler``.

        ``node`` int64 holds the seeds first; ``row`` and ``col`` are places in it, ``edge`` places
        in the CSR's arrays.
        """
        return node_sample(index, self._sample)

    def sample_from_edges(
        self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> SamplerOutput:
        """Return the subgraph around both ends of the edges, and of sampled negatives."""
        return edge_sample(
            index, self._sample, self._csr.items, disjoint=False, neg_sampling=neg_sampling
        )

    def _sample(self, seed: Tensor, seed_time: Tensor | None = None) -> SamplerOutput:
        if seed_time is not None:
            raise InputError(
                "the loader gives seed times; CSRSampler knows no times, so leave input_time and "
                "edge_label_time empty"
            )
        rows, inverse = np.unique(seed.numpy(), return_inverse=True)
        if len(rows) != len(seed):
            raise InputError(
                f"the {len(seed)} seed nodes hold {len(inverse) - len(rows)} repeats; expected "
                "each node once in a batch"
            )
        random = np.uint64(torch.randint(2**62, ()).item())
        node = seed.numpy().astype(np.int64)
        parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
        nodes_per_hop, edges_per_hop = [len(node)], []
        first = 0
        try:
            self._place[node] = np.arange(len(node), dtype=np.int32)
            for hop, most in enumerate(self._num_neighbors):
                found, *part = _draw(
                    self._csr.indptr,
                    self._csr.indices,
                    self._csr.weights,
                    node,
                    first,
                    most,
                    self._weighted,
                    random + np.uint64(hop),
                    self._place,
                )
                first = len(node)
                node = np.concatenate([node, found])
                parts.append((part[0], part[1], part[2]))
                nodes_per_hop.append(len(found))
                edges_per_hop.append(len(part[0]))
        finally:
            self._place[node] = -1
        row, col, edge = (
            torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)
        )
        return SamplerOutput(
            node=torch.from_numpy(node),
            row=row,
            col=col,
            edge=edge,
            num_sampled_nodes=nodes_per_hop,
            num_sampled_edges=edges_per_hop,
        )


def graph_data(csr: CSR, **attributes: Any) -> Data:
    """Return the graph as PyG's ``Data``, its edges in the CSR's order.

    ``edge_index`` int64 [2, edges] points from neighbor to node, ``edge_weight`` float32 [edges].
    Cost: 20 bytes per edge in memory.
    """
    rows = np.repeat(np.arange(csr.items), csr.degrees)
    edge_index = torch.from_numpy(np.stack([csr.indices.astype(np.int64), rows]))
    weights = torch.from_numpy(csr.weights.copy())
    return Data(edge_index=edge_index, edge_weight=weights, num_nodes=csr.items, **attributes)


def neighborhood_graph(neighborhoods: Neighborhoods) -> CSR:
    """Return importance neighborhoods as a graph, to be sampled by visit counts."""
    valid = neighborhoods.rows != NO_ITEM
    return CSR(
        indptr=np.concatenate([[0], np.cumsum(valid.sum(1))]).astype(np.int64),
        indices=neighborhoods.rows[valid],
        weights=neighborhoods.weights[valid],
    )


@compiled
def _draw(
    indptr: Any,
    indices: Any,
    weights: Any,
    node: Any,
    first: int,
    most: int,
    weighted: bool,
    random: Any,
    place: Any,
) -> Any:
    """Return the new nodes, and row, col, edge of what ``node[first:]`` drew."""
    bound = 0
    for k in range(first, len(node)):
        degree = indptr[node[k] + 1] - indptr[node[k]]
        bound += degree if most < 0 else min(degree, most)
    found = np.empty(bound, np.int64)
    row = np.empty(bound, np.int64)
    col = np.empty(bound, np.int64)
    edge = np.empty(bound, np.int64)
    founds, edges = 0, 0
    state = random
    for k in range(first, len(node)):
        start = indptr[node[k]]
        degree = indptr[node[k] + 1] - start
        if most < 0 or degree <= most:
            chosen = np.arange(degree)
        else:
            chosen = np.empty(most, np.int64)
            if weighted:
                keys = np.empty(degree, np.float64)
                for j in range(degree):
                    state, uniform = _uniform(state)
                    # The largest of uniform ** (1 / weight), in logarithms.
                    keys[j] = -np.log(uniform) / weights[start + j]
                chosen[:] = np.argsort(keys)[:most]
            else:
                # Floyd's algorithm: a uniform subset from as many draws as it has members.
                for j in range(most):
                    state, uniform = _uniform(state)
                    last = degree - most + j
                    pick = np.int64(uniform * (last + 1))
                    for i in range(j):
                        if chosen[i] == pick:
                            pick = last
                            break
                    chosen[j] = pick
        for j in range(len(chosen)):
            neighbor = indices[start + chosen[j]]
            if place[neighbor] == -1:
                place[neighbor] = len(node) + founds
                found[founds] = neighbor
                founds += 1
            row[edges] = place[neighbor]
            col[edges] = k
            edge[edges] = start + chosen[j]
            edges += 1
    return found[:founds].copy(), row, col, edge


@compiled
def _uniform(state: Any) -> Any:
    """SplitMix64: the next state, and a number above 0 and below 1."""
    state += np.uint64(0x9E3779B97F4A7C15)
    mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return state, (np.float64(mixed >> np.uint64(12)) + 0.5) / 4503599627370496.0
