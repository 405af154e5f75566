"""Trains HierTCN from the session store, and can be killed and resumed at any moment.

One step takes a batch of the queue-based generator, folds its sessions into the lanes' states, and
minimises the loss at every interaction (HierTCN sections 3.5.2 and 3.6.2). States are carried from
step to step without gradient: back-propagation through time is truncated at the step. After each
epoch the MRR on a sample of validation sessions decides about the learning rate and about stopping;
the weights of the best validation are what is kept. A model's scoring terms are fitted last, on the
validation sessions (hiertcn/training/term_fitting.py).

Everything random in a step (negatives, dropout) is seeded by the seed and the step's number, so a
checkpoint needs no generator state, and a resumed run ends in the same bits as an uninterrupted one
on a CPU with the same number of threads. Memory follows the batch, not the log, but for 8 bytes an
item and the batch plan.

Under torchrun every process trains on its share of the lanes (hiertcn/training/distributed.py); the
first one validates and writes. A checkpoint holds all lanes' states, so another number of processes
can resume from it, to float tolerance.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.files import write_json
from hiertcn.items.table import ItemTable
from hiertcn.sessions.batches import SessionBatch, SessionBatches
from hiertcn.sessions.lane_plan import choose_lanes
from hiertcn.sessions.split import Split
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import count_transitions
from hiertcn.training.checkpoints import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_weights,
    prefixed,
    save_checkpoint,
    save_weights,
    under,
)
from hiertcn.training.distributed import Ranks, targets_of_ranks
from hiertcn.training.item_vectors import (
    load_vectors,
    restore_unlearnt,
    save_vectors,
    start_vectors,
    table_dtype,
)
from hiertcn.training.lanes import LaneBatch, to_tensors
from hiertcn.training.objective import Objective
from hiertcn.training.optimizers import DENSE_ITEMS, Optimizers
from hiertcn.training.options import TrainOptions
from hiertcn.training.preconditions import (
    check_event_types,
    check_table,
    choose_device,
    model_config,
)
from hiertcn.training.prefetch import prefetched
from hiertcn.training.progress import Progress, TrainSummary
from hiertcn.training.resuming import load_run, run_identity, step_seed
from hiertcn.training.session_model import SessionModel
from hiertcn.training.term_fitting import fit_on_validation
from hiertcn.training.term_scores import terms_of
from hiertcn.training.validation import Validation
from hiertcn.training.whole_history import HistoryModel

CURVE_FILE: Final = "curve.json"
TRANSITIONS_FOLDER: Final = "transitions"

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
    ``item_table`` (with one-hot items also ``output_table``), in the dtype of ``table``; fine-tuned
    rows of items that training never saw are those of ``table``. For a model with scoring terms
    also the folder ``transitions``, counted up to the start of the test range. While training,
    ``output`` holds only a checkpoint, from which the same call resumes after a kill; it is removed
    at the end.

    Args:
        model: a :class:`hiertcn.training.session_model.SessionModel` with a ``config``, e.g.
            ``models.hiertcn.HierTCN``; ends in evaluation mode with the best weights.
        store: the sessions; only those starting before ``split.validation_start_us`` are learnt.
        table: item vectors; what becomes of them is ``options.item_vectors``.
        split: where validation starts and ends.
        output: folder to write.
        options: see :class:`TrainOptions`.
        warm_start: folder of an earlier model of the same network to start from, its trained item
            vectors included; items it did not know start from ``table``. Scoring terms are fitted
            anew, whatever the earlier model had of them.

    Raises:
        InputError: the table is too short, of another width, or not finite; a checkpoint or warm
            start belongs to another configuration; or the loss stopped being finite.
    """
    run = _Run(model, store, table, split, Path(output), options)
    if not run.resume() and warm_start is not None:
        load_weights(model, Path(warm_start) / WEIGHTS_FILE, without="terms")
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
        check_event_types(store, model)
        self.module, self.model = model, cast(SessionModel, model)
        self.table, self.options, self.output = table, options, output
        self.device = choose_device(options.device)
        self.ranks = Ranks.join(self.device)
        model.to(self.device)
        batched = store
        if isinstance(model, HistoryModel):
            batched = model.learn_from(store, split.validation_start_us)
        self.batches = SessionBatches(
            batched,
            lanes=options.lanes
            or choose_lanes(store, split.validation_start_us, options.sessions_per_step),
            sessions_per_step=options.sessions_per_step,
            max_length=options.max_length,
            context=self.model.receptive_field,
            end_us=split.validation_start_us,
            seed=options.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
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
        self.target_counts = _target_counts(store, split.validation_start_us, len(table))
        self.objective = Objective(store, self.vectors, self.target_counts, options, self.device)
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
        self.uses_bf16 = options.bf16 and self.device.type == "cuda"
        self.lanes = self._start_lanes()
        self.best: dict[str, Tensor] = {}
        self.identity = run_identity(options, model_config(model), store, table, split)

    def resume(self) -> bool:
        """Continue from the checkpoint in the output folder, if there is one."""
        path = self.output / CHECKPOINT_FILE
        if not path.exists():
            return False
        tensors, meta = load_run(path, self.identity)
        self.network.load_state_dict(under("network.", tensors))
        self.best = under("best.", tensors)
        self.optimizers.restore(under("optimizers.", tensors))
        first = self.batches.first_lane
        self.lanes = tensors["lanes"][first : first + self.batches.own_lanes].to(self.device)
        self.progress = Progress(**meta["progress"])
        _log.info("resuming after step %d from %s", self.progress.step, path)
        return True

    def train(self) -> TrainSummary:
        """Run epochs until one of the limits ends them, then keep the best weights."""
        self.ranks.share_weights(self.network)
        started = time.monotonic()
        before = self.progress.seconds
        stopped = None
        while stopped is None:
            stopped = self._epoch()
            self.progress.seconds = before + time.monotonic() - started
        self.network.load_state_dict(self.best)
        self.module.eval()
        if self.options.item_vectors == "fine-tuned":
            restore_unlearnt(self.vectors, self.table, self.target_counts > 0)
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
        with progress.bar(
            self.batches.interactions, options.max_epochs, shown=self.ranks.is_first
        ) as bar:
            asked = time.perf_counter()
            for batch, tensors in self._batches():
                waited = time.perf_counter() - asked
                if options.max_steps and progress.step >= options.max_steps:
                    if progress.steps[-1:] != [progress.step]:
                        self._validate()
                    return f"{options.max_steps} steps done"
                started = time.perf_counter()
                self._step(batch, tensors)
                progress.training_seconds += waited + time.perf_counter() - started
                progress.waiting_seconds += waited
                bar.update(len(batch.targets))
                bar.set_postfix(loss=f"{progress.mean_loss():.4f}", refresh=False)
                if options.validate_steps and progress.step % options.validate_steps == 0:
                    self._validate()
                    if progress.stale >= options.patience:
                        return patience_spent
                elapsed = time.monotonic() - last_checkpoint
                if self.ranks.from_first(elapsed, self.device) >= options.checkpoint_s:
                    self._checkpoint()
                    last_checkpoint = time.monotonic()
                asked = time.perf_counter()
        if progress.steps[-1:] != [progress.step]:
            self._validate()
        progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        self.lanes = self._start_lanes()
        return None

    def _batches(self) -> Iterator[tuple[SessionBatch, LaneBatch | None]]:
        """Yield the rest of the epoch, with tensors where they need no gradient."""

        def make() -> Iterator[tuple[SessionBatch, LaneBatch | None]]:
            for batch in self.batches.epoch(self.progress.epoch, first):
                yield batch, None if self.vectors.are_trained else self._tensors(batch)

        first = self.progress.step_in_epoch
        ahead = self.options.prefetch
        if ahead < 0:
            ahead = 2 if self.device.type == "cuda" else 0
        return prefetched(make(), ahead)

    def _tensors(self, batch: SessionBatch) -> LaneBatch:
        return to_tensors(batch, self.vectors, self.device)

    def _step(self, batch: SessionBatch, tensors: LaneBatch | None) -> None:
        options, progress = self.options, self.progress
        warmth = min(1.0, (progress.step + 1) / max(1, options.warmup_steps))
        torch.manual_seed(step_seed(options.seed, progress.step, self.ranks.rank))
        rng = np.random.default_rng((options.seed, progress.step, 1))
        self.module.train()
        (targets,) = self.ranks.sum([len(batch.targets)], self.device)
        self.optimizers.zero_grad()
        own_loss = 0.0
        if tensors is None:
            tensors = self._tensors(batch)
        if self.ranks.world_size > 1:
            pool = targets_of_ranks(self.ranks, self.batches, batch, tensors)
            tensors = replace(tensors, pool_targets=pool)
        # A rank whose lanes have ended still takes part in every sum.
        if len(batch.targets):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.uses_bf16):
                u, lanes = self.model(tensors, self.lanes)
            self.lanes = lanes.detach().float()
            loss = self.objective(u.float(), tensors, rng) * (len(batch.targets) / targets)
            loss.backward()  # type: ignore[no-untyped-call]
            own_loss = float(loss.detach())
        self.optimizers.sum_over(self.ranks)
        rate = progress.learning_rate * warmth
        if options.schedule == "cosine":
            done = min(1.0, progress.step / self.planned_steps)
            rate *= 0.5 * (1.0 + math.cos(math.pi * done))
        self.optimizers.step(rate, options.clip)

        (value,) = self.ranks.sum([own_loss], self.device)
        if not np.isfinite(value):
            raise InputError(
                f"the training loss became {value} at step {progress.step}; lower the learning "
                f"rate ({options.learning_rate}) or the clip norm ({options.clip})"
            )
        progress.add_step(value, int(targets))

    def _validate(self) -> None:
        progress = self.progress
        self.module.eval()
        mrr = None
        if self.validation is not None:
            mrr = self.validation.mrr(self.model) if self.ranks.is_first else 0.0
            mrr = self.ranks.from_first(mrr, self.device)
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
            **prefixed("network.", self.network.state_dict()),
            **prefixed("best.", self.best),
            **prefixed("optimizers.", self.optimizers.tensors()),
            "lanes": self.ranks.concatenate(self.lanes),
        }
        if not self.ranks.is_first:
            return
        meta = {"identity": self.identity, "progress": asdict(self.progress)}
        save_checkpoint(self.output / CHECKPOINT_FILE, tensors, meta)

    def _finish(self, stopped: str) -> TrainSummary:
        if self.ranks.is_first:
            fit_on_validation(
                self.model, self.store, self.vectors, self.split, self.options, self.device
            )
            self._write()
        self.ranks.barrier()
        summary = self.progress.summary(stopped, self.module, self.vectors)
        _log.info(
            "trained %d steps (%s), best validation MRR %.4f at step %d, wrote %s",
            summary.steps,
            stopped,
            summary.validation_mrr,
            summary.best_step,
            self.output,
        )
        return summary

    def _write(self) -> None:
        save_weights(self.module, self.output / WEIGHTS_FILE)
        write_json(self.output / CONFIG_FILE, model_config(self.module))
        write_json(self.output / CURVE_FILE, self.progress.curve())
        save_vectors(self.vectors, self.output, table_dtype(self.table))
        if terms_of(self.model) is not None:
            table = count_transitions(self.store, len(self.table), end_us=self.split.test_start_us)
            table.save(self.output / TRANSITIONS_FOLDER)
        (self.output / CHECKPOINT_FILE).unlink(missing_ok=True)

    def _start_lanes(self) -> Tensor:
        return self.model.initial_state(self.batches.own_lanes).detach().clone()


def _target_counts(store: SessionStore, end_us: int, items: int) -> NDArray[np.int64]:
    lengths = np.diff(store.session_offsets)
    learnt = np.repeat(store.session_starts_us() < end_us, lengths)
    return np.bincount(store.item_rows[learnt], minlength=items)
