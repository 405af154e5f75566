"""What item vectors are worth to HierTCN: its MRR on ours, on raw features and on random vectors.

HierTCN as in its paper: the dot product alone, without scoring terms, over frozen vectors. Vectors
and training see the known days only; the requests are the interactions of the held-out days, ranked
among what was shown where the log knows it, else among all items. Every table has the popularity
prior as its last coordinate (``hiertcn.items.prior``), so what differs is the vectors. Equal seeds,
steps and batches; differences are paired over requests, their 95% intervals over users.
"""

import argparse
import datetime
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.item_embeddings_data import RetrievalCase
from benchmarks.item_embeddings_methods import (
    DIM,
    encoder_vectors,
    feature_vectors,
    random_vectors,
)
from hiertcn.evaluation.bootstrap import paired_difference, resampled_means
from hiertcn.evaluation.protocol import build_requests
from hiertcn.evaluation.ranking import Ranking, RankingRules
from hiertcn.files import write_json
from hiertcn.items.prior import popularity_prior
from hiertcn.items.table import ItemTable
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.split import Split, split_by_time
from hiertcn.sessions.store import SessionStore
from hiertcn.training.hiertcn import train_hiertcn
from hiertcn.training.item_encoder_options import ItemEncoderOptions
from hiertcn.training.options import TrainOptions
from models.hiertcn import HierTCN, HierTCNConfig
from models.network_ranker import NetworkRanker

OURS: Final = "ours"
_VECTORS: Final[Mapping[str, Callable[[RetrievalCase, Path], NDArray[np.float32]]]] = {
    "random vectors": lambda case, folder: random_vectors(len(case.index)),
    "raw features": lambda case, folder: feature_vectors(case),
    OURS: lambda case, folder: encoder_vectors(case, folder / "encoder", {}, {}),
}
_SECOND_US: Final = 1_000_000
_VALIDATION_SHARE: Final = 0.1


def hiertcn_table(
    case: RetrievalCase, output: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train, rank and print the table of one log.

    Args:
        case: the test cut.
        output: where what was measured is kept.
        arguments: ``steps``, ``requests`` and ``seeds``.
    """
    store = _whole_log(case)
    day = datetime.date.fromisoformat(case.first_date)
    midnight = datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC)
    requests = build_requests(
        store, int(midnight.timestamp()) * _SECOND_US, max_requests=arguments.requests, seed=0
    )
    names = [name for name in _VECTORS if name != "raw features" or case.features.names]
    ranks: dict[str, list[NDArray[np.int64]]] = {name: [] for name in names}
    for seed in arguments.seeds:
        for name in names:
            identity = [name, DIM, case.name, case.first_date, arguments.steps, len(requests), seed]
            if name == OURS:
                identity.append(asdict(ItemEncoderOptions()))
            key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
            folder = output / f"{case.name}-{name.replace(' ', '-')}-{seed}-{key}"
            if not (folder / "ranks.npy").exists():
                network = _trained(case, name, folder, arguments.steps, seed)
                rules = RankingRules(mask="none" if store.has_impressions else "last-item")
                ranker = NetworkRanker(network, store, ItemTable.open(folder / "table"))
                ranking = Ranking([ranker], store, requests, len(case.index), rules)
                ranking.rank_all()
                np.save(folder / "pool_size.npy", ranking.pool_size)
                np.save(folder / "ranks.npy", ranking.ranks[0])
            ranks[name].append(np.load(folder / "ranks.npy"))
            pool_size = np.load(folder / "pool_size.npy")
    users = np.tile(requests.user, len(arguments.seeds))
    pools = np.tile(pool_size, len(arguments.seeds))
    joined = {name: np.concatenate(of_seeds) for name, of_seeds in ranks.items()}
    pool = "what was shown" if store.has_impressions else "all items"
    print(
        f"\n### {case.name}: HierTCN, {len(requests):,} requests from {case.first_date} on, ranked "
        f"among {pool}, {arguments.steps} steps, seeds {arguments.seeds}\n\n"
        "| item vectors | MRR | Recall@10 | ours minus it: MRR |\n|---|---|---|---|"
    )
    found: dict[str, Any] = {"requests": len(requests), "steps": arguments.steps, "rows": {}}
    for name, of_name in joined.items():
        values = np.column_stack([1.0 / of_name, of_name <= 10])
        low, high = np.quantile(resampled_means(values, users), (0.025, 0.975), axis=0)
        row: dict[str, Any] = {
            metric: [float(values[:, at].mean()), float(low[at]), float(high[at])]
            for at, metric in enumerate(("MRR", "Recall@10"))
        }
        against = ""
        if name != OURS:
            difference = paired_difference(joined[OURS], of_name, pools, users)
            row["ours minus it"] = difference.to_list()
            against = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        found["rows"][name] = row
        cells = [f"{m:.4f} [{a:.4f}, {b:.4f}]" for m, a, b in (row["MRR"], row["Recall@10"])]
        print(f"| {name} | {' | '.join(cells)} | {against} |", flush=True)
    return found


def _whole_log(case: RetrievalCase) -> SessionStore:
    """Return the sessions of all days: the histories at request time."""
    log = case.folder.parent
    if not (log / "sessions").exists():
        build_sessions(log / "snapshot" / "events", case.index, log / "sessions")
    return SessionStore.open(log / "sessions")


def _trained(case: RetrievalCase, name: str, folder: Path, steps: int, seed: int) -> HierTCN:
    folder.mkdir(parents=True, exist_ok=True)
    vectors = _VECTORS[name](case, folder)
    table = ItemTable.write(
        folder / "table",
        np.column_stack([vectors, popularity_prior(case.popularity)]),
        "float32",
    )
    stop = split_by_time(case.sessions, _VALIDATION_SHARE, _VALIDATION_SHARE)
    split = Split(
        validation_start_us=stop.test_start_us,
        test_start_us=case.sessions.meta.watermark_us + 1,
    )
    torch.manual_seed(seed)
    network = HierTCN(HierTCNConfig(item_dim=table.dim))
    options = TrainOptions(
        max_steps=steps, validate_steps=max(1, steps // 4), validation_requests=2000, seed=seed
    )
    summary = train_hiertcn(network, case.sessions, table, split, folder / "model", options)
    write_json(
        folder / "training.json",
        {"steps": summary.steps, "validation_mrr": summary.validation_mrr},
    )
    return network
