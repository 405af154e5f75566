"""The item vectors a session model reads and scores with: frozen, fine-tuned or learned.

Frozen vectors are inputs, gathered from the memory-mapped item table (the paper's production
setting). Trained ones are parameters that begin as the table's (fine-tuned) or at random (learned)
and are written as an item table at the end, so that serving and evaluation read both alike. With
one-hot items (the paper's XING setting, Eq. 17) inputs are learned too, and a second matrix scores
them: ``u`` is multiplied with ``outputs``, not with what the network read.

The table's last coordinate is a popularity prior. Fine-tuned rows train it with the rest; random
rows begin with it too, for a vector that starts with no idea of popularity wastes an epoch on it.
"""

import math
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hiertcn.errors import InputError
from hiertcn.items.gathering import gather_sessions
from hiertcn.items.table import ItemTable, TableDtype
from hiertcn.sessions.batches import SessionBatch

ITEM_TABLE_FOLDER: Final = "item_table"
OUTPUT_TABLE_FOLDER: Final = "output_table"

Rows = NDArray[np.integer[Any]] | Tensor


class ItemVectors(nn.Module):
    """What all kinds share; rows are the item table's.

    ``outputs`` are the vectors that ``u`` is multiplied with: the same ones, unless items are
    one-hot.
    """

    dim: int

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def outputs(self) -> "ItemVectors":
        """The vectors that score items."""
        return self

    @property
    def are_trained(self) -> bool:
        """Whether training changes them."""
        return any(True for _ in self.parameters())

    def gather(self, rows: Rows) -> Tensor:
        """Return the vectors of integer ``rows [...]``, float32 ``[..., dim]`` on the device.

        A negative row gives zeros.

        Raises:
            InputError: a row lies past the last one (checked for frozen vectors and on the CPU).
        """
        raise NotImplementedError

    def gather_sessions(self, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """Return the vectors of a batch's items, and the means of the sessions that close.

        Returns:
            float32 ``[n + extra, dim]``, and ``[pieces, dim]`` with zeros where none closes.
        """
        vectors = self.gather(batch.item_rows)

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(vectors.device)

        share = np.repeat(1.0 / batch.member_lengths, batch.member_lengths).astype(np.float32)
        members = vectors.index_select(0, tensor(batch.member_rows)) * tensor(share).unsqueeze(1)
        means = vectors.new_zeros(len(batch.lengths), self.dim)
        return vectors, means.index_add(0, tensor(batch.member_owner), members)

    def all(self) -> Tensor:
        """Return float32 ``[items, dim]`` on the device."""
        raise NotImplementedError


class FrozenVectors(ItemVectors):
    """An item table's vectors, without parameters.

    Args:
        table: gathered from on the CPU, row by row; never held whole before :meth:`all` asks.
        device: where the vectors go.
    """

    def __init__(self, table: ItemTable, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.table, self.device, self.dim = table, torch.device(device), table.dim
        self._all: Tensor | None = None

    def __len__(self) -> int:
        return len(self.table)

    def gather(self, rows: Rows) -> Tensor:
        """See :meth:`ItemVectors.gather`."""
        if isinstance(rows, Tensor):
            rows = rows.cpu().numpy()
        return torch.from_numpy(self.table.gather(rows)).to(self.device)

    def gather_sessions(self, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """See :meth:`ItemVectors.gather_sessions`; one pass over the table's rows."""
        vectors = np.empty((len(batch.item_rows), self.dim), np.float32)
        means = np.zeros((len(batch.lengths), self.dim), np.float32)
        bad = gather_sessions(
            self.table.vectors,
            batch.item_rows,
            batch.lengths,
            batch.closes,
            batch.member_lengths,
            vectors,
            means,
        )
        if bad >= 0:
            # A store never has negative rows; the table names one that lies past it.
            self.table.gather(batch.item_rows[bad])
        if self.device.type == "cpu":
            return torch.from_numpy(vectors), torch.from_numpy(means)
        return torch.from_numpy(vectors).to(self.device), torch.from_numpy(means).to(self.device)

    def all(self) -> Tensor:
        """Return all vectors; they stay in memory, 4 bytes a number."""
        if self._all is None:
            # What is first asked for while validating must still serve training.
            with torch.inference_mode(False):
                self._all = self.gather(np.arange(len(self.table)))
        return self._all


class TrainedVectors(ItemVectors):
    """Item vectors as parameters ``weight [items, dim]``, and ``output_weight`` where untied.

    Args:
        weight: float32 ``[items, dim]``, the start.
        output_weight: the start of a second matrix that scores items; None scores with the first.
        sparse: give sparse gradients, for an optimizer that touches only the rows of a batch.
    """

    def __init__(
        self, weight: Tensor, output_weight: Tensor | None = None, *, sparse: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.sparse = weight.shape[1], sparse
        self.weight = nn.Parameter(weight)
        self._outputs = None if output_weight is None else TrainedVectors(output_weight)
        if self._outputs is not None:
            self._outputs.sparse = sparse

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def outputs(self) -> ItemVectors:
        """The vectors that score items."""
        return self if self._outputs is None else self._outputs

    def gather(self, rows: Rows) -> Tensor:
        """See :meth:`ItemVectors.gather`."""
        if isinstance(rows, Tensor):
            rows = rows.to(torch.int64)
            unknown = bool((rows < 0).any())
        else:
            unknown = bool(rows.size and rows.min() < 0)
            rows = torch.from_numpy(rows.astype(np.int64, copy=False)).to(self.weight.device)
        if not unknown:
            return self._embed(rows)
        return self._embed(rows.clamp(min=0)) * (rows >= 0).unsqueeze(-1)

    def all(self) -> Tensor:
        """Return the parameter itself; its gradient through this is dense."""
        return self.weight

    def _embed(self, rows: Tensor) -> Tensor:
        try:
            return F.embedding(rows, self.weight, sparse=self.sparse)
        except IndexError:
            raise InputError(
                f"row {int(rows.max())} lies past the item vectors, which have rows 0 to "
                f"{len(self) - 1}; use the index and the vectors of one release"
            ) from None


def as_vectors(table: "ItemTable | ItemVectors", device: torch.device | str = "cpu") -> ItemVectors:
    """Return vectors as they are, and a table as frozen vectors on ``device``."""
    return FrozenVectors(table, device) if isinstance(table, ItemTable) else table


def start_vectors(
    kind: str, table: ItemTable, device: torch.device, *, seed: int, sparse: bool = False
) -> ItemVectors:
    """Return the vectors training starts from.

    Args:
        kind: ``frozen``, ``fine-tuned``, ``learned`` or ``one-hot``, see
            :class:`hiertcn.training.options.TrainOptions`.
        table: gives the number of items, the width, the prior and, but for random rows, the start.
        device: where they live.
        seed: of random rows.
        sparse: see :class:`TrainedVectors`.
    """
    if kind == "frozen":
        return FrozenVectors(table, device)
    given = torch.from_numpy(table.gather(np.arange(len(table))))
    if kind == "fine-tuned":
        return TrainedVectors(given, sparse=sparse).to(device)
    generator = torch.Generator().manual_seed(seed)
    return TrainedVectors(
        _random_rows(given, generator),
        _random_rows(given, generator) if kind == "one-hot" else None,
        sparse=sparse,
    ).to(device)


def save_vectors(vectors: ItemVectors, directory: Path, dtype: TableDtype) -> None:
    """Write trained vectors as item tables below ``directory``; nothing for frozen ones."""
    for name, part in _tables(vectors).items():
        ItemTable.write(directory / name, part.detach().cpu().numpy(), dtype)


def load_vectors(vectors: ItemVectors, directory: Path) -> None:
    """Put back what :func:`save_vectors` wrote, if it wrote any; later items keep their start.

    Raises:
        InputError: the written vectors have another width or more rows.
    """
    for name, part in _tables(vectors).items():
        if not (directory / name).exists():
            continue
        table = ItemTable.open(directory / name)
        if table.dim != part.shape[1] or len(table) > len(part):
            raise InputError(
                f"the item vectors {table.directory} have the shape {list(table.vectors.shape)}; "
                f"expected width {part.shape[1]} and at most {len(part)} items"
            )
        with torch.no_grad():
            part[: len(table)] = torch.from_numpy(table.gather(np.arange(len(table)))).to(part)


def restore_unlearnt(vectors: ItemVectors, table: ItemTable, learnt: NDArray[np.bool_]) -> None:
    """Give fine-tuned rows that no interaction has taught their start again.

    Such an item was only ever a negative: it has learnt that nobody wants it, and not what it is.

    Args:
        vectors: trained from ``table``.
        table: the start.
        learnt: bool ``[items]``, which items were interacted with in training.
    """
    rows = np.flatnonzero(~learnt)
    for part in _tables(vectors).values():
        with torch.no_grad():
            part[torch.from_numpy(rows)] = torch.from_numpy(table.gather(rows)).to(part)


def table_dtype(table: ItemTable) -> TableDtype:
    """Return the dtype a table is stored in."""
    return cast(TableDtype, table.vectors.dtype.name)


def _tables(vectors: ItemVectors) -> dict[str, nn.Parameter]:
    if not isinstance(vectors, TrainedVectors):
        return {}
    tables = {ITEM_TABLE_FOLDER: vectors.weight}
    if isinstance(vectors.outputs, TrainedVectors) and vectors.outputs is not vectors:
        tables[OUTPUT_TABLE_FOLDER] = vectors.outputs.weight
    return tables


def _random_rows(given: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows of about unit length that end in the given prior."""
    rows = torch.randn(given.shape, generator=generator).div_(math.sqrt(given.shape[1]))
    rows[:, -1] = given[:, -1]
    return rows
