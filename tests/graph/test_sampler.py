from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from torch_geometric.loader import LinkLoader, NodeLoader
from torch_geometric.sampler import NegativeSampling, NeighborSampler, NodeSamplerInput

from hiertcn.errors import InputError
from hiertcn.graph.csr import CSR
from hiertcn.graph.sampler import CSRSampler, graph_data, neighborhood_graph
from hiertcn.graph.walks import importance_neighborhoods


def random_graph(items=60, seed=0):
    rng = np.random.default_rng(seed)
    degrees = rng.integers(0, 9, items)
    neighbors = [rng.choice(items, degree, replace=False) for degree in degrees]
    return CSR(
        indptr=np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64),
        indices=np.concatenate(neighbors).astype(np.int32),
        weights=rng.integers(1, 5, degrees.sum()).astype(np.float32),
    )


def star(weights):
    """Node 0 with as many neighbors as weights."""
    degree = len(weights)
    return CSR(
        indptr=np.array([0] + [degree] * (degree + 1), np.int64),
        indices=np.arange(1, degree + 1, dtype=np.int32),
        weights=np.array(weights, np.float32),
    )


def drawn(sampler, times):
    """How often each subset of the star's leaves is drawn, as a share."""
    seeds = NodeSamplerInput(None, torch.tensor([0]))
    found = Counter(
        tuple(sorted(sampler.sample_from_nodes(seeds).node[1:].tolist())) for _ in range(times)
    )
    return {subset: count / times for subset, count in found.items()}


def breadth_first(csr, seeds, hops):
    """Every node reached and every edge of the nodes that are less than ``hops`` away."""
    reached, edges, frontier = list(seeds), [], list(seeds)
    for _ in range(hops):
        new = []
        for node in frontier:
            for edge in range(csr.indptr[node], csr.indptr[node + 1]):
                edges.append(edge)
                if csr.indices[edge] not in reached and csr.indices[edge] not in new:
                    new.append(csr.indices[edge])
        reached += new
        frontier = new
    return set(map(int, reached)), sorted(edges)


def test_all_neighbors_is_a_breadth_first_search():
    csr = random_graph()
    sampler = CSRSampler(csr, [-1, -1])
    seeds = torch.tensor([3, 17, 40])
    for _ in range(2):
        out = sampler.sample_from_nodes(NodeSamplerInput(None, seeds))
        nodes, edges = breadth_first(csr, seeds.tolist(), 2)
        assert out.node[:3].tolist() == [3, 17, 40]
        assert set(out.node.tolist()) == nodes and len(out.node) == len(nodes)
        assert sorted(out.edge.tolist()) == edges
        owner = np.repeat(np.arange(csr.items), csr.degrees)
        assert np.array_equal(out.node[out.row], csr.indices[out.edge])
        assert np.array_equal(out.node[out.col], owner[out.edge])
        assert sum(out.num_sampled_nodes) == len(nodes)
        assert sum(out.num_sampled_edges) == len(edges)


def test_node_loader_batches_carry_their_features_and_edges():
    csr = random_graph()
    features = torch.arange(csr.items).float()[:, None]
    data = graph_data(csr, x=features)
    loader = NodeLoader(data, CSRSampler(csr, [3, 2]), input_nodes=None, batch_size=16)
    seen = []
    for batch in loader:
        assert torch.equal(batch.x[:, 0].long(), batch.n_id)
        assert torch.equal(batch.edge_weight, data.edge_weight[batch.e_id])
        source, target = batch.n_id[batch.edge_index]
        assert torch.equal(torch.stack([source, target]), data.edge_index[:, batch.e_id])
        assert torch.bincount(batch.edge_index[1]).max() <= 3
        seen += batch.n_id[: batch.batch_size].tolist()
    assert sorted(seen) == list(range(csr.items))


@pytest.mark.parametrize("mode", ["binary", "triplet"])
def test_link_loader_finds_both_ends_of_each_link(mode):
    csr = random_graph()
    data = graph_data(csr)
    loader = LinkLoader(
        data,
        CSRSampler(csr, [2, 2]),
        edge_label_index=data.edge_index,
        neg_sampling=NegativeSampling(mode, 1),
        batch_size=32,
    )
    links = []
    for batch in loader:
        if mode == "binary":
            ends = batch.n_id[batch.edge_label_index][:, batch.edge_label > 0]
        else:
            ends = batch.n_id[torch.stack([batch.src_index, batch.dst_pos_index])]
            assert len(batch.dst_neg_index) == ends.shape[1]
        links.append(ends)
    assert torch.equal(torch.cat(links, 1), data.edge_index)


def test_subsets_are_uniform_and_weighted_ones_follow_the_weights():
    torch.manual_seed(0)
    times = 6000
    shares = drawn(CSRSampler(star([1, 1, 1, 1, 1]), [2]), times)
    for subset in combinations(range(1, 6), 2):
        assert shares[subset] == pytest.approx(1 / 10, abs=5 * np.sqrt(0.09 / times))
    weights = [1.0, 2.0, 5.0]
    shares = drawn(CSRSampler(star(weights), [2], weighted=True), times)
    for one, other in combinations(range(3), 2):
        # Drawn one after the other by weight, in either order.
        expected = sum(
            weights[a] / 8 * weights[b] / (8 - weights[a]) for a, b in ((one, other), (other, one))
        )
        error = 5 * np.sqrt(expected * (1 - expected) / times)
        assert shares[one + 1, other + 1] == pytest.approx(expected, abs=error)


def test_agrees_in_distribution_with_the_compiled_sampler():
    pytest.importorskip("pyg_lib", reason="pyg-lib is not installed")
    torch.manual_seed(0)
    csr, times = star([1.0] * 5), 6000
    ours = drawn(CSRSampler(csr, [3]), times)
    theirs = drawn(NeighborSampler(graph_data(csr), [3]), times)
    for subset in combinations(range(1, 6), 3):
        assert ours[subset] == pytest.approx(theirs[subset], abs=7 * np.sqrt(0.09 / times))


def test_the_seed_decides_and_a_walked_graph_can_be_sampled():
    graph = neighborhood_graph(importance_neighborhoods(random_graph(), top=6, progress=False))
    assert graph.degrees.max() <= 6
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seeds = NodeSamplerInput(None, torch.arange(20))
        outs.append(CSRSampler(graph, [2, 2], weighted=True).sample_from_nodes(seeds).edge.tolist())
    assert outs[0] == outs[1] != outs[2]


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"num_neighbors is \[\]"):
        CSRSampler(random_graph(), [])
    with pytest.raises(InputError, match="hold 1 repeats"):
        seeds = NodeSamplerInput(None, torch.tensor([1, 2, 1]))
        CSRSampler(random_graph(), [2]).sample_from_nodes(seeds)
