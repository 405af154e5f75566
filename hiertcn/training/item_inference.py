"""Embed every item, one layer after the other, so each item is computed once per layer.

A minibatch of ``b`` items with ``top`` neighbors computes up to ``b * top ** layers`` inputs; here
the whole catalog costs ``items * layers``. Results between layers lie in memory up to
``memory_items`` items and in temporary memory-mapped files beyond, so memory is bounded by
``batch``. Results are the minibatch encoder's up to float rounding.

Several processes share the work (``ranks``): each computes a range of rows of every layer into
files that all of them map, and waits for the others before the next layer reads them. Batches are
the same however many processes there are, and so are the results, to the bit. The files lie beside
the output, so on several machines that must be a file system where a process sees what another has
flushed before it opened a file, as NFS does.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.graph.blocks import BlockBuilder
from hiertcn.graph.walks import NO_ITEM, Neighborhoods
from hiertcn.training.distributed import Ranks
from hiertcn.training.item_batches import (
    ItemEncoder,
    ItemFeatures,
    adjacency,
    feature_tensors,
    sparse_rows,
)

_DEFAULT_BATCH: Final = 8192
_VECTORS: Final = "vectors.npy"


@torch.no_grad()
def embed_items(
    encoder: ItemEncoder,
    features: ItemFeatures | None,
    neighborhoods: Neighborhoods,
    batch: int = _DEFAULT_BATCH,
    *,
    output: Path | None = None,
    layer_inputs: NDArray[np.float32] | None = None,
    memory_items: int = 1_000_000,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> NDArray[np.float32]:
    """Return the vectors of all items, float32 [items, dim], each of length 1.

    Args:
        encoder: trained encoder; left in inference mode.
        features: of all items, or None if they have none.
        neighborhoods: of all items.
        batch: items computed at a time.
        output: a .npy file to write the vectors into, whole or not at all (then they are returned
            memory-mapped); without it they are returned in memory.
        layer_inputs: float32 [items, layers * hidden] to fill with what goes into each layer for
            each item, which is what an item that comes later needs of its neighbors
            (models/item_encoder_serving.py). Each of several processes fills its own rows.
        memory_items: more items than these go through temporary files beside ``output``.
        ranks: the processes that share the work; all of them call this alike, with an ``output``
            that is the same file for all. Without it this process works alone.
        progress: show a progress bar.

    Raises:
        InputError: several processes are given no output, or the features of an item hold NaN or
            an infinity.
    """
    ranks = ranks or Ranks()
    items, hidden = len(neighborhoods), encoder.config.hidden
    encoder.eval()
    parts = [slice(at, min(at + batch, items)) for at in range(0, items, batch)]
    first, end = (len(parts) * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    own = parts[first:end]
    bar = tqdm(
        total=sum(part.stop - part.start for part in own) * (encoder.layers + 1),
        desc="embed items",
        unit="item",
        mininterval=2,
        disable=not (progress and ranks.is_first) or None,
    )
    with bar, _scratch(output, ranks) as scratch:
        arrays = _Arrays(scratch, ranks, in_memory=ranks.world_size == 1 and items <= memory_items)
        inputs = arrays.make("inputs", items, hidden)
        here, following = inputs, arrays.make("layer-0", items, hidden)
        messages = arrays.make("messages", items, hidden)
        spare = arrays.make("layer-1", items, hidden)
        for part in own:
            rows = np.arange(part.start, part.stop)
            given, present = feature_tensors(features, rows)
            _refuse_not_finite(given, part.start)
            inputs[part] = encoder.embed_inputs(torch.from_numpy(rows), given, present).numpy()
            bar.update(len(rows))
        for layer in range(encoder.layers):
            for part in own:
                if layer_inputs is not None:
                    layer_inputs[part, layer * hidden : (layer + 1) * hidden] = here[part]
                messages[part] = encoder.messages(layer, torch.from_numpy(here[part])).numpy()
            messages = arrays.exchange("messages", messages)
            sources = torch.from_numpy(messages)
            for part in own:
                edges = sparse_rows(*_edges(neighborhoods, part), items)
                following[part] = encoder.update_targets(
                    layer, torch.from_numpy(here[part]), sources, edges
                ).numpy()
                bar.update(part.stop - part.start)
            # Nobody may write the next layer's messages while another still reads these.
            ranks.barrier()
            here, following = following, spare if here is inputs else here
        vectors = arrays.make_result(items, encoder.config.dim, output)
        for part in own:
            vectors[part] = encoder.finish(
                torch.from_numpy(here[part]), torch.from_numpy(inputs[part])
            ).numpy()
        if output is None:
            return vectors
        _flush(vectors)
        ranks.barrier()
        if ranks.is_first:
            (scratch / _VECTORS).replace(output)
    mapped: NDArray[np.float32] = np.load(output, mmap_mode="r", allow_pickle=False)
    return mapped


@torch.no_grad()
def embed_some(
    encoder: ItemEncoder,
    features: ItemFeatures | None,
    neighborhoods: Neighborhoods,
    rows: NDArray[np.int64],
    batch: int = 512,
) -> NDArray[np.float32]:
    """Return the vectors of a few items, float32 [rows, dim], computed in minibatches.

    Costs up to ``top ** layers`` inputs an item, so :func:`embed_items` is the cheaper way to more
    than a fraction of the items.

    Args:
        encoder: trained encoder; left in inference mode.
        features: of all items, or None if they have none.
        neighborhoods: of all items.
        rows: distinct item rows, int64.
        batch: items computed at a time.
    """
    encoder.eval()
    builder = BlockBuilder(neighborhoods)
    vectors = np.empty((len(rows), encoder.config.dim), np.float32)
    for start in range(0, len(rows), batch):
        targets = rows[start : start + batch]
        sources, blocks = builder.build(targets, encoder.layers)
        given, present = feature_tensors(features, sources)
        vectors[start : start + batch] = encoder(
            torch.from_numpy(sources), given, present, [adjacency(block) for block in blocks]
        ).numpy()
    return vectors


class _Arrays:
    """Arrays ``[items, width]`` in memory, or in files that several processes map."""

    def __init__(self, folder: Path, ranks: Ranks, *, in_memory: bool) -> None:
        self._folder, self._ranks, self._in_memory = folder, ranks, in_memory

    def make(self, name: str, items: int, width: int) -> NDArray[np.float32]:
        """Return an array for the own rows; those of others are seen after :meth:`exchange`."""
        if self._in_memory or not items:
            return np.empty((items, width), np.float32)
        path = self._folder / f"{name}.npy"
        return self._shared(path, items, width)

    def make_result(self, items: int, dim: int, output: Path | None) -> NDArray[np.float32]:
        """Return the array of the vectors."""
        if output is None:
            return np.empty((items, dim), np.float32)
        return self._shared(self._folder / _VECTORS, items, dim)

    def exchange(self, name: str, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """Wait until every process has written its rows; return the array with all of them."""
        if self._ranks.world_size == 1 or not isinstance(array, np.memmap):
            return array
        _flush(array)
        self._ranks.barrier()
        return _mapped(self._folder / f"{name}.npy")

    def _shared(self, path: Path, items: int, width: int) -> NDArray[np.float32]:
        if self._ranks.is_first:
            np.lib.format.open_memmap(path, "w+", np.float32, (items, width))
        self._ranks.barrier()
        return _mapped(path)


@contextmanager
def _scratch(output: Path | None, ranks: Ranks) -> Iterator[Path]:
    """Yield a folder for temporary files, the same one for all processes."""
    if ranks.world_size == 1:
        parent = None if output is None else output.parent
        with tempfile.TemporaryDirectory(prefix=".layers-", dir=parent) as folder:
            yield Path(folder)
        return
    if output is None:
        raise InputError(
            f"{ranks.world_size} processes are to embed the items, and output is not given; give "
            "all of them the same file"
        )
    shared = output.with_name(f".layers-{output.name}")
    if ranks.is_first:
        # A run that was killed may have left one.
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir(parents=True)
    ranks.barrier()
    yield shared
    ranks.barrier()
    if ranks.is_first:
        shutil.rmtree(shared)


def _mapped(path: Path) -> NDArray[np.float32]:
    array: NDArray[np.float32] = np.load(path, mmap_mode="r+", allow_pickle=False)
    return array


def _flush(array: NDArray[np.float32]) -> None:
    if isinstance(array, np.memmap):
        array.flush()


def _edges(
    neighborhoods: Neighborhoods, part: slice
) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.float32]]:
    """Return the neighborhoods of some items as indptr, item rows and weights."""
    rows = neighborhoods.rows[part]
    real = rows != NO_ITEM
    indptr = np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int64)
    return indptr, rows[real].astype(np.int64), neighborhoods.weights[part][real]


def _refuse_not_finite(features: torch.Tensor, first_row: int) -> None:
    bad = ~torch.isfinite(features).all(dim=1)
    if bad.any():
        raise InputError(
            f"the features of item row {first_row + int(bad.int().argmax())} are not all finite; "
            "mark the item as missing or repair its features"
        )
