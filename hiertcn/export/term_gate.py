"""The gate of the scoring terms in numpy, as a release serves it.

The score of an item is ``x^T u + sum_k w_k log(1 + a_k f_k)`` with ``w = W [u; c] + b`` and
``a = exp(log_scale)`` (models/scoring_terms.py). Too little arithmetic to be worth a call to
Triton, so the release brings the numbers themselves:

    scoring_terms.safetensors    ``weight [terms, dim + context]``, ``bias``, ``log_scale [terms]``;
                                 the features' names in the header

A model without terms has no such file and scores dot products.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from hiertcn.errors import InputError
from hiertcn.sessions.request_features import CONTEXT, FEATURES

TERMS_FILE: Final = "scoring_terms.safetensors"

NAMES: Final = "terms"
"""Key of the features' names in the file's header, a JSON list."""
_RECOVERY: Final = "export the model again, or publish the parts of one run"


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
    def open(cls, path: Path, dim: int) -> Self:
        """Read what ``hiertcn.export.scoring_terms.export_terms`` wrote.

        Args:
            path: the file.
            dim: length of an item vector.

        Raises:
            InputError: the file is missing or damaged, its terms are unknown or out of order, or
                its tensors do not fit them.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                names = tuple(json.loads((file.metadata() or {}).get(NAMES, "[]")))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}); {_RECOVERY}") from None
        if not names or list(names) != [name for name in FEATURES if name in names]:
            raise InputError(
                f"{path} names the scoring terms {list(names)}; expected some of "
                f"{', '.join(FEATURES)}, in this order: {_RECOVERY}"
            )
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

    @property
    def dim(self) -> int:
        """Length of the user embedding."""
        return int(self.weight.shape[1]) - len(CONTEXT)

    def weights(self, u: NDArray[np.float32], context: NDArray[np.float32]) -> NDArray[np.float32]:
        """The terms' weights ``[terms]`` for a user embedding ``[dim]`` and a ``[context]``."""
        weights: NDArray[np.float32] = (
            self.weight[:, : self.dim] @ u + self.weight[:, self.dim :] @ context + self.bias
        )
        return weights
