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
from hiertcn.sessions import live_counts, memory
from hiertcn.sessions.batches import SessionBatches
from hiertcn.sessions.request_features import FEATURES
from hiertcn.sessions.transitions import TransitionTable
from hiertcn.training.hiertcn import TRANSITIONS_FOLDER, train_hiertcn
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


Make = Callable[[Setting], nn.Module]
"""Makes a network that `train_hiertcn` trains on the setting's sessions and item vectors."""

Build = Callable[[Setting, Budget, Path], Made]
"""Makes a ranker; the folder is the row's own, and survives an interruption."""


def network(make: Make, **options: Any) -> Build:
    """Return how a session network is trained and ranked with.

    Args:
        make: the network.
        options: what differs from the budget's training options, such as ``loss``.
    """

    def build(setting: Setting, budget: Budget, folder: Path) -> Made:
        train = replace(budget.train, **options)
        torch.manual_seed(train.seed)
        model = make(setting)
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
        counted = folder / "model" / TRANSITIONS_FOLDER
        return Made(
            ranker=NetworkRanker(
                model,
                setting.store,
                vectors or setting.table,
                outputs=outputs,
                transitions=TransitionTable.open(counted) if counted.exists() else None,
            ),
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
        make(setting),
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
    return lambda setting: HierTCN(HierTCNConfig(item_dim=setting.table.dim, **config))


def _with_event_types(setting: Setting) -> nn.Module:
    types = setting.training.meta.event_types
    return HierTCN(HierTCNConfig(item_dim=setting.table.dim, event_types=types))


def matched(config: type[NetworkConfig]) -> Make:
    """Return how a compared network with about as many weights as HierTCN is made.

    Raises:
        InputError: no width comes within 5% of HierTCN's number of weights.
    """

    def make(setting: Setting) -> nn.Module:
        with torch.device("meta"):
            weights = sum(part.numel() for part in hiertcn()(setting).parameters())
        return build_network(matched_config(config(item_dim=setting.table.dim), weights))

    return make


def _items(setting: Setting) -> int:
    return len(setting.table)


ROWS: Final[Mapping[str, Build]] = {
    "HierTCN best": network(hiertcn(terms=FEATURES, head="linear"), item_vectors="fine-tuned"),
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
"""Tables 2, 3 and 4, in the order printed; Table 4 takes those that were trained.

The first is what the pipeline trains by default, the second the paper's network.
"""

LOSS_ROWS: Final[Mapping[str, Build]] = {
    loss: network(hiertcn(), loss=loss) for loss in ("l2", "nce", "bpr", "hinge", "softmax")
}
"""Table 5; the sampled softmax is ours."""

REGULARIZATION_ROWS: Final[Mapping[str, Build]] = {
    "none": network(hiertcn()),
    "dropout": network(hiertcn(dropout=0.2)),
    "batch norm": network(hiertcn(batch_norm=True)),
    "dropout + batch norm": network(hiertcn(dropout=0.2, batch_norm=True)),
}
"""Table 6."""

OPTION_ROWS: Final[Mapping[str, Build]] = {
    "HierTCN": network(hiertcn()),
    "Init connection": network(hiertcn(connection="init")),
    "last hidden vector": network(hiertcn(aggregate="last")),
    "weighted mean": network(hiertcn(aggregate="weighted")),
    "time gaps": network(hiertcn(time_gaps=True)),
    "event types": network(_with_event_types),
    "linear head": network(hiertcn(head="linear")),
    "input dropout": network(hiertcn(input_dropout=0.2)),
    "3 positions ahead": network(hiertcn(), positions_ahead=3),
    "in-batch negatives alone": network(hiertcn(), random_negatives=0),
    "random negatives alone": network(hiertcn(), in_batch_negatives=0),
    "impressions not as negatives": network(hiertcn(), max_impressions=0),
    "fine-tuned item vectors": network(hiertcn(), item_vectors="fine-tuned"),
    "learned item vectors": network(hiertcn(), item_vectors="learned"),
    "one-hot items": network(hiertcn(), item_vectors="one-hot"),
    "memory": network(hiertcn(terms=memory.FEATURES)),
    "freshness": network(hiertcn(terms=live_counts.FEATURES)),
    "memory + freshness": network(hiertcn(terms=FEATURES)),
}
"""What HierTCN can be told, one thing at a time."""


def reason_without(name: str, setting: Setting) -> str | None:
    """Return why a row of `OPTION_ROWS` says nothing about the setting's log, None if it does."""
    if name == "event types" and len(setting.training.meta.event_types) < 2:
        return "the log has fewer than two event types"
    if name == "impressions not as negatives" and not setting.training.has_impressions:
        return "the log does not tell what was shown"
    return None


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
