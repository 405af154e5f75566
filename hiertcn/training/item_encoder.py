"""Train the item encoder on the item graph (HierTCN, section 3.6.1; PinSage, section 3).

Pairs of neighbors attract, sampled items repel. A share of the edges is held out of the graph
*and* of the walks that make its neighborhoods; after each epoch the encoder is asked for them
(``item_hit_rate``), and the weights of the best epoch are kept. Item features, where given, and
popularity are measured by the same question, so the summary says what training added. Then a few
epochs on the whole graph teach the best weights the held-out edges too: drawn by weight, 1% of the
pairs may be a third of all co-interactions.

An item that comes between two builds has no id vector and may have no neighbors. So each step
encodes some of its items in that way (``id_dropout``, ``neighborhood_dropout``): hardly an item of
a graph is alone, so the encoder would not learn what to make of features alone.

Minibatches compute blocks, so memory depends on the batch. Loss, negatives and curve are written
with the weights; after every epoch a checkpoint from which a killed run continues with the very
draws it would have made (the epochs on the whole graph start over). Cost: about 0.07 s of CPU a
step with 512 pairs, 64 dimensions and 10 neighbors, plus one layer-wise inference an epoch.

Not done here: training on several machines.
"""

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.files import write_json
from hiertcn.graph.blocks import BlockBuilder
from hiertcn.graph.csr import CSR
from hiertcn.graph.walks import NO_ITEM, Neighborhoods, walk_neighborhoods
from hiertcn.training.checkpoints import CONFIG_FILE, WEIGHTS_FILE, save_weights
from hiertcn.training.item_batches import (
    ItemEncoder,
    ItemFeatures,
    adjacency,
    feature_tensors,
    have_features,
)
from hiertcn.training.item_checkpoint import (
    Progress,
    copied,
    remove_checkpoint,
    resume,
    save_progress,
    take_over_weights,
    training_fingerprint,
)
from hiertcn.training.item_encoder_options import ItemEncoderOptions, ItemEncoderSummary
from hiertcn.training.item_hit_rate import baseline_hit_rates, hit_rate
from hiertcn.training.item_inference import embed_items
from hiertcn.training.item_losses import item_loss
from hiertcn.training.item_pairs import HeldOutEdges, PairBatch, PairSampler, hold_out_edges
from hiertcn.training.item_spectral_start import spectral_vectors
from hiertcn.training.optimizers import Optimizers

CURVE_FILE: Final = "curve.json"

_MAX_GRADIENT_NORM: Final = 5.0
_FINAL_LR: Final = 0.5
"""Of the learning rate, where the epochs on the whole graph begin."""

_log = logging.getLogger(__name__)


def train_item_encoder(
    encoder: ItemEncoder,
    features: ItemFeatures | None,
    neighborhoods: Neighborhoods,
    csr: CSR,
    output: Path,
    options: ItemEncoderOptions = ItemEncoderOptions(),  # noqa: B008
    warm_start: Path | None = None,
) -> ItemEncoderSummary:
    """Train ``encoder`` in place to its best epoch and write it.

    Args:
        encoder: see ``models.graphsage.GraphSAGE``.
        features: of all items; None if they have none.
        neighborhoods: of ``csr``; while edges are held out, training walks on the graph without
            them with the same options.
        csr: the item graph.
        output: folder for ``config.json``, ``model.safetensors`` and ``curve.json``; holds
            a checkpoint while training runs.
        options: see :class:`ItemEncoderOptions`.
        warm_start: folder of an earlier encoder whose weights are taken where shapes allow.

    A graph without edges trains nothing: the encoder is written as it is, with a warning.

    Raises:
        InputError: sizes of encoder, features and graph disagree, features hold NaN, the loss is
            no longer finite, or the earlier weights cannot be read.
    """
    _check(encoder, features, neighborhoods, csr)
    torch.manual_seed(options.seed)
    taken = take_over_weights(encoder, warm_start) if warm_start is not None else []
    held = hold_out_edges(
        csr,
        share=options.validation_share,
        most=options.max_validation_edges,
        seed=options.seed,
    )
    fresh = encoder.per_item_parameters - set(taken)
    if fresh and csr.items <= options.spectral_start_items:
        encoder.start_id_vectors(
            spectral_vectors(held.training, encoder.config.hidden, seed=options.seed)
        )
    training = EncoderTraining(
        encoder,
        features,
        walk_neighborhoods(held.training, neighborhoods.options),
        held,
        options,
    )
    fingerprint = training_fingerprint(encoder, features, neighborhoods, csr, options, warm_start)
    progress = resume(output, encoder, training.optimizer, fingerprint)
    resumed = progress.epochs if progress else 0
    if progress is None:
        progress = Progress(
            epochs=0,
            steps=0,
            train_loss=[],
            validation_hit_rate=[],
            best_epoch=0,
            best=copied(encoder.state_dict()),
        )
    if not training.planned_steps:
        _log.warning("the item graph has no edge to train on; the item encoder stays as it is")
    while progress.steps < training.planned_steps and not _is_over(progress, options):
        training.run_epoch(progress)
        save_progress(output, encoder, training.optimizer, progress, fingerprint)
    encoder.load_state_dict(progress.best)
    measured = training.measure()
    if len(held.queries) and progress.steps:
        _finish_on_whole_graph(encoder, features, neighborhoods, csr, options)
    encoder.eval()
    summary = ItemEncoderSummary(
        train_loss=progress.train_loss,
        validation_hit_rate=progress.validation_hit_rate,
        best_epoch=progress.best_epoch,
        hit_rate=measured,
        baseline_hit_rates=baseline_hit_rates(features, held),
        held_out_edges=len(held.queries),
        steps=progress.steps,
        stopped_early=progress.steps < training.planned_steps,
        warm_started=taken,
        resumed_epochs=resumed,
    )
    _write(encoder, summary, options, output)
    remove_checkpoint(output)
    _log.info(
        "wrote the item encoder to %s: hit rate@10 %s on %d held-out edges (%s) after %d steps",
        output,
        _shown(summary.hit_rate),
        summary.held_out_edges,
        ", ".join(f"{name} {_shown(rate)}" for name, rate in summary.baseline_hit_rates.items()),
        summary.steps,
    )
    return summary


class EncoderTraining:
    """The parts that every epoch needs.

    Args:
        encoder: see ``models.graphsage.GraphSAGE``.
        features: of all items; None if they have none.
        neighborhoods: of the graph that is trained on.
        held: the graph that is trained on, and what is asked of it.
        options: see :class:`ItemEncoderOptions`.
    """

    def __init__(
        self,
        encoder: ItemEncoder,
        features: ItemFeatures | None,
        neighborhoods: Neighborhoods,
        held: HeldOutEdges,
        options: ItemEncoderOptions,
    ) -> None:
        self.encoder, self.features, self.held, self.options = encoder, features, held, options
        self.optimizer = _optimizer(encoder)
        self.neighborhoods = neighborhoods
        self.builder = BlockBuilder(neighborhoods)
        edges = len(held.training.indices)
        self.epoch_steps = math.ceil(edges / options.batch)
        if options.steps_per_epoch:
            self.epoch_steps = min(self.epoch_steps, options.steps_per_epoch)
        self.planned_steps = self.epoch_steps * options.epochs
        if options.max_steps:
            self.planned_steps = min(self.planned_steps, options.max_steps)
        if edges:
            self.sampler = PairSampler(
                held.training,
                weight_power=options.weight_power,
                hard_ranks=options.hard_ranks,
                seed=options.seed,
            )

    def run_epoch(self, progress: Progress) -> None:
        """Train for an epoch and measure."""
        self.encoder.train()
        rng = np.random.default_rng([self.options.seed, 1, progress.epochs])
        steps = min(self.epoch_steps, self.planned_steps - progress.steps)
        hard = min(progress.epochs, self.options.hard_negatives)
        total = 0.0
        title = f"item encoder epoch {progress.epochs + 1}/{self.options.epochs}"
        for step in tqdm(range(steps), desc=title, unit="step", mininterval=2):
            total += self.step(progress.steps + step, rng, hard)
        progress.steps += steps
        progress.epochs += 1
        progress.train_loss.append(total / steps)
        measured = self.measure()
        before = [rate for rate in progress.validation_hit_rate if rate is not None]
        progress.validation_hit_rate.append(measured)
        if measured is None or not before or measured > max(before):
            progress.best_epoch = progress.epochs
            progress.best = copied(self.encoder.state_dict())

    def step(self, at: int, rng: np.random.Generator, hard: int) -> float:
        """Make the optimizer step number ``at`` with ``hard`` hard negatives a pair.

        Returns:
            The loss.

        Raises:
            InputError: the loss is not finite.
        """
        pairs = self.sampler.draw(rng, self.options.batch, self.options.negatives, hard)
        loss = self._loss(pairs, rng)
        if not torch.isfinite(loss):
            raise InputError(
                f"the item encoder's loss is {loss.item()} at step {at}; lower lr or raise "
                "temperature"
            )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        turn = 0.5 * (1 + math.cos(math.pi * at / self.planned_steps))
        self.optimizer.step(self.options.lr * (0.1 + 0.9 * turn), _MAX_GRADIENT_NORM)
        return loss.item()

    def measure(self) -> float | None:
        """Return the hit rate on the held-out edges, None if there are none."""
        if not len(self.held.queries):
            return None
        vectors = embed_items(self.encoder, self.features, self.neighborhoods, progress=False)
        return hit_rate(vectors, self.held)

    def _loss(self, pairs: PairBatch, rng: np.random.Generator) -> torch.Tensor:
        options, batch = self.options, len(pairs.queries)
        drawn = [pairs.queries, pairs.positives, pairs.shared, pairs.hard.reshape(-1)]
        items, place = np.unique(np.concatenate(drawn), return_inverse=True)
        as_new = rng.random(len(items))
        alone = (as_new < options.neighborhood_dropout) & have_features(self.features, items)
        rows, blocks = self.builder.build(items, self.encoder.layers, alone)
        given, present = feature_tensors(self.features, rows)
        rows[: len(items)][as_new < options.id_dropout] = NO_ITEM
        z = self.encoder(
            torch.from_numpy(rows), given, present, [adjacency(block) for block in blocks]
        )
        queries, positives, shared, hard = torch.split(
            z[torch.from_numpy(place)], [len(part) for part in drawn]
        )
        positive = (queries * positives).sum(dim=1)
        against, candidates = shared, pairs.shared
        if options.in_batch_negatives:
            against = torch.cat([positives, shared])
            candidates = np.concatenate([pairs.positives, pairs.shared])
        negative = queries @ against.T
        if options.loss == "softmax" and options.in_batch_negatives and options.logq:
            # Times the temperature, because the loss divides by it.
            correction = options.temperature * self._log_draws(candidates)
            negative = negative - correction
            positive = positive - correction[:batch]
        is_negative = torch.from_numpy(
            (candidates != pairs.positives[:, None]) & (candidates != pairs.queries[:, None])
        )
        if pairs.hard.size:
            near = (hard.view(*pairs.hard.shape, -1) * queries.unsqueeze(1)).sum(-1)
            negative = torch.cat([negative, near], dim=1)
            is_hard = torch.from_numpy(
                (pairs.hard != pairs.positives[:, None]) & (pairs.hard != pairs.queries[:, None])
            )
            is_negative = torch.cat([is_negative, is_hard], dim=1)
        return item_loss(
            options.loss,
            positive,
            negative,
            is_negative,
            negatives_weight=options.negatives_weight,
            temperature=options.temperature,
            margin=options.margin,
        )

    def _log_draws(self, candidates: NDArray[np.int64]) -> torch.Tensor:
        """Logarithm of how often each candidate is expected among a step's candidates."""
        uniform = self.options.negatives / self.held.training.items
        expected = self.options.batch * self.sampler.positive_shares[candidates] + uniform
        return torch.from_numpy(np.log(expected).astype(np.float32))


def _finish_on_whole_graph(
    encoder: ItemEncoder,
    features: ItemFeatures | None,
    neighborhoods: Neighborhoods,
    csr: CSR,
    options: ItemEncoderOptions,
) -> None:
    if not options.final_epochs:
        return
    nothing = np.empty(0, np.int64)
    more = replace(options, epochs=options.final_epochs, lr=options.lr * _FINAL_LR)
    training = EncoderTraining(
        encoder, features, neighborhoods, HeldOutEdges(csr, nothing, nothing), more
    )
    encoder.train()
    steps = training.planned_steps
    rng = np.random.default_rng([options.seed, 2])
    for step in tqdm(range(steps), desc="item encoder, whole graph", unit="step", mininterval=2):
        training.step(step, rng, options.hard_negatives)


def _optimizer(encoder: ItemEncoder) -> Optimizers:
    per_item, others = torch.nn.ParameterList(), torch.nn.ParameterList()
    for name, parameter in encoder.named_parameters():
        (per_item if name in encoder.per_item_parameters else others).append(parameter)
    per_item.sparse = encoder.has_sparse_gradients  # type: ignore[assignment]
    return Optimizers(others, per_item, weight_decay=0.0, vector_rate=1.0)


def _is_over(progress: Progress, options: ItemEncoderOptions) -> bool:
    return progress.epochs - progress.best_epoch >= options.patience


def _check(
    encoder: ItemEncoder,
    features: ItemFeatures | None,
    neighborhoods: Neighborhoods,
    csr: CSR,
) -> None:
    if len(neighborhoods) != csr.items:
        raise InputError(
            f"the neighborhoods are of {len(neighborhoods)} items and the graph of {csr.items}; "
            "walk this graph again"
        )
    width = 0 if features is None else features.values.shape[1]
    if width != encoder.config.feature_dim:
        raise InputError(
            f"the items have {width} features and the encoder's feature_dim is "
            f"{encoder.config.feature_dim}; make them equal"
        )
    if encoder.config.id_vectors and encoder.config.items != csr.items:
        raise InputError(
            f"the encoder has id vectors of {encoder.config.items} items and the graph has "
            f"{csr.items}; make the encoder's items that many"
        )
    if features is None:
        return
    for start in range(0, len(features.present), 1 << 16):
        part = slice(start, start + (1 << 16))
        bad = ~np.isfinite(features.values[part]).all(axis=1) & features.present[part]
        if bad.any():
            raise InputError(
                f"the features of item row {start + int(bad.argmax())} are not all finite; mark "
                "the item as missing or repair its features"
            )


def _write(
    encoder: ItemEncoder, summary: ItemEncoderSummary, options: ItemEncoderOptions, output: Path
) -> None:
    save_weights(encoder, output / WEIGHTS_FILE)
    write_json(output / CURVE_FILE, {**summary.to_dict(), "options": asdict(options)})
    # Last: a folder with a config is a whole encoder.
    write_json(output / CONFIG_FILE, encoder.config.to_dict())


def _shown(rate: float | None) -> str:
    return "unmeasured" if rate is None else f"{rate:.4f}"
