"""Item encoder speed: training against PyG's own layers and loader, layer-wise against minibatch.

    python -m benchmarks.item_encoder_speed [--nodes N] [--steps N] [--json PATH]

Training: pairs a second of whole steps, loader included, of our trainer and of PyG's ``SAGEConv``
fed by PyG's ``LinkNeighborLoader``; equal graph, fan-out, width, layers, pairs and negatives, the
same loss and Adam. Ours runs with importance pooling, which has a dense layer per neighbor that
``SAGEConv`` has not, and with GraphSAGE's mean, which is what ``SAGEConv`` computes. Where neither
``pyg-lib`` nor ``torch-sparse`` is installed PyG's loader cannot sample; then PyG's ``LinkLoader``
runs over a vectorized sampler written here against PyG's ``BaseSampler``, and the result says so.
A second PyG row trims each layer to what the next one needs (``trim_to_layer``), as its
documentation advises. Contestants take turns.

Inference: all nodes with ``--top`` neighbors and two layers, layer by layer, measured whole; in
minibatches, measured on a few batches and scaled to all nodes.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import LinkLoader, LinkNeighborLoader
from torch_geometric.nn import SAGEConv
from torch_geometric.sampler import (
    BaseSampler,
    EdgeSamplerInput,
    NegativeSampling,
    NodeSamplerInput,
    SamplerOutput,
)
from torch_geometric.sampler.neighbor_sampler import edge_sample
from torch_geometric.utils import trim_to_layer

from hiertcn.files import write_json
from hiertcn.graph.csr import CSR
from hiertcn.graph.walks import Neighborhoods, WalkOptions, walk_neighborhoods
from hiertcn.training.item_encoder import EncoderTraining
from hiertcn.training.item_encoder_options import ItemEncoderOptions
from hiertcn.training.item_inference import embed_items, embed_some
from hiertcn.training.item_pairs import hold_out_edges
from models.graphsage import GraphSAGE, GraphSAGEConfig

LAYERS: Final = 2
TEMPERATURE: Final = 0.1


def drawn_graph(nodes: int, degree: int, seed: int = 0) -> CSR:
    """Return a graph of items whose popularity is Zipf's, half of the edges among near rows."""
    rng = np.random.default_rng(seed)
    edges = nodes * degree
    sources = np.repeat(np.arange(nodes), degree)
    popular = (nodes ** rng.random(edges)).astype(np.int64) - 1
    near = (sources + rng.integers(1, 200, edges)) % nodes
    targets = np.where(rng.random(edges) < 0.5, popular, near)
    targets = np.where(targets == sources, (targets + 1) % nodes, targets)
    return CSR(
        np.arange(0, edges + 1, degree, dtype=np.int64),
        targets.astype(np.int32),
        rng.integers(1, 6, edges).astype(np.float32),
    )


class _VectorizedSampler(BaseSampler):  # type: ignore[misc]
    """PyG's sampling in torch alone: all neighbors of at most ``fan_out``, else drawn ones."""

    def __init__(self, indptr: Tensor, neighbors: Tensor, fan_out: list[int]) -> None:
        self._indptr, self._neighbors, self._fan_out = indptr, neighbors, fan_out
        self._place = torch.full((len(indptr) - 1,), -1, dtype=torch.int64)

    def sample_from_nodes(self, index: NodeSamplerInput, **kwargs: Any) -> SamplerOutput:
        """Sample around nodes."""
        raise NotImplementedError

    def sample_from_edges(
        self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> SamplerOutput:
        """Sample around both ends of edges and their negatives, by PyG's own code."""
        return edge_sample(
            index, self._sample, len(self._indptr) - 1, False, neg_sampling=neg_sampling
        )

    def _sample(self, seed: Tensor, *args: Any, **kwargs: Any) -> SamplerOutput:
        place, node = self._place, seed
        place[node] = torch.arange(len(node))
        frontier = node
        rows, columns, nodes_of_hop, edges_of_hop = [], [], [len(node)], []
        for fan_out in self._fan_out:
            start, stop = self._indptr[frontier], self._indptr[frontier + 1]
            degree = stop - start
            chosen = torch.arange(fan_out).expand(len(frontier), -1)
            drawn = (torch.rand(len(frontier), fan_out) * degree.unsqueeze(1)).long()
            chosen = torch.where(degree.unsqueeze(1) > fan_out, drawn, chosen)
            real = chosen < degree.unsqueeze(1)
            targets = place[frontier].unsqueeze(1).expand_as(chosen)[real]
            sources = self._neighbors[(start.unsqueeze(1) + chosen)[real]]
            new = torch.unique(sources[place[sources] < 0])
            place[new] = torch.arange(len(node), len(node) + len(new))
            node = torch.cat([node, new])
            rows.append(place[sources])
            columns.append(targets)
            nodes_of_hop.append(len(new))
            edges_of_hop.append(len(sources))
            frontier = new
        place[node] = -1
        return SamplerOutput(
            node=node,
            row=torch.cat(rows),
            col=torch.cat(columns),
            edge=None,
            num_sampled_nodes=nodes_of_hop,
            num_sampled_edges=edges_of_hop,
        )


class _PyG(nn.Module):
    """Two SAGEConv layers, as PyG's examples stack them."""

    def __init__(self, features: int, width: int, *, trims: bool) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            SAGEConv(features if layer == 0 else width, width) for layer in range(LAYERS)
        )
        self.trims = trims

    def forward(self, batch: Data) -> Tensor:
        """Embed the nodes of a batch: float32 [nodes, width]."""
        x, edge_index = batch.x, batch.edge_index
        for layer, convolution in enumerate(self.convolutions):
            if self.trims:
                x, edge_index, _ = trim_to_layer(
                    layer, batch.num_sampled_nodes, batch.num_sampled_edges, x, edge_index
                )
            x = convolution(x, edge_index)
            if layer < LAYERS - 1:
                x = x.relu()
        return nn.functional.normalize(x, dim=-1)


def _pyg_steps(
    csr: CSR, neighborhoods: Neighborhoods, features: Tensor, arguments: argparse.Namespace,
    *, trims: bool,
) -> Iterator[None]:  # fmt: skip
    """Make one step of PyG's training at each turn."""
    real = neighborhoods.rows >= 0
    indptr = torch.from_numpy(np.concatenate([[0], np.cumsum(real.sum(axis=1))]))
    neighbors = torch.from_numpy(neighborhoods.rows[real].astype(np.int64))
    targets = torch.repeat_interleave(torch.arange(csr.items), indptr.diff())
    data = Data(x=features, edge_index=torch.stack([neighbors, targets]))
    sources = np.repeat(np.arange(csr.items), csr.degrees)
    pairs = torch.from_numpy(np.stack([sources, csr.indices.astype(np.int64)]))
    shared: dict[str, Any] = {
        "edge_label_index": pairs,
        "batch_size": arguments.batch,
        "shuffle": True,
        "neg_sampling": NegativeSampling("triplet", amount=1),
    }
    fan_out = [arguments.fan_out] * LAYERS
    if has_compiled_sampler():
        loader: Any = LinkNeighborLoader(data, num_neighbors=fan_out, **shared)
    else:
        loader = LinkLoader(data, _VectorizedSampler(indptr, neighbors, fan_out), **shared)
    model = _PyG(features.shape[1], arguments.width, trims=trims)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    while True:
        for batch in loader:
            z = model(batch)
            queries, positives = z[batch.src_index], z[batch.dst_pos_index]
            others = torch.cat([positives, z[batch.dst_neg_index.reshape(-1)]])
            scores = queries @ others.T / TEMPERATURE
            loss = nn.functional.cross_entropy(scores, torch.arange(len(queries)))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield


def _our_steps(
    csr: CSR,
    neighborhoods: Neighborhoods,
    features: Tensor,
    arguments: argparse.Namespace,
    *,
    pooling: str,
) -> Iterator[None]:
    """Make one step of our training at each turn."""
    given = SimpleNamespace(values=features.numpy(), present=np.ones(csr.items, np.bool_))
    encoder = GraphSAGE(
        GraphSAGEConfig(
            items=csr.items,
            feature_dim=features.shape[1],
            dim=arguments.width,
            hidden=arguments.width,
            layers=LAYERS,
            id_vectors=False,
            pooling=pooling,
        )
    )
    options = ItemEncoderOptions(
        batch=arguments.batch, negatives=arguments.batch, temperature=TEMPERATURE, weight_power=0.0
    )
    held = hold_out_edges(csr, share=0.0, most=0, seed=0)
    training = EncoderTraining(encoder, given, neighborhoods, held, options)
    encoder.train()
    rng = np.random.default_rng(0)
    while True:
        training.step(0, rng, 0)
        yield


def has_compiled_sampler() -> bool:
    """Whether PyG can sample by itself."""
    return any(importlib.util.find_spec(name) for name in ("pyg_lib", "torch_sparse"))


def measure_training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return pairs a second of each contestant, and our ratio to them."""
    csr = drawn_graph(arguments.training_nodes, 20)
    walks = WalkOptions(top=arguments.fan_out)
    neighborhoods = walk_neighborhoods(csr, walks, progress=False)
    features = torch.randn(csr.items, arguments.width, generator=torch.Generator().manual_seed(0))
    contestants = {
        **{
            f"ours, {pooling}": _our_steps(csr, neighborhoods, features, arguments, pooling=pooling)
            for pooling in ("importance", "graphsage")
        },
        "PyG": _pyg_steps(csr, neighborhoods, features, arguments, trims=False),
        "PyG, trimmed": _pyg_steps(csr, neighborhoods, features, arguments, trims=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for step in range(arguments.steps + 2):
        for name, steps in contestants.items():
            started = time.perf_counter()
            next(steps)
            if step >= 2:
                seconds[name].append(time.perf_counter() - started)
    rates = {name: arguments.batch / statistics.median(took) for name, took in seconds.items()}
    return {
        "nodes": csr.items,
        "pairs a step": arguments.batch,
        "negatives a step": arguments.batch,
        "fan-out": [arguments.fan_out] * LAYERS,
        "width": arguments.width,
        "PyG's sampler": "compiled" if has_compiled_sampler() else "vectorized BaseSampler",
        "pairs a second": rates,
        **{
            f"ratio of {ours} to {other}": rates[ours] / rates[other]
            for ours in rates
            for other in rates
            if ours.startswith("ours") and other.startswith("PyG")
        },
    }


def measure_inference(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds for all nodes, layer by layer and in minibatches."""
    neighborhoods = _drawn_neighborhoods(arguments.nodes, arguments.top)
    torch.manual_seed(0)
    encoder = GraphSAGE(
        GraphSAGEConfig(
            items=arguments.nodes,
            feature_dim=0,
            dim=arguments.width,
            hidden=arguments.width,
            layers=LAYERS,
        )
    )
    embed_some(encoder, None, neighborhoods, np.arange(2), 2)
    layer_wise, vectors = _timed(lambda: embed_items(encoder, None, neighborhoods, progress=False))
    rng = np.random.default_rng(0)
    took, worst = [], 0.0
    for _ in range(arguments.minibatches):
        rows = rng.choice(arguments.nodes, arguments.inference_batch, replace=False)
        seconds, found = _timed(partial(embed_some, encoder, None, neighborhoods, rows, len(rows)))
        took.append(seconds)
        worst = float(np.maximum(worst, np.abs(found - vectors[rows]).max()))
    minibatch = statistics.median(took) * arguments.nodes / arguments.inference_batch
    return {
        "nodes": arguments.nodes,
        "neighbors": arguments.top,
        "layers": LAYERS,
        "width": arguments.width,
        "layer-wise seconds": layer_wise,
        "nodes a second": arguments.nodes / layer_wise,
        "minibatch": arguments.inference_batch,
        f"minibatch seconds, scaled from {arguments.minibatches} batches": minibatch,
        "ratio": minibatch / layer_wise,
        "largest difference": worst,
    }


def _drawn_neighborhoods(nodes: int, top: int) -> Neighborhoods:
    graph = drawn_graph(nodes, top)
    weights = graph.weights.reshape(nodes, top)
    return Neighborhoods(
        graph.indices.reshape(nodes, top),
        weights / weights.sum(axis=1, keepdims=True),
        WalkOptions(top=top),
    )


def _timed(work: Callable[[], NDArray[np.float32]]) -> tuple[float, NDArray[np.float32]]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training-nodes", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=30, help="measured steps (default 30)")
    parser.add_argument("--batch", type=int, default=512, help="pairs, and negatives, a step")
    parser.add_argument("--fan-out", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=1_000_000, help="nodes to embed")
    parser.add_argument("--top", type=int, default=50, help="their neighbors")
    parser.add_argument("--inference-batch", type=int, default=512)
    parser.add_argument("--minibatches", type=int, default=5, help="measured minibatches")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {"training": measure_training(arguments), "inference": measure_inference(arguments)}
    for part, figures in found.items():
        print(f"## {part}")
        for name, value in figures.items():
            if isinstance(value, dict):
                value = ", ".join(f"{who} {rate:,.0f}" for who, rate in value.items())
            elif isinstance(value, float):
                value = f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
            print(f"- {name}: {value}")
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
