"""The rows of the tables: a name and how its ranker is made from a setting.

To add a row, add a line to `ROWS`. What has been measured is kept as JSON with its ranks, so a run
that was stopped, or asked for more rows, continues where it was.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.tables_data import Setting, fingerprint
from hiertcn.evaluation.protocol import Ranker
from hiertcn.evaluation.ranking import Mask, Ranking, RankingRules
from hiertcn.files import read_json, write_json
from hiertcn.items.table import ItemTable
from hiertcn.sessions.batches import SessionBatches
from hiertcn.training.hiertcn import train_hiertcn
from hiertcn.training.item_vectors import ITEM_TABLE_FOLDER, OUTPUT_TABLE_FOLDER
from hiertcn.training.options import TrainOptions
from models.baselines import MV, MaxItem
from models.counting import (
    VSKNN,
    VSTAN,
    CountingRanker,
    ItemKNN,
    Markov,
    PersonalPopularity,
    Popularity,
    Reminder,
)
from models.hiertcn import HierTCN, HierTCNConfig
from models.network_ranker import NetworkRanker
from models.sequence.config import NetworkConfig
from models.sequence.gru import GRUConfig
from models.sequence.hierarchical import HierGRUConfig, HRNNConfig
from models.sequence.networks import build_network, matched_config
from models.sequence.sasrec import SASRecConfig
from models.sequence.tcn import FlatTCNConfig

_PROBE_STEPS: Final = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a network row may cost.

    Attributes:
        max_train_seconds: most seconds of training steps; 0 sets no limit.
        train: everything else; its ``max_steps`` is the other limit.
    """

    train: TrainOptions
    max_train_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Made:
    """A ranker and what making it told: parameters, steps, seconds an epoch."""

    ranker: Ranker
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """A measured row.

    Attributes:
        ranks: int64 [n], of the setting's requests.
        pool_size: int64 [n].
        facts: see `Made`, with ``score_seconds``.
    """

    ranks: NDArray[np.int64]
    pool_size: NDArray[np.int64]
    facts: Mapping[str, Any]


Make = Callable[[int], nn.Module]
"""Makes a network that `train_hiertcn` trains, from the width of its item vectors."""

Build = Callable[[Setting, Budget, Path], Made]
"""Makes a ranker; the folder is the row's own, and survives an interruption."""


def network(make: Make, **options: Any) -> Build:
    """Return how a session network is trained and ranked with.

    Args:
        make: the network, from the width of the item vectors, the prior included.
        options: what differs from the budget's training options, such as ``loss``.
    """

    def build(setting: Setting, budget: Budget, folder: Path) -> Made:
        train = replace(budget.train, **options)
        torch.manual_seed(train.seed)
        model = make(setting.table.dim)
        batches = SessionBatches(
            setting.training,
            lanes=train.lanes,
            sessions_per_step=train.sessions_per_step,
            max_length=train.max_length,
            end_us=setting.split.validation_start_us,
            seed=train.seed,
        )
        if budget.max_train_seconds:
            steps = _affordable_steps(setting, make, train, budget, batches, folder / "probe")
            train = replace(train, max_steps=min(train.max_steps or steps, steps))
        # A run that is cut short may not see the end of an epoch.
        train = replace(train, validate_steps=train.max_steps // 4)
        summary = train_hiertcn(
            model, setting.training, setting.table, setting.split, folder / "model", train
        )
        vectors, outputs = (
            ItemTable.open(folder / "model" / name) if (folder / "model" / name).exists() else None
            for name in (ITEM_TABLE_FOLDER, OUTPUT_TABLE_FOLDER)
        )
        return Made(
            ranker=NetworkRanker(model, setting.store, vectors or setting.table, outputs=outputs),
            facts={
                "parameters": summary.parameters,
                "steps": summary.steps,
                "stopped": summary.stopped,
                "validation_mrr": summary.validation_mrr,
                "interactions_per_s": summary.interactions_per_s,
                "epoch_seconds": batches.interactions / summary.interactions_per_s,
            },
        )

    return build


def _affordable_steps(
    setting: Setting,
    make: Make,
    train: TrainOptions,
    budget: Budget,
    batches: SessionBatches,
    folder: Path,
) -> int:
    """Return the steps that fit into the budget, from the speed of a few."""
    probe = train_hiertcn(
        make(setting.table.dim),
        setting.training,
        setting.table,
        setting.split,
        folder,
        replace(train, max_steps=_PROBE_STEPS, validate_steps=0, validation_requests=1),
    )
    per_step = batches.interactions / batches.steps(0)
    steps = int(budget.max_train_seconds * probe.interactions_per_s / per_step)
    return max(1, steps)


def counting(make: Callable[[Setting], CountingRanker]) -> Build:
    """Return how a counting ranker is fitted to the setting's training sessions."""

    def build(setting: Setting, budget: Budget, folder: Path) -> Made:
        started = time.perf_counter()
        ranker = make(setting).fit(setting.training)
        return Made(ranker=ranker, facts={"fit_seconds": time.perf_counter() - started})

    return build


def rule(make: Callable[[Setting], Ranker]) -> Build:
    """Return how a ranker without anything to learn is made."""

    def build(setting: Setting, budget: Budget, folder: Path) -> Made:
        return Made(ranker=make(setting))

    return build


def hiertcn(**config: Any) -> Make:
    """Return how a HierTCN of the paper's size, but for ``config``, is made."""
    return lambda item_dim: HierTCN(HierTCNConfig(item_dim=item_dim, **config))


def matched(config: type[NetworkConfig]) -> Make:
    """Return how a compared network with about as many weights as HierTCN is made.

    Raises:
        InputError: no width comes within 5% of HierTCN's number of weights.
    """

    def make(item_dim: int) -> nn.Module:
        with torch.device("meta"):
            weights = sum(part.numel() for part in hiertcn()(item_dim).parameters())
        return build_network(matched_config(config(item_dim=item_dim), weights))

    return make


def _items(setting: Setting) -> int:
    return len(setting.table)


ROWS: Final[Mapping[str, Build]] = {
    "HierTCN": network(hiertcn()),
    "HierGRU": network(matched(HierGRUConfig)),
    "HRNN": network(matched(HRNNConfig)),
    "TCN": network(matched(FlatTCNConfig)),
    "GRU": network(matched(GRUConfig)),
    "SASRec": network(matched(SASRecConfig)),
    "MV": rule(lambda s: MV(s.store, s.table)),
    "MaxItem": rule(lambda s: MaxItem(s.store, s.table)),
    "popularity": counting(lambda s: Popularity(s.store, _items(s))),
    "personal popularity": counting(lambda s: PersonalPopularity(s.store, _items(s))),
    "Markov + reminder": counting(
        lambda s: Markov(s.store, _items(s), steps=3, step_decay=0.5, reminder=Reminder())
    ),
    "item-kNN + reminder": counting(lambda s: ItemKNN(s.store, _items(s), reminder=Reminder())),
    "V-SKNN": counting(lambda s: VSKNN(s.store, _items(s))),
    "VSTAN": counting(lambda s: VSTAN(s.store, _items(s))),
}
"""Tables 2, 3 and 4, in the order printed; Table 4 takes those that were trained."""

LOSS_ROWS: Final[Mapping[str, Build]] = {
    loss: network(hiertcn(), loss=loss) for loss in ("l2", "nce", "bpr", "hinge", "softmax")
}
"""Table 5; the sampled softmax is ours."""

_REGULARIZED: Final[Mapping[str, Mapping[str, Any]]] = {
    "none": {},
    "dropout": {"dropout": 0.2},
    "batch norm": {"batch_norm": True},
    "dropout + batch norm": {"dropout": 0.2, "batch_norm": True},
}

REGULARIZATION_ROWS: Final[Mapping[str, Build]] = {
    name: network(hiertcn(**config))
    for name, config in _REGULARIZED.items()
    if set(config) <= set(HierTCNConfig.__dataclass_fields__)
}
"""Table 6, as far as HierTCN's configuration reaches."""


def measure(
    name: str, build: Build, setting: Setting, budget: Budget, output: Path, mask: Mask = "none"
) -> RowResult:
    """Return a row's ranks, from the folder ``output`` if they were measured there before.

    Targets are ranked among what was shown where that is known, else among all items; a tie never
    helps. ``mask`` says which items are ranked last, see `RankingRules`.
    """
    identity = fingerprint(
        name, setting.name, len(setting.requests), asdict(budget), setting.table.checksum, mask
    )
    slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    folder = output / f"{setting.name.replace(' ', '-').replace('%', '')}-{slug}-{identity}"
    if not (folder / "row.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _log.info("measuring %s (%s)", name, setting.name)
        made = build(setting, budget, folder)
        rules = RankingRules(mask=mask)
        ranking = Ranking([made.ranker], setting.store, setting.requests, _items(setting), rules)
        ranking.rank_all()
        np.save(folder / "ranks.npy", ranking.ranks[0])
        np.save(folder / "pool_size.npy", ranking.pool_size)
        write_json(
            folder / "row.json", {**made.facts, "score_seconds": round(ranking.seconds[0], 3)}
        )
    return RowResult(
        ranks=np.load(folder / "ranks.npy"),
        pool_size=np.load(folder / "pool_size.npy"),
        facts=read_json(folder / "row.json"),
    )
