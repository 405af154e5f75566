"""Trains HierTCN from the session store, and can be killed and resumed at any moment.

One step takes a batch of the queue-based generator, folds its sessions into the lanes' states, and
minimises the loss at every interaction (HierTCN sections 3.5.2 and 3.6.2). States are carried from
step to step without gradient: back-propagation through time is truncated at the step. After each
epoch the MRR on a sample of validation sessions decides about the learning rate and about stopping;
the weights of the best validation are what is kept.

Everything random in a step (negatives, dropout) is seeded by the seed and the step's number, so a
checkpoint needs no generator state, and a resumed run ends in the same bits as an uninterrupted one
on a CPU with the same number of threads. Memory follows the batch, not the log, but for 8 bytes an
item and the batch plan. One process, one device.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.files import write_json
from hiertcn.items.table import ItemTable
from hiertcn.sessions.batches import SessionBatch, SessionBatches
from hiertcn.sessions.split import Split
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import count_transitions
from hiertcn.training.checkpoints import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from hiertcn.training.item_vectors import load_vectors, save_vectors, start_vectors, table_dtype
from hiertcn.training.lanes import to_tensors
from hiertcn.training.objective import Objective
from hiertcn.training.optimizers import DENSE_ITEMS, Optimizers
from hiertcn.training.options import TrainOptions
from hiertcn.training.preconditions import check_table, choose_device, model_config
from hiertcn.training.progress import Progress, TrainSummary
from hiertcn.training.session_model import SessionModel
from hiertcn.training.term_scores import term_scores, terms_of
from hiertcn.training.validation import Validation
from hiertcn.training.whole_history import HistoryModel

CURVE_FILE: Final = "curve.json"
TRANSITIONS_FOLDER: Final = "transitions"

# At this size of step the products fill a CPU's caches and an epoch still has many updates.
_INTERACTIONS_PER_STEP = 512
_FEWEST_LANES, _MOST_LANES = 8, 256

_log = logging.getLogger(__name__)


def train_hiertcn(
    model: nn.Module,
    store: SessionStore,
    table: ItemTable,
    split: Split,
    output: Path,
    options: TrainOptions,
    warm_start: Path | None = None,
) -> TrainSummary:
    """Train ``model`` in place and write it to the folder ``output``.

    Writes ``config.json``, ``model.safetensors`` and ``curve.json`` (``steps``, ``train_loss``,
    ``validation_mrr``, one entry a validation), and where the item vectors were trained the folder
    ``item_table`` (with one-hot items also ``output_table``), in the dtype of ``table``; for a
    model with scoring terms also the folder ``transitions``, counted up to the start of the test
    range. While training, ``output`` holds only a checkpoint, from which the same call resumes
    after a kill; it is removed at the end.

    Args:
        model: a :class:`hiertcn.training.session_model.SessionModel` with a ``config``, e.g.
            ``models.hiertcn.HierTCN``; ends in evaluation mode with the best weights.
        store: the sessions; only those starting before ``split.validation_start_us`` are learnt.
        table: item vectors; what becomes of them is ``options.item_vectors``.
        split: where validation starts and ends.
        output: folder to write.
        options: see :class:`TrainOptions`.
        warm_start: folder of an earlier model of the same configuration to start from, its trained
            item vectors included; items it did not know start from ``table``.

    Raises:
        InputError: the table is too short, of another width, or not finite; a checkpoint or warm
            start belongs to another configuration; or the loss stopped being finite.
    """
    run = _Run(model, store, table, split, Path(output), options)
    if not run.resume() and warm_start is not None:
        load_weights(model, Path(warm_start) / WEIGHTS_FILE)
        load_vectors(run.vectors, Path(warm_start))
        _log.info("starting from the weights of %s", warm_start)
    return run.train()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        store: SessionStore,
        table: ItemTable,
        split: Split,
        output: Path,
        options: TrainOptions,
    ) -> None:
        check_table(table, store, model)
        self.module, self.model = model, cast(SessionModel, model)
        self.table, self.options, self.output = table, options, output
        self.device = choose_device(options.device)
        model.to(self.device)
        self.lane_count = options.lanes or _lanes_for(
            store, split.validation_start_us, options.sessions_per_step
        )
        batched = store
        if isinstance(model, HistoryModel):
            batched = model.learn_from(store, split.validation_start_us)
        self.batches = SessionBatches(
            batched,
            lanes=self.lane_count,
            sessions_per_step=options.sessions_per_step,
            max_length=options.max_length,
            context=self.model.receptive_field,
            end_us=split.validation_start_us,
            seed=options.seed,
        )
        self.vectors = start_vectors(
            options.item_vectors,
            table,
            self.device,
            seed=options.seed,
            # A catalogue that is scored whole has dense gradients.
            sparse=len(table)
            > max(DENSE_ITEMS, options.random_negatives + options.in_batch_negatives),
        )
        self.network = nn.ModuleDict({"model": model, "vectors": self.vectors})
        counts = _target_counts(store, split.validation_start_us, len(table))
        self.has_terms = terms_of(model) is not None
        transitions = None
        if self.has_terms:
            transitions = count_transitions(store, len(table), end_us=split.validation_start_us)
        self.objective = Objective(
            store,
            self.vectors,
            counts,
            options,
            self.device,
            term_scores(model, store, transitions, counted=True, device=self.device),
        )
        self.validation = (
            None
            if options.validation_requests == 0
            else Validation(
                store,
                self.vectors,
                split,
                requests=options.validation_requests,
                seed=options.seed,
                device=self.device,
                terms=term_scores(model, store, transitions, counted=False, device=self.device),
            )
        )
        self.store, self.split = store, split
        self.optimizers = Optimizers(
            model,
            self.vectors,
            weight_decay=options.weight_decay,
            vector_rate=(options.item_learning_rate or options.learning_rate)
            / options.learning_rate,
        )
        self.progress = Progress(learning_rate=options.learning_rate)
        planned = self.batches.steps(0) * options.max_epochs
        self.planned_steps = min(planned, options.max_steps or planned)
        self.lanes = self._start_lanes()
        self.best: dict[str, Tensor] = {}
        self.identity = {
            "options": {
                name: value
                for name, value in options.to_dict().items()
                if name not in ("max_steps", "max_epochs", "patience", "checkpoint_s")
            },
            "model": model_config(model),
            "store": store.meta.to_dict(),
            "table": table.checksum,
            "split": split.to_dict(),
        }

    def resume(self) -> bool:
        """Continue from the checkpoint in the output folder, if there is one."""
        path = self.output / CHECKPOINT_FILE
        if not path.exists():
            return False
        tensors, meta = load_checkpoint(path)
        differing = [
            name for name, value in self.identity.items() if meta["identity"].get(name) != value
        ]
        if differing:
            raise InputError(
                f"{path} belongs to a run with another {' and '.join(differing)}; delete it to "
                "train from the start, or repeat the interrupted call unchanged"
            )
        self.network.load_state_dict(_under("network.", tensors))
        self.best = _under("best.", tensors)
        self.optimizers.restore(_under("optimizers.", tensors))
        self.lanes = tensors["lanes"].to(self.device)
        self.progress = Progress(**meta["progress"])
        _log.info("resuming after step %d from %s", self.progress.step, path)
        return True

    def train(self) -> TrainSummary:
        """Run epochs until one of the limits ends them, then keep the best weights."""
        started = time.monotonic()
        before = self.progress.seconds
        stopped = None
        while stopped is None:
            stopped = self._epoch()
            self.progress.seconds = before + time.monotonic() - started
        self.network.load_state_dict(self.best)
        self.module.eval()
        return self._finish(stopped)

    def _epoch(self) -> str | None:
        """Train to the end of the current epoch; return why training ends, or None."""
        options, progress = self.options, self.progress
        patience_spent = f"no better validation MRR in {options.patience} validations"
        if progress.stale >= options.patience:
            return patience_spent
        if progress.epoch >= options.max_epochs:
            return f"{options.max_epochs} epochs done"
        last_checkpoint = time.monotonic()
        with self._progress_bar() as bar:
            asked = time.perf_counter()
            for batch in self.batches.epoch(progress.epoch, progress.step_in_epoch):
                waited = time.perf_counter() - asked
                if options.max_steps and progress.step >= options.max_steps:
                    if progress.steps[-1:] != [progress.step]:
                        self._validate()
                    return f"{options.max_steps} steps done"
                started = time.perf_counter()
                self._step(batch)
                progress.training_seconds += waited + time.perf_counter() - started
                progress.waiting_seconds += waited
                bar.update(int(batch.is_target.sum()))
                bar.set_postfix(loss=f"{progress.mean_loss():.4f}", refresh=False)
                if options.validate_steps and progress.step % options.validate_steps == 0:
                    self._validate()
                    if progress.stale >= options.patience:
                        return patience_spent
                if time.monotonic() - last_checkpoint >= options.checkpoint_s:
                    self._checkpoint()
                    last_checkpoint = time.monotonic()
                asked = time.perf_counter()
        if progress.steps[-1:] != [progress.step]:
            self._validate()
        progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        self.lanes = self._start_lanes()
        return None

    def _step(self, batch: SessionBatch) -> None:
        options, progress = self.options, self.progress
        warmth = min(1.0, (progress.step + 1) / max(1, options.warmup_steps))
        torch.manual_seed(_step_seed(options.seed, progress.step))
        rng = np.random.default_rng((options.seed, progress.step, 1))
        self.module.train()
        tensors = to_tensors(batch, self.vectors, self.device)
        u, lanes = self.model(tensors, self.lanes)
        loss = self.objective(u, tensors, rng)
        self.optimizers.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        rate = progress.learning_rate * warmth
        if options.schedule == "cosine":
            done = min(1.0, progress.step / self.planned_steps)
            rate *= 0.5 * (1.0 + math.cos(math.pi * done))
        self.optimizers.step(rate, options.clip)
        self.lanes = lanes.detach()

        value, targets = float(loss.detach()), len(tensors.targets)
        if not np.isfinite(value):
            raise InputError(
                f"the training loss became {value} at step {progress.step}; lower the learning "
                f"rate ({options.learning_rate}) or the clip norm ({options.clip})"
            )
        progress.add_step(value, targets)

    def _validate(self) -> None:
        progress = self.progress
        self.module.eval()
        mrr = None if self.validation is None else self.validation.mrr(self.model)
        decay = self.options.decay if self.options.schedule == "plateau" else 1.0
        if progress.add_validation(mrr, decay):
            self.best = {
                name: value.detach().cpu().clone()
                for name, value in self.network.state_dict().items()
            }
        _log.info(
            "epoch %d, step %d: loss %.4f, validation MRR %s",
            progress.epoch + 1,
            progress.step,
            progress.train_loss[-1],
            "not measured" if mrr is None else f"{mrr:.4f}",
        )

    def _checkpoint(self) -> None:
        tensors = {
            **_prefixed("network.", self.network.state_dict()),
            **_prefixed("best.", self.best),
            **_prefixed("optimizers.", self.optimizers.tensors()),
            "lanes": self.lanes,
        }
        meta = {"identity": self.identity, "progress": asdict(self.progress)}
        save_checkpoint(self.output / CHECKPOINT_FILE, tensors, meta)

    def _finish(self, stopped: str) -> TrainSummary:
        progress = self.progress
        save_weights(self.module, self.output / WEIGHTS_FILE)
        write_json(self.output / CONFIG_FILE, model_config(self.module))
        write_json(self.output / CURVE_FILE, progress.curve())
        save_vectors(self.vectors, self.output, table_dtype(self.table))
        if self.has_terms:
            table = count_transitions(self.store, len(self.table), end_us=self.split.test_start_us)
            table.save(self.output / TRANSITIONS_FOLDER)
        (self.output / CHECKPOINT_FILE).unlink(missing_ok=True)
        summary = TrainSummary(
            steps=progress.step,
            epochs=progress.epoch,
            best_step=progress.best_step,
            train_loss=progress.train_loss[-1],
            validation_mrr=progress.best_mrr,
            stopped=stopped,
            seconds=progress.seconds,
            interactions_per_s=progress.training_interactions
            / max(progress.training_seconds, 1e-9),
            waiting_share=progress.waiting_seconds / max(progress.training_seconds, 1e-9),
            parameters=sum(weights.numel() for weights in self.module.parameters()),
            item_parameters=sum(weights.numel() for weights in self.vectors.parameters()),
        )
        _log.info(
            "trained %d steps (%s), best validation MRR %.4f at step %d, wrote %s",
            summary.steps,
            stopped,
            summary.validation_mrr,
            summary.best_step,
            self.output,
        )
        return summary

    def _start_lanes(self) -> Tensor:
        return self.model.initial_state(self.lane_count).detach().clone()

    def _progress_bar(self) -> Any:
        return tqdm(
            total=self.batches.interactions,
            desc=f"epoch {self.progress.epoch + 1}/{self.options.max_epochs}",
            unit=" interactions",
            unit_scale=True,
            mininterval=2,
        )


def _target_counts(store: SessionStore, end_us: int, items: int) -> NDArray[np.int64]:
    lengths = np.diff(store.session_offsets)
    learnt = np.repeat(store.session_starts_us() < end_us, lengths)
    return np.bincount(store.item_rows[learnt], minlength=items)


def _lanes_for(store: SessionStore, end_us: int, sessions_per_step: int) -> int:
    """Return the lanes that give a step about ``_INTERACTIONS_PER_STEP`` interactions."""
    lengths = np.diff(store.session_offsets)[store.session_starts_us() < end_us]
    mean = float(lengths.mean()) if len(lengths) else 1.0
    wanted = round(_INTERACTIONS_PER_STEP / (sessions_per_step * mean))
    return min(max(wanted, _FEWEST_LANES), _MOST_LANES)


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
