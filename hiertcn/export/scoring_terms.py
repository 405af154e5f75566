"""The gate of the scoring terms in numpy, as a release serves it.

Training leaves in the folder of a model whose configuration names terms:

    config.json                  ``terms``, the features' names
    scoring_terms.safetensors    ``weight [terms, dim + context]``, ``bias``, ``log_scale [terms]``
    transitions/                 the table the memory features are read from

The score of an item is ``x^T u + sum_k w_k log(1 + a_k f_k)`` with ``w = W [u; c] + b`` and
``a = exp(log_scale)`` (models/scoring_terms.py). A folder without named terms has none of this,
and its model scores dot products.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hiertcn.errors import InputError
from hiertcn.files import read_json
from hiertcn.sessions.request_features import CONTEXT, FEATURES

TERMS_FILE: Final = "scoring_terms.safetensors"
TRANSITIONS_FOLDER: Final = "transitions"
_CONFIG_FILE: Final = "config.json"
_RECOVERY: Final = "train the model again, or publish the parts of one run"


@dataclass(frozen=True, kw_only=True)
class TermGate:
    """Weights and scales of the terms.

    Attributes:
        names: the features, in the order of ``hiertcn.sessions.request_features.FEATURES``.
        weight: float32 ``[terms, dim + context]``.
        bias: float32 ``[terms]``.
        scale: float32 ``[terms]``, above 0.
    """

    names: tuple[str, ...]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    scale: NDArray[np.float32]

    @classmethod
    def open(cls, model: Path, dim: int) -> Self | None:
        """Read a model's gate, None if it has no terms.

        Args:
            model: the model's folder.
            dim: length of an item vector.

        Raises:
            InputError: the terms are unknown or out of order, or the file does not fit them.
        """
        names = term_names(model)
        if not names:
            return None
        path = model / TERMS_FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read ({error}) although {_CONFIG_FILE} names scoring terms; "
                f"{_RECOVERY}"
            ) from None
        expected = {
            "weight": [len(names), dim + len(CONTEXT)],
            "bias": [len(names)],
            "log_scale": [len(names)],
        }
        for name, shape in expected.items():
            found = tensors.get(name)
            if found is None or list(found.shape) != shape or not np.isfinite(found).all():
                what = "absent" if found is None else f"{list(found.shape)}, or not finite"
                raise InputError(
                    f"{path}: the tensor {name} is {what}; expected finite {shape} for the terms "
                    f"{', '.join(names)} of items with {dim} numbers: {_RECOVERY}"
                )
        return cls(
            names=names,
            weight=tensors["weight"].astype(np.float32),
            bias=tensors["bias"].astype(np.float32),
            scale=np.exp(tensors["log_scale"].astype(np.float32)),
        )

    def weights(self, u: NDArray[np.float32], context: NDArray[np.float32]) -> NDArray[np.float32]:
        """The terms' weights ``[terms]`` for a user embedding ``[dim]`` and a ``[context]``."""
        dim = len(u)
        weights: NDArray[np.float32] = (
            self.weight[:, :dim] @ u + self.weight[:, dim:] @ context + self.bias
        )
        return weights


def term_names(model: Path) -> tuple[str, ...]:
    """The scoring terms that a model's configuration names; none for a folder without one.

    Raises:
        InputError: they are not features, or in another order.
    """
    path = model / _CONFIG_FILE
    if not path.is_file():
        return ()
    config: Any = read_json(path)
    names = tuple(config.get("terms", ())) if isinstance(config, dict) else ()
    if list(names) != [name for name in FEATURES if name in names]:
        raise InputError(
            f"{path} names the scoring terms {list(names)}; expected some of "
            f"{', '.join(FEATURES)}, in this order: {_RECOVERY}"
        )
    return names
