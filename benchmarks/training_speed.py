"""Training speed of session networks: interactions a second of whole steps, loader included.

    python -m benchmarks.training_speed [--models NAME ...] [--steps N] [--json PATH]

Each named network trains on the same drawn log with the trainer's own step: batch, gather, forward,
loss, backward, Adam. Networks take turns, so that the machine's noise meets all of them alike, and
the median step counts. Parameters, padding and the bytes of a batch's input stand beside, and the
arithmetic: floating point operations of a step's matrix products, forward and backward, an
interaction. Where HierTCN's share of another network's speed exceeds the inverse of its share of
the arithmetic, it makes better use of the processor.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, cast

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loader import drawn_store
from benchmarks.parameter_counts import hiertcn_parameters, paper_configs
from hiertcn.files import write_json
from hiertcn.items.table import ItemTable
from hiertcn.sessions.batches import SessionBatch, SessionBatches
from hiertcn.training.item_vectors import FrozenVectors
from hiertcn.training.lanes import to_tensors
from hiertcn.training.objective import Objective
from hiertcn.training.optimizers import Optimizers
from hiertcn.training.options import TrainOptions
from hiertcn.training.session_model import SessionModel
from hiertcn.training.whole_history import HistoryModel
from models.hiertcn import HierTCN, HierTCNConfig
from models.sequence.networks import build_network, matched_config
from models.session_layouts import make_layout

DIM: Final = 128
_NO_END_US: Final = 1 << 62


def _matched(name: str) -> Callable[[], nn.Module]:
    """Return how a compared network with HierTCN's number of weights is made."""
    config = matched_config(paper_configs(DIM)[name], hiertcn_parameters(DIM))
    return lambda: build_network(config)


MODELS: Final[dict[str, Callable[[], nn.Module]]] = {
    "HierTCN packed": lambda: HierTCN(HierTCNConfig.paper(DIM), "packed"),
    "HierTCN padded": lambda: HierTCN(HierTCNConfig.paper(DIM), "padded"),
    **{name: _matched(name) for name in paper_configs(DIM)},
}
"""Networks by name; each is a :class:`hiertcn.training.session_model.SessionModel`."""


@dataclass
class _Runner:
    """One network's training, a step at a time."""

    model: nn.Module
    batches: SessionBatches
    vectors: FrozenVectors
    objective: Objective
    optimizers: Optimizers

    def __post_init__(self) -> None:
        self.network = cast(SessionModel, self.model)
        self.seconds: list[float] = []
        self.waited: list[float] = []
        self.interactions: list[int] = []
        self._rng = np.random.default_rng(0)
        self._lanes = self.network.initial_state(self.batches.own_lanes).detach().clone()
        self._source = self._epochs()

    def flops(self) -> float:
        """Train a step and return the floating point operations it did for an interaction."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return float(counter.get_total_flops()) / self.interactions[-1]

    def step(self) -> None:
        """Train on the next batch and keep its times."""
        started = time.perf_counter()
        batch = next(self._source)
        tensors = to_tensors(batch, self.vectors, self.vectors.device)
        ready = time.perf_counter()
        u, lanes = self.network(tensors, self._lanes)
        loss = self.objective(u, tensors, self._rng)
        self.optimizers.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers.step(1e-3, 1.0)
        self._lanes = lanes.detach()
        if self.vectors.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        self.waited.append(ready - started)
        self.interactions.append(len(batch.targets))

    def _epochs(self) -> Iterator[SessionBatch]:
        epoch = 0
        while True:
            yield from self.batches.epoch(epoch)
            self._lanes = self.network.initial_state(self.batches.own_lanes).detach().clone()
            epoch += 1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=40, help="measured steps (default 40)")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--lanes", type=int, default=53, help="about 512 interactions a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        figures = measure(
            Path(folder),
            arguments.models,
            steps=arguments.steps,
            users=arguments.users,
            items=arguments.items,
            lanes=arguments.lanes,
            device=torch.device(arguments.device),
        )
    for name, row in figures.items():
        print(
            f"{name:<20}{row['interactions_per_s']:10,.0f} interactions/s   "
            f"{row['flops'] / 1e6:7.2f} Mflop each   {row['gflop_per_s']:6.1f} Gflop/s   "
            f"{row['ms_a_step']:7.1f} ms a step   waiting {row['waiting_share']:6.2%}   "
            f"{row['parameters']:10,.0f} parameters   padding {row['padding_share']:6.1%}   "
            f"{row['batch_bytes'] / 1024:8,.0f} KiB a batch"
        )
    if arguments.json:
        write_json(arguments.json, figures)


def measure(
    folder: Path,
    names: list[str],
    *,
    steps: int,
    users: int,
    items: int,
    lanes: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Train the named networks in turns and return their figures by name."""
    store = drawn_store(users, items)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((items, DIM), np.float32) / np.float32(DIM**0.5)
    vectors = FrozenVectors(ItemTable.write(folder / "table", rows), device)
    counts = np.bincount(store.item_rows, minlength=items)
    options = TrainOptions(device=device.type)
    runners = {}
    for name in names:
        torch.manual_seed(0)
        model = MODELS[name]().to(device).train()
        histories = model.learn_from(store, _NO_END_US) if isinstance(model, HistoryModel) else None
        batches = SessionBatches(
            histories or store,
            # A whole history is one long session: a quarter of the lanes makes steps as large.
            lanes=lanes // 4 if histories else lanes,
            sessions_per_step=options.sessions_per_step,
            context=cast(SessionModel, model).receptive_field,
        )
        runners[name] = _Runner(
            model,
            batches,
            vectors,
            Objective(store, vectors, counts, options, device),
            Optimizers(model, vectors, weight_decay=0.0, vector_rate=1.0),
        )
    flops = {name: runner.flops() for name, runner in runners.items()}
    for turn in range(steps + 5):
        for runner in runners.values():
            runner.step()
            if turn < 5:
                # The first steps compile kernels and touch the table's pages.
                for kept in (runner.seconds, runner.waited, runner.interactions):
                    kept.clear()
    return {name: _figures(runner, flops[name]) for name, runner in runners.items()}


def _figures(runner: _Runner, flops: float) -> dict[str, float]:
    batch = next(runner.batches.epoch(0))
    layout = getattr(runner.model, "layout", "packed")
    lengths = torch.from_numpy(batch.lengths).to(runner.vectors.device)
    cost = make_layout(layout, lengths).cost(DIM)
    speed = statistics.median(
        count / seconds for count, seconds in zip(runner.interactions, runner.seconds, strict=True)
    )
    return {
        "interactions_per_s": speed,
        "flops": flops,
        "gflop_per_s": speed * flops / 1e9,
        "ms_a_step": 1e3 * statistics.median(runner.seconds),
        "waiting_share": statistics.median(runner.waited) / statistics.median(runner.seconds),
        "parameters": sum(weights.numel() for weights in runner.model.parameters()),
        "padding_share": cost.padding_share,
        "batch_bytes": cost.bytes,
    }


if __name__ == "__main__":
    main()
