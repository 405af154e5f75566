"""What makes a resumed run the run that was interrupted: its identity, and seeds without a past."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from hiertcn.errors import InputError
from hiertcn.items.table import ItemTable
from hiertcn.sessions.split import Split
from hiertcn.sessions.store import SessionStore
from hiertcn.training.checkpoints import load_checkpoint
from hiertcn.training.options import TrainOptions

# A longer run may be asked for, and batches are the same however they are made.
_FREE_OPTIONS: Final = frozenset(
    {"max_steps", "max_epochs", "patience", "checkpoint_s", "prefetch"}
)


def run_identity(
    options: TrainOptions,
    model: dict[str, Any],
    store: SessionStore,
    table: ItemTable,
    split: Split,
) -> dict[str, Any]:
    """Return what must not differ between a checkpoint and the run that resumes from it."""
    fixed = {name: value for name, value in options.to_dict().items() if name not in _FREE_OPTIONS}
    return {
        "options": fixed,
        "model": model,
        "store": store.meta.to_dict(),
        "table": table.checksum,
        "split": split.to_dict(),
    }


def load_run(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint of the run with that identity: tensors, and the rest.

    Raises:
        InputError: it is another run's, or not a readable checkpoint.
    """
    tensors, meta = load_checkpoint(path)
    differing = [name for name, value in identity.items() if meta["identity"].get(name) != value]
    if differing:
        raise InputError(
            f"{path} belongs to a run with another {' and '.join(differing)}; delete it to "
            "train from the start, or repeat the interrupted call unchanged"
        )
    return tensors, meta


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return the seed of a step's dropout, of its own for every rank."""
    entropy = (seed, step, rank) if rank else (seed, step)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
