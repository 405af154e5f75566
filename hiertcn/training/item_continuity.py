"""Keep a day's item vectors near the day before's: measure how far they moved, and turn them back.

The rotation goes into the encoder's own weights, so everything it embeds from then on, tomorrow's
warm start and items that come between builds included, is in the turned coordinates.
"""

import logging
from pathlib import Path
from typing import Final

import numpy as np
import torch

from hiertcn.files import read_json, write_json
from hiertcn.graph.walks import Neighborhoods
from hiertcn.items.alignment import Drift, measure_drift, procrustes_rotation
from hiertcn.items.table import ItemTable
from hiertcn.training.checkpoints import WEIGHTS_FILE, save_weights
from hiertcn.training.item_batches import ItemEncoder, ItemFeatures
from hiertcn.training.item_encoder import CURVE_FILE
from hiertcn.training.item_inference import embed_some

DRIFT: Final = "drift"
"""Key of the drift in the encoder's ``curve.json``."""

_log = logging.getLogger(__name__)


def continue_table(
    encoder: ItemEncoder,
    features: ItemFeatures | None,
    neighborhoods: Neighborhoods,
    previous: ItemTable,
    directory: Path,
    *,
    align: bool,
    most_items: int = 20_000,
    seed: int = 0,
) -> Drift | None:
    """Compare the encoder's vectors with the previous table, and rotate the encoder if asked to.

    Items are append-only, so rows that both know are the same items. The previous table's last
    coordinate is its popularity prior and stays out of it.

    Args:
        encoder: trained; rotated in place if ``align``.
        features: of all items, or None.
        neighborhoods: of all items.
        previous: the table that serves.
        directory: the encoder's folder; the drift is added to its ``curve.json``, and its weights
            are replaced if they were rotated.
        align: rotate to the previous table.
        most_items: compare a sample of at most this many.
        seed: of the sample.

    Returns:
        The drift; None if the tables differ in width or share fewer items than they have
        coordinates, so that no rotation is determined, which is logged.
    """
    dim = encoder.config.dim
    shared = min(len(previous), len(neighborhoods))
    if previous.dim != dim + 1 or shared < dim:
        _log.warning(
            "the item vectors cannot be compared with those of %s: it has %d items of width %d and "
            "these are %d of width %d",
            previous.directory,
            len(previous),
            previous.dim - 1,
            len(neighborhoods),
            dim,
        )
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(shared)[:most_items])
    now = embed_some(encoder, features, neighborhoods, rows)
    then = previous.gather(rows)[:, :-1]
    rotation = procrustes_rotation(now, then)
    drift = measure_drift(now, then, rotation, aligned=align, seed=seed)
    if align:
        encoder.rotate(torch.from_numpy(rotation))
        save_weights(encoder, directory / WEIGHTS_FILE)
    curve = read_json(directory / CURVE_FILE)
    write_json(directory / CURVE_FILE, {**curve, DRIFT: drift.to_dict()})
    _log.info(
        "mean cosine of %d items to the vectors that serve: %.3f, %.3f rotated (%s)",
        drift.items,
        drift.cosine,
        drift.aligned_cosine,
        "used" if align else "not used",
    )
    return drift
