"""The gate of the scoring terms in numpy, as a release serves it.

The score of an item is ``a x^T u + b log(1 + sum_k exp(w_k) f_k) + d s`` (models/scoring_terms.py):
``f_k`` are shares of the item, ``s`` is 1 for items of the running session, and ``w_k``, ``d``,
``log a`` and ``log b`` are linear in the request's context. Too little arithmetic to be worth a
call to Triton, so the release brings the numbers themselves:

    scoring_terms.safetensors    ``weight [terms + 2, context]``, ``bias [terms + 2]``; in its
                                 header the features' names

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

_SESSION_ITEMS: Final = "session_items"
_RECOVERY: Final = "export the model again, or publish the parts of one run"


@dataclass(frozen=True)
class Mixture:
    """The gate's values at one request.

    Attributes:
        shares: float32 ``[terms]``, ``exp(w_k)``; 0 for the running session's items.
        session: float32 ``[terms]``, ``d`` for the running session's items, 0 elsewhere.
        dot: ``a``, above 0.
        log: ``b``, above 0.
    """

    shares: NDArray[np.float32]
    session: NDArray[np.float32]
    dot: np.float32
    log: np.float32

    def scores(
        self, dots: NDArray[np.float32], features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Scores ``[n]`` of items with dot products ``[n]`` and features ``[terms, n]``."""
        scores: NDArray[np.float32] = self.dot * dots + self.log * np.log1p(self.shares @ features)
        return scores + self.session @ features


@dataclass(frozen=True, kw_only=True)
class TermGate:
    """The learned part of the terms.

    Attributes:
        names: the features, in the order of ``hiertcn.sessions.request_features.FEATURES``.
        weight: float32 ``[terms + 2, context]``.
        bias: float32 ``[terms + 2]``.
    """

    names: tuple[str, ...]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read what ``hiertcn.export.scoring_terms.export_terms`` wrote.

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
        expected = {"weight": [len(names) + 2, len(CONTEXT)], "bias": [len(names) + 2]}
        for name, shape in expected.items():
            found = tensors.get(name)
            if found is None or list(found.shape) != shape or not np.isfinite(found).all():
                what = "absent" if found is None else f"{list(found.shape)}, or not finite"
                raise InputError(
                    f"{path}: the tensor {name} is {what}; expected finite {shape} for the terms "
                    f"{', '.join(names)}: {_RECOVERY}"
                )
        return cls(
            names=names,
            weight=tensors["weight"].astype(np.float32),
            bias=tensors["bias"].astype(np.float32),
        )

    def at(self, context: NDArray[np.float32]) -> Mixture:
        """The gate's values for a request's context, float32 ``[context]``."""
        values = self.weight @ context + self.bias
        is_session = np.array([name == _SESSION_ITEMS for name in self.names])
        grown = np.exp(values)
        return Mixture(
            shares=np.where(is_session, np.float32(0), grown[:-2]),
            session=np.where(is_session, values[:-2], np.float32(0)),
            dot=grown[-2],
            log=grown[-1],
        )
