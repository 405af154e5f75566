"""Weights and training checkpoints on disk: safetensors and JSON, never pickle.

A checkpoint is one file, so it is whole or absent: tensors by name, and a JSON text in the
safetensors header for everything else. What it must hold for a resumed run to end in the same
bits is the loop's business; this module restores exactly what it was given.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.files import whole_file

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
CHECKPOINT_FILE: Final = "checkpoint.safetensors"

_FORMAT: Final = "hiertcn checkpoint 1"


class HasWeights(Protocol):
    """A module, or what a library protocol knows of one."""

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors with their names."""


def save_weights(module: HasWeights, path: Path) -> None:
    """Write the module's state dict as safetensors, whole or not at all."""
    _save(path, module.state_dict(), {"format": "pt"})


def load_weights(module: nn.Module, path: Path, *, without: str = "") -> None:
    """Load weights that :func:`save_weights` wrote, strictly: same names, same shapes.

    Args:
        module: to load into.
        path: the file.
        without: name of a part of the module that keeps its weights, whatever the file has of it;
            empty for none.

    Raises:
        InputError: the file is missing or damaged, or its tensors do not fit the module.
    """

    def is_wanted(name: str) -> bool:
        return not (without and name.startswith(f"{without}."))

    state = {name: value for name, value in module.state_dict().items() if is_wanted(name)}
    tensors = {name: value for name, value in read_tensors(path).items() if is_wanted(name)}
    own = {name: tuple(value.shape) for name, value in state.items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if own != given:
        name = sorted(set(own.items()) ^ set(given.items()))[0][0]
        raise InputError(
            f"{path} does not fit the model: tensor {name} is {given.get(name, 'absent')}, "
            f"expected {own.get(name, 'no such tensor')}; load it with its own configuration"
        )
    module.load_state_dict(tensors, strict=not without)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors that :func:`save_weights` wrote, on the CPU.

    Raises:
        InputError: the file is missing or damaged.
    """
    return _load(path)[0]


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write named tensors (any device) and JSON-ready ``meta`` as one file, atomically."""
    _save(path, tensors, {"format": _FORMAT, "meta": json.dumps(meta)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote; tensors on the CPU.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint.
    """
    tensors, header = _load(path)
    if header.get("format") != _FORMAT:
        raise InputError(
            f"{path} is not a training checkpoint (format {header.get('format')!r}, expected "
            f"{_FORMAT!r}); delete it to train from the start"
        )
    return tensors, json.loads(header["meta"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter state as flat, named tensors."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` returned; groups keep their current settings."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        # SparseAdam counts its steps with an int; a tensor in its place would cost it bits.
        counts = value.dim() == 0 and value.dtype == torch.int64
        state.setdefault(int(index), {})[name] = int(value) if counts else value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a prefix before each name."""
    return {prefix + name: value for name, value in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have the prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _save(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    # safetensors refuses tensors that share memory or are not contiguous.
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with whole_file(path) as aside:
        save_file(own, aside, metadata=header)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected model weights there") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({error}); restore or retrain it"
        ) from None
