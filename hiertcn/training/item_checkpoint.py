"""Checkpoints and warm starts of the item encoder.

A checkpoint is one file in the output folder, replaced after every epoch: weights now, weights of
the best epoch, the optimizer's moments, and the curve so far. Random draws are made of
(seed, epoch) and need no state, so a resumed run ends in the same bits. One epoch is lost at most.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from hiertcn.graph.csr import CSR
from hiertcn.graph.walks import Neighborhoods
from hiertcn.training.checkpoints import (
    CHECKPOINT_FILE,
    WEIGHTS_FILE,
    load_checkpoint,
    read_tensors,
    save_checkpoint,
)
from hiertcn.training.item_batches import ItemEncoder, ItemFeatures
from hiertcn.training.item_encoder_options import ItemEncoderOptions
from hiertcn.training.optimizers import Optimizers

_NOW: Final = "now/"
_BEST: Final = "best/"
_OPTIMIZER: Final = "optimizer/"


@dataclass(kw_only=True)
class Progress:
    """Where training stands.

    Attributes:
        epochs: epochs done; ``steps`` optimizer steps in them.
        train_loss: mean loss of each epoch.
        validation_hit_rate: after each epoch; None where nothing is held out.
        best_epoch: 1-based; 0 before any.
        best: weights of that epoch.
    """

    epochs: int
    steps: int
    train_loss: list[float]
    validation_hit_rate: list[float | None]
    best_epoch: int
    best: dict[str, Tensor]


def save_progress(
    output: Path,
    encoder: ItemEncoder,
    optimizer: Optimizers,
    progress: Progress,
    fingerprint: str,
) -> None:
    """Replace the checkpoint of ``output``."""
    tensors = {
        **_prefixed(_NOW, encoder.state_dict()),
        **_prefixed(_BEST, progress.best),
        **_prefixed(_OPTIMIZER, optimizer.tensors()),
    }
    meta = {
        "fingerprint": fingerprint,
        "epochs": progress.epochs,
        "steps": progress.steps,
        "train_loss": progress.train_loss,
        "validation_hit_rate": progress.validation_hit_rate,
        "best_epoch": progress.best_epoch,
    }
    save_checkpoint(output / CHECKPOINT_FILE, tensors, meta)


def resume(
    output: Path, encoder: ItemEncoder, optimizer: Optimizers, fingerprint: str
) -> Progress | None:
    """Set encoder and optimizer to the checkpoint; None if there is none of this training.

    Raises:
        InputError: there is a checkpoint and it cannot be read.
    """
    if not (output / CHECKPOINT_FILE).exists():
        return None
    tensors, meta = load_checkpoint(output / CHECKPOINT_FILE)
    if meta.pop("fingerprint", None) != fingerprint:
        return None
    encoder.load_state_dict(_unprefixed(_NOW, tensors))
    optimizer.restore(_unprefixed(_OPTIMIZER, tensors))
    return Progress(best=_unprefixed(_BEST, tensors), **meta)


def remove_checkpoint(output: Path) -> None:
    """Remove the checkpoint, if there is one."""
    (output / CHECKPOINT_FILE).unlink(missing_ok=True)


def take_over_weights(encoder: ItemEncoder, directory: Path) -> list[str]:
    """Take over an earlier encoder's weights where shapes allow; return the names taken.

    Item rows are append-only, so the id vectors of yesterday's items are the first rows of
    today's; rows of new items keep their fresh values.

    Raises:
        InputError: the folder holds no readable weights.
    """
    earlier = read_tensors(directory / WEIGHTS_FILE)
    weights = dict(encoder.state_dict())
    taken = []
    for name, now in weights.items():
        then = earlier.get(name)
        if then is None or then.dtype != now.dtype:
            continue
        grew = name in encoder.per_item_parameters and len(then) <= len(now)
        if then.shape == now.shape:
            weights[name] = then
        elif grew and then.shape[1:] == now.shape[1:]:
            weights[name] = torch.cat([then, now[len(then) :]])
        else:
            continue
        taken.append(name)
    encoder.load_state_dict(weights)
    return taken


def copied(weights: Any) -> dict[str, Tensor]:
    """Return detached copies."""
    return {name: value.detach().clone() for name, value in weights.items()}


def _prefixed(prefix: str, tensors: Any) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def training_fingerprint(
    encoder: ItemEncoder,
    features: ItemFeatures | None,
    neighborhoods: Neighborhoods,
    csr: CSR,
    options: ItemEncoderOptions,
    warm_start: Path | None,
) -> str:
    """Name what is trained, so that no checkpoint of another training is resumed."""
    digest = hashlib.sha256()
    for array in (csr.indptr, csr.indices, csr.weights):
        digest.update(np.ascontiguousarray(array).data)
    if features is not None:
        digest.update(np.ascontiguousarray(features.values).data)
        digest.update(np.ascontiguousarray(features.present).data)
    described = (encoder.config, neighborhoods.options, options, str(warm_start))
    digest.update(repr(described).encode())
    return digest.hexdigest()
