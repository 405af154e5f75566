"""How good is the vector of an item that came after the build? Items are taken out and put back.

    python -m benchmarks.new_items --log simulator --json new_items.json

A tenth of the items is taken out of graph and training altogether, then embedded as UpsertItems
does: from features alone, and with neighbors (the items they met most in the known days). Asked is
what ``item_embeddings.py`` asks, of the meetings of such an item with another on the days after:
given the new item, find the other among all items that were there. Beside it: the raw features,
popularity, chance, and the encoder trained with the items in place, as the next build will be.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.item_embeddings_data import LOGS, RetrievalCase, load_case
from hiertcn.files import write_json
from hiertcn.graph.csr import CSR
from hiertcn.graph.walks import Neighborhoods, importance_neighborhoods
from hiertcn.training.item_encoder import train_item_encoder
from hiertcn.training.item_encoder_options import ItemEncoderOptions
from hiertcn.training.item_inference import embed_items
from models.graphsage import GraphSAGE, GraphSAGEConfig
from models.item_encoder_serving import NewItemEncoder

_TOP: Final = 10
_AT: Final = 10


@dataclass
class _Features:
    values: NDArray[np.float32]
    present: NDArray[np.bool_]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", choices=LOGS, default="simulator")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the logs")
    parser.add_argument("--cache", type=Path, default=None, help="folder of what is prepared")
    parser.add_argument("--share", type=float, default=0.1, help="share of items taken out")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--questions", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.cache or Path(scratch)
        case = load_case(
            folder, arguments.data, arguments.log, "test", questions=arguments.questions
        )
        runs = [
            _run(case, Path(scratch) / str(seed), arguments.share, arguments.dim, seed)
            for seed in range(arguments.seeds)
        ]
    rows = {
        name: {
            measure: [round(float(run["rows"][name][measure]), 4) for run in runs]
            for measure in ("hit_rate", "mrr")
        }
        for name in runs[0]["rows"]
    }
    print(f"| {arguments.log} | hit rate@{_AT} | MRR |\n|---|---|---|")
    for name, row in rows.items():
        mean = {measure: float(np.mean(values)) for measure, values in row.items()}
        print(f"| {name} | {mean['hit_rate']:.4f} | {mean['mrr']:.4f} |")
    result = {
        "log": arguments.log,
        "items_taken_out": [run["items"] for run in runs],
        "questions": [run["questions"] for run in runs],
        "rows": rows,
    }
    if arguments.json:
        write_json(arguments.json, result)
    else:
        print(json.dumps(result))


def _run(case: RetrievalCase, folder: Path, share: float, dim: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    whole = case.graph(0.0)
    asked = np.unique(case.queries)
    out = np.zeros(whole.items, np.bool_)
    out[rng.choice(asked, max(1, int(share * len(asked))), replace=False)] = True
    kept = np.flatnonzero(~out)
    place = np.full(whole.items, -1, np.int64)
    place[kept] = np.arange(len(kept))

    values, present = np.array(case.features.values), np.array(case.features.present)
    there = _Features(values[kept], present[kept])
    encoder, vectors, layers = _trained(_without(whole, out, place), there, folder / "a", dim, seed)
    everything = _Features(values, present)
    _, full, _ = _trained(whole, everything, folder / "b", dim, seed)

    chosen = out[case.queries] & ~out[case.answers]
    queries, answers = case.queries[chosen], place[case.answers[chosen]]
    new = np.unique(queries)
    of_new = np.searchsorted(new, queries)
    rows, weights = _met_most(whole, new, place)
    serving = NewItemEncoder(encoder).eval()

    def embedded(with_neighbors: bool) -> NDArray[np.float32]:
        given = weights if with_neighbors else np.zeros_like(weights)
        with torch.no_grad():
            found: NDArray[np.float32] = serving(
                torch.from_numpy(
                    values[new] if values.shape[1] else np.zeros((len(new), 1))
                ).float(),
                torch.from_numpy(present[new].astype(np.int32)[:, None]),
                torch.from_numpy(layers[rows]),
                torch.from_numpy(given),
            ).numpy()
        return found

    popular = np.broadcast_to(case.popularity[kept].astype(np.float32), (len(new), len(kept)))
    scores = {
        "trained with the items": full[new] @ full[kept].T,
        "new, features and neighbors": embedded(True) @ vectors.T,
        "new, features alone": embedded(False) @ vectors.T,
        "raw features": _unit(values[new]) @ _unit(values[kept]).T,
        "popularity": popular,
        "chance": rng.random((len(new), len(kept))).astype(np.float32),
    }
    return {
        "items": len(new),
        "questions": len(queries),
        "rows": {name: _measured(table[of_new], answers) for name, table in scores.items()},
    }


def _trained(
    graph: CSR, features: _Features, folder: Path, dim: int, seed: int
) -> tuple[GraphSAGE, NDArray[np.float32], NDArray[np.float32]]:
    torch.manual_seed(seed)
    config = GraphSAGEConfig(items=graph.items, feature_dim=features.values.shape[1], dim=dim)
    encoder = GraphSAGE(config)
    given = features if features.values.shape[1] else None
    walked: Neighborhoods = importance_neighborhoods(graph, seed=seed, progress=False)
    train_item_encoder(encoder, given, walked, graph, folder, ItemEncoderOptions(seed=seed), None)
    layers = np.empty((graph.items, encoder.layers * config.hidden), np.float32)
    vectors = embed_items(encoder, given, walked, layer_inputs=layers, progress=False)
    return encoder, vectors, layers


def _without(graph: CSR, out: NDArray[np.bool_], place: NDArray[np.int64]) -> CSR:
    sources = np.repeat(np.arange(graph.items), graph.degrees)
    stays = ~out[sources] & ~out[graph.indices]
    counts = np.bincount(place[sources[stays]], minlength=int((~out).sum()))
    return CSR(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        place[graph.indices[stays]].astype(np.int32),
        np.array(graph.weights[stays]),
    )


def _met_most(
    graph: CSR, new: NDArray[np.int64], place: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows = np.zeros((len(new), _TOP), np.int64)
    weights = np.zeros((len(new), _TOP), np.float32)
    for n, item in enumerate(new.tolist()):
        part = slice(int(graph.indptr[item]), int(graph.indptr[item + 1]))
        there = place[graph.indices[part]] >= 0
        found = place[graph.indices[part]][there][:_TOP]
        rows[n, : len(found)] = found
        weights[n, : len(found)] = graph.weights[part][there][:_TOP]
    total = weights.sum(axis=1, keepdims=True)
    weights /= np.where(total > 0, total, np.float32(1))
    return rows, weights


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(length > 0, length, 1), np.float32)


def _measured(scores: NDArray[np.float32], answers: NDArray[np.int64]) -> dict[str, float]:
    """Ties count half, so that equal scores are worth no more than chance."""
    of_answer = np.take_along_axis(scores, answers[:, None], axis=1)
    ahead = (scores > of_answer).sum(axis=1) + ((scores == of_answer).sum(axis=1) - 1) / 2
    return {"hit_rate": float((ahead < _AT).mean()), "mrr": float((1 / (1 + ahead)).mean())}


if __name__ == "__main__":
    main()
