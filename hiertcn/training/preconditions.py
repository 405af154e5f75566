"""What must hold before training starts, checked once and named where it does not."""

import os
from typing import Any

import numpy as np
import torch
from torch import nn

from hiertcn.errors import InputError
from hiertcn.items.table import ItemTable
from hiertcn.sessions.store import SessionStore

_ITEMS_PER_CHECK = 1 << 16


def check_table(table: ItemTable, store: SessionStore, model: nn.Module) -> None:
    """Refuse a table that does not fit the sessions or the model, reading it once.

    Raises:
        InputError: it is shorter than the item index, of another width than the model's items, or
            holds a NaN or infinite value; the row is named.
    """
    if len(table) < store.meta.items:
        raise InputError(
            f"the item table {table.directory} has {len(table)} rows but the sessions were cut "
            f"with an index of {store.meta.items} items; embed the items of the same index"
        )
    item_dim = model_config(model).get("item_dim")
    if item_dim != table.dim:
        raise InputError(
            f"the model expects items of width {item_dim} but the table {table.directory} has "
            f"{table.dim}; build the model with item_dim={table.dim}"
        )
    for first in range(0, len(table), _ITEMS_PER_CHECK):
        finite = np.isfinite(table.vectors[first : first + _ITEMS_PER_CHECK]).all(axis=1)
        if not finite.all():
            raise InputError(
                f"the item table {table.directory} has a NaN or infinite value in row "
                f"{first + int(np.argmin(finite))}; embed the items again"
            )


def check_event_types(store: SessionStore, model: nn.Module) -> None:
    """Refuse a model that reads other event types than the store numbers.

    Raises:
        InputError: they differ; both are named.
    """
    read = tuple(model_config(model).get("event_types", ()))
    if read and read != store.meta.event_types:
        raise InputError(
            f"the model reads the event types {list(read)} but the session store "
            f"{store.directory} has {list(store.meta.event_types)}; build the model with the "
            "store's"
        )


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return the model's configuration as JSON-ready values.

    Raises:
        InputError: the model has none.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise InputError(f"{type(model).__name__} has no config to save with its weights")
    return dict(config.to_dict())


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA where there is a device.

    Under torchrun each process has the CUDA device of its local rank.

    Raises:
        InputError: CUDA was asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("TrainOptions.device is cuda but no CUDA device is present; use cpu")
    if name == "cuda":
        return torch.device(name, int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)
