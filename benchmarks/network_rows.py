"""The compared networks' rows under the evaluation protocol, each within a stated budget.

    python -m benchmarks.network_rows --data DATA --output RESULTS [--case NAME] [--network NAME]
        [--phase validation] [--seeds 3] [--max-seconds 1200] [--set config.dropout=0.3]

In the phase ``validation`` a network learns the fit part and the curve over a sample of the asked
sessions is logged, so that a setting can be chosen; in the phase ``test`` it learns training and
validation together for the number of epochs of its setting, nothing is looked at, and every test
request is ranked once. ``RESULTS/<case>/`` gets per network, seed and phase a JSON with metrics and
times, and the ranks under both masks, int64 ``[requests]`` in the case's order. What is there
already is printed, not repeated, and a training that was stopped continues.
"""

import argparse
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.protocol_data import CASES, ProtocolCase, load_case
from benchmarks.protocol_ranks import GROUPS, Mask, intervals, metrics, rank
from benchmarks.protocol_vectors import ITEM_VECTORS, STARTS, Start, first_vectors
from hiertcn.evaluation.protocol import Requests
from hiertcn.files import read_json, write_json
from hiertcn.items.table import ItemTable
from hiertcn.sessions.batches import SessionBatches
from hiertcn.sessions.split import Split
from hiertcn.sessions.store import (
    ITEM_ROWS,
    SESSION_OFFSETS,
    TIMESTAMPS_US,
    USER_OFFSETS,
    SessionStore,
)
from hiertcn.training.hiertcn import train_hiertcn
from hiertcn.training.item_vectors import ITEM_TABLE_FOLDER, TrainedVectors
from hiertcn.training.options import TrainOptions
from hiertcn.training.progress import TrainSummary
from hiertcn.training.session_model import SessionModel
from hiertcn.training.user_embeddings import embed_before
from hiertcn.training.whole_history import HistoryModel
from models.sequence.config import NetworkConfig
from models.sequence.gru import GRUConfig
from models.sequence.hierarchical import HierGRUConfig, HRNNConfig
from models.sequence.networks import build_network
from models.sequence.sasrec import SASRecConfig
from models.sequence.tcn import FlatTCNConfig

MASKS: Final[tuple[Mask, ...]] = ("session", "last-item")
_PROBE_STEPS: Final = 12
_REQUESTS_PER_PASS: Final = 1024
_VALIDATION_REQUESTS: Final = 4000
_LATER_US: Final = 1 << 60
"""Puts the asked sessions after everything that is learnt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How a network is built and trained; ``options.lanes`` 0 is chosen for the size of a step."""

    config: NetworkConfig
    options: TrainOptions
    start: Start = "graph"
    interactions_per_step: int = 380

    def changed(self, changes: Mapping[str, Any]) -> "Setting":
        """Return it with other values, by ``config.<field>`` and ``options.<field>``."""
        parts: dict[str, dict[str, Any]] = {"config": {}, "options": {}}
        for name, value in changes.items():
            part, _, field = name.partition(".")
            parts[part][field] = value
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, **parts["config"]),
            options=dataclasses.replace(self.options, **parts["options"]),
        )


_TRAIN: Final = TrainOptions(
    # At least every catalogue here, so the softmax is over all of it.
    random_negatives=20_000,
    sessions_per_step=4,
    learning_rate=3e-3,
    schedule="cosine",
    warmup_steps=100,
    max_epochs=6,
    validation_requests=_VALIDATION_REQUESTS,
    # The curve is for choosing the number of epochs; nothing stops early.
    patience=1000,
    device="cpu",
)
_HISTORY: Final = dataclasses.replace(_TRAIN, sessions_per_step=1, max_length=200)

_RECURRENT: Final[Mapping[str, Any]] = {
    "item_dim": 96,
    "hidden": 96,
    "layers": 1,
    "dropout": 0.2,
    "input_dropout": 0.2,
    "head": "linear",
}

SETTINGS: Final[dict[str, Setting]] = {
    "SASRec": Setting(
        config=SASRecConfig(item_dim=64, dropout=0.2, piece=200, context=200),
        options=dataclasses.replace(_HISTORY, learning_rate=2e-3),
        interactions_per_step=200,
    ),
    "HRNN-Init": Setting(config=HRNNConfig(**_RECURRENT), options=_TRAIN),
    "HRNN-All": Setting(config=HRNNConfig(**_RECURRENT, feeds_every_position=True), options=_TRAIN),
    "GRU": Setting(
        config=GRUConfig(**_RECURRENT), options=dataclasses.replace(_HISTORY, max_length=25)
    ),
    "HierGRU": Setting(config=HierGRUConfig(**_RECURRENT), options=_TRAIN),
    "TCN": Setting(
        config=FlatTCNConfig(
            item_dim=96, filters=96, kernel=3, dropout=0.2, input_dropout=0.2, head="linear"
        ),
        options=_HISTORY,
    ),
}


def main() -> None:
    """Train, rank, print and store every asked row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real logs")
    parser.add_argument("--output", type=Path, default=Path("network_rows"))
    parser.add_argument("--case", action="append", choices=CASES, help="default: every case")
    parser.add_argument("--network", action="append", choices=SETTINGS, help="default: every one")
    parser.add_argument("--phase", choices=("validation", "test"), default="test")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this, exclusive")
    parser.add_argument(
        "--max-seconds", type=float, default=0.0, help="of training a network; 0 for no limit"
    )
    parser.add_argument("--start", choices=STARTS, default="graph", help="of the item vectors")
    parser.add_argument(
        "--set", action="append", default=[], help="config.FIELD=JSON or options.FIELD=JSON"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Two threads for such small networks wait for each other: a twentieth of the speed beside
    # another process.
    torch.set_num_threads(1)
    changes = {
        name: json.loads(value)
        for name, _, value in (text.partition("=") for text in arguments.set)
    }
    for name in arguments.case or CASES:
        case = load_case(arguments.data, name, arguments.phase)
        rows = {}
        for network in arguments.network or SETTINGS:
            setting = dataclasses.replace(SETTINGS[network], start=arguments.start)
            setting = setting.changed(changes)
            rows[network] = [
                _row(case, network, setting, seed, arguments.output / name, arguments.max_seconds)
                for seed in range(arguments.seeds)
            ]
        _print(case, rows)


def _row(
    case: ProtocolCase,
    name: str,
    setting: Setting,
    seed: int,
    output: Path,
    max_seconds: float,
) -> dict[str, Any]:
    stem = f"{name}-{setting.start}-{case.phase}-{seed}"
    path = output / f"{stem}.json"
    if path.exists():
        stored: dict[str, Any] = read_json(path)
        return stored
    # Kept until the row is: a training that was stopped goes on from its checkpoint.
    folder = output / f"{stem}-training"
    network, vectors, facts = train(case, setting, seed, folder, max_seconds)
    began = time.monotonic()
    ranker = EmbeddedRequests(name, network, vectors, case)
    embedded = time.monotonic()
    ranks = {mask: rank(ranker, case, mask) for mask in MASKS}
    row = {
        "setting": {
            "config": setting.config.to_dict(),
            "options": setting.options.to_dict(),
            "start": setting.start,
        },
        "training": facts,
        "embed_seconds": embedded - began,
        "rank_seconds": time.monotonic() - embedded,
        "masks": {
            mask: {
                "metrics": metrics(of_mask, case),
                "mrr_intervals": {
                    group: bounds[mask]
                    for group, bounds in intervals({mask: of_mask}, case).items()
                },
            }
            for mask, of_mask in ranks.items()
        },
    }
    for mask, of_mask in ranks.items():
        np.save(output / f"{stem}-{mask}.npy", of_mask)
    write_json(path, row)
    shutil.rmtree(folder)
    _print(case, {name: [row]})
    return row


def train(
    case: ProtocolCase, setting: Setting, seed: int, folder: Path, max_seconds: float = 0.0
) -> tuple[nn.Module, TrainedVectors, dict[str, Any]]:
    """Train a network on the case's fit part.

    Args:
        case: in the phase ``validation`` its asked sessions give the curve.
        setting: of the network.
        seed: of weights, batches and dropout.
        folder: for the model's files.
        max_seconds: of training; fewer epochs are planned where they would take longer.

    Returns:
        The network and the vectors of the catalogue, and what training told.
    """
    is_test = case.phase == "test"
    store, limit = (case.fit, case.fit.meta.watermark_us + 1) if is_test else asked_later(case)
    split = Split(validation_start_us=limit, test_start_us=1 << 62)
    options = dataclasses.replace(
        setting.options,
        seed=seed,
        item_vectors=ITEM_VECTORS[setting.start],
        validation_requests=0 if is_test else setting.options.validation_requests,
    )
    if not options.lanes:
        options = dataclasses.replace(options, lanes=_lanes(setting, store, limit))
    first = first_vectors(case, setting.config.item_dim, setting.start, seed)
    table = ItemTable.write(folder / "start", first, "float32")

    def run(name: str, options: TrainOptions) -> tuple[nn.Module, TrainSummary]:
        torch.manual_seed(seed)
        network = build_network(setting.config)
        return network, train_hiertcn(network, store, table, split, folder / name, options)

    plan = folder / "plan.json"
    if not plan.exists():
        if max_seconds:
            options = _within(max_seconds, options, store, limit, run)
        write_json(plan, {"epochs": options.max_epochs})
    # A resumed training keeps its plan: the learning rate's schedule ends with it.
    options = dataclasses.replace(options, max_epochs=read_json(plan)["epochs"])
    began = time.process_time()
    network, summary = run("model", options)
    cpu_seconds = time.process_time() - began
    facts = {**summary.to_dict(), "cpu_seconds": cpu_seconds, "lanes": options.lanes}
    written = ItemTable.open(folder / "model" / ITEM_TABLE_FOLDER)
    vectors = TrainedVectors(torch.from_numpy(written.gather(np.arange(case.items))))
    curve = read_json(folder / "model" / "curve.json")
    return network.eval(), vectors, {**facts, **curve}


def _lanes(setting: Setting, store: SessionStore, end_us: int) -> int:
    """Return the lanes that give a step the setting's number of interactions."""
    network = build_network(setting.config)
    if isinstance(network, HistoryModel):
        store = network.learn_from(store, end_us)
    batches = SessionBatches(
        store,
        lanes=1,
        sessions_per_step=1,
        max_length=setting.options.max_length,
        end_us=end_us,
    )
    per_lane = setting.options.sessions_per_step * batches.interactions / batches.steps(0)
    return max(1, round(setting.interactions_per_step / per_lane))


def _within(
    max_seconds: float, options: TrainOptions, store: SessionStore, limit: int, run: Any
) -> TrainOptions:
    """Return the options with so few epochs that they end in time, at least one."""
    probe = dataclasses.replace(options, max_steps=_PROBE_STEPS, validation_requests=0)
    interactions = SessionBatches(store, lanes=1, sessions_per_step=1, end_us=limit).interactions
    _, summary = run("probe", probe)
    seconds = interactions / summary.interactions_per_s
    epochs = max(1, min(options.max_epochs, int(max_seconds / seconds)))
    return dataclasses.replace(options, max_epochs=epochs)


def asked_later(case: ProtocolCase) -> tuple[SessionStore, int]:
    """Return the case's histories with every asked interaction after all others, and from when.

    A session of which only the end is asked becomes two.
    """
    store = case.store
    asked = np.zeros(store.meta.interactions, np.int64)
    asked[case.requests.interaction] = 1
    cuts = np.flatnonzero(np.diff(asked) > 0) + 1
    offsets = np.union1d(store.session_offsets, cuts)
    first_of_user = np.asarray(store.session_offsets)[store.user_offsets]
    columns: dict[str, NDArray[Any]] = {
        ITEM_ROWS: store.item_rows,
        TIMESTAMPS_US: store.timestamps_us + asked * _LATER_US,
        SESSION_OFFSETS: offsets,
        USER_OFFSETS: np.searchsorted(offsets, first_of_user),
    }
    meta = dataclasses.replace(
        store.meta,
        sessions=len(offsets) - 1,
        watermark_us=int(columns[TIMESTAMPS_US].max()),
    )
    return SessionStore(store.directory, meta, columns), _LATER_US


class EmbeddedRequests:
    """A ranker that embeds all of a case's requests once, and serves every mask."""

    def __init__(
        self, name: str, network: nn.Module, vectors: TrainedVectors, case: ProtocolCase
    ) -> None:
        self.name, self._vectors = name, vectors
        self._order = np.argsort(case.requests.interaction, kind="stable")
        self._asked = case.requests.interaction[self._order]
        model = cast(SessionModel, network)
        with torch.inference_mode():
            self._u = torch.cat(
                [
                    embed_before(model, case.store, vectors, part.session, part.interaction)
                    for part in case.requests.take(self._order).slices(_REQUESTS_PER_PASS)
                ]
            )

    @property
    def items(self) -> int:
        """Number of items in the catalogue."""
        return len(self._vectors)

    @torch.inference_mode()
    def score(
        self, requests: Requests, candidates: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        """Score all items, float32 ``[batch, items]``; the protocol has no candidates."""
        place = np.searchsorted(self._asked, requests.interaction)
        u = self._u.index_select(0, torch.from_numpy(place))
        return np.asarray((u @ self._vectors.all().T).numpy(), np.float32)


def _print(case: ProtocolCase, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    print(f"\n**{case.name}**, {case.phase} ({len(case.requests):,} events, {case.items:,} items)")
    print(
        "| network | seeds | ALL R@20 | ALL MRR | FIRST R@20 | FIRST MRR | LATER R@20 | LATER MRR "
        "| interactions/s | training s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, of_seeds in rows.items():
        for mask in MASKS:
            cells = [name + (", xs" if mask == "session" else ""), str(len(of_seeds))]
            for group in GROUPS:
                found = [row["masks"][mask]["metrics"][group] for row in of_seeds]
                low, high = np.mean(
                    [row["masks"][mask]["mrr_intervals"][group] for row in of_seeds], axis=0
                )
                recall = np.mean([one["recall@20"] for one in found])
                mrr = np.mean([one["mrr"] for one in found])
                cells += [f"{recall:.3f}", f"{mrr:.4f} [{low:.4f}, {high:.4f}]"]
            training = [row["training"] for row in of_seeds]
            cells.append(f"{np.mean([one['interactions_per_s'] for one in training]):,.0f}")
            cells.append(f"{np.mean([one['seconds'] for one in training]):,.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
