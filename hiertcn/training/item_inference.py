"""Embed every item, one layer after the other, so each item is computed once per layer.

A minibatch of ``b`` items with ``top`` neighbors computes up to ``b * top ** layers`` inputs; here
the whole catalog costs ``items * layers``. Results between layers lie in memory up to
``memory_items`` items and in temporary memory-mapped files beyond, so memory is bounded by
``batch``. Results are the minibatch encoder's up to float rounding.
"""

import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.graph.blocks import BlockBuilder
from hiertcn.graph.walks import Neighborhoods
from hiertcn.training.item_batches import ItemEncoder, ItemFeatures, adjacency, feature_tensors

_DEFAULT_BATCH: Final = 8192


@torch.no_grad()
def embed_items(
    encoder: ItemEncoder,
    features: ItemFeatures | None,
    neighborhoods: Neighborhoods,
    batch: int = _DEFAULT_BATCH,
    *,
    output: Path | None = None,
    memory_items: int = 1_000_000,
    progress: bool = True,
) -> NDArray[np.float32]:
    """Return the vectors of all items, float32 [items, dim], each of length 1.

    Args:
        encoder: trained encoder; left in inference mode.
        features: of all items, or None if they have none.
        neighborhoods: of all items.
        batch: items computed at a time.
        output: a .npy file to write the vectors into (then they are returned memory-mapped);
            without it they are returned in memory.
        memory_items: more items than these go through temporary files beside ``output``.
        progress: show a progress bar.
    """
    items, hidden = len(neighborhoods), encoder.config.hidden
    encoder.eval()
    bar = tqdm(
        total=items * (encoder.layers + 1),
        desc="embed items",
        unit="item",
        mininterval=2,
        disable=not progress or None,
    )
    with tempfile.TemporaryDirectory(
        prefix=".layers-", dir=output.parent if output is not None else None
    ) as folder:
        inputs = _buffer(items, hidden, memory_items, Path(folder) / "inputs")
        here = _buffer(items, hidden, memory_items, Path(folder) / "a")
        following = _buffer(items, hidden, memory_items, Path(folder) / "b")
        messages = _buffer(items, hidden, memory_items, Path(folder) / "messages")
        for start in range(0, items, batch):
            rows = np.arange(start, min(start + batch, items))
            given, present = feature_tensors(features, rows)
            z = encoder.embed_inputs(torch.from_numpy(rows), given, present)
            inputs[rows] = here[rows] = z.numpy()
            bar.update(len(rows))
        builder = BlockBuilder(neighborhoods)
        for layer in range(encoder.layers):
            for start in range(0, items, batch):
                part = slice(start, min(start + batch, items))
                messages[part] = encoder.messages(layer, torch.from_numpy(here[part])).numpy()
            for start in range(0, items, batch):
                rows = np.arange(start, min(start + batch, items))
                sources, (block,) = builder.build(rows, 1)
                following[rows] = encoder.update_targets(
                    layer,
                    torch.from_numpy(here[rows]),
                    torch.from_numpy(messages[sources]),
                    adjacency(block),
                ).numpy()
                bar.update(len(rows))
            here, following = following, here
        vectors = _result(items, encoder.config.dim, output)
        for start in range(0, items, batch):
            part = slice(start, min(start + batch, items))
            vectors[part] = encoder.finish(
                torch.from_numpy(here[part]), torch.from_numpy(inputs[part])
            ).numpy()
    bar.close()
    return vectors


def _buffer(items: int, width: int, memory_items: int, path: Path) -> NDArray[np.float32]:
    if items <= memory_items:
        return np.empty((items, width), np.float32)
    return np.memmap(path, np.float32, "w+", shape=(items, width))


def _result(items: int, dim: int, output: Path | None) -> NDArray[np.float32]:
    if output is None:
        return np.empty((items, dim), np.float32)
    mapped: NDArray[np.float32] = np.lib.format.open_memmap(output, "w+", np.float32, (items, dim))
    return mapped
