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
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from hiertcn.errors import InputError
from hiertcn.sessions.request_features import CONTEXT, FEATURES

TERMS_FILE: Final = "scoring_terms.safetensors"
NAMES: Final = "terms"
"""Key of the features' names in the file's header, a JSON list."""

_SESSION_ITEMS: Final = "session_items"
_SESSION_PLACE: Final = FEATURES.index(_SESSION_ITEMS)
_RECOVERY: Final = "export the model again, or publish the parts of one run"


@dataclass(frozen=True)
class Mixture:
    """The gate's values at one request, or at ``n``: every value then has a first axis of ``n``.

    Attributes:
        shares: float32 ``[features]``, ``exp(w_k)`` of each of
            ``hiertcn.sessions.request_features.FEATURES``; 0 for those that are no terms, and for
            the running session's items.
        session: ``d``, 0 if the running session's items are no term.
        dot: ``a``, above 0.
        log: ``b``, above 0.
    """

    shares: NDArray[np.float32]
    session: Any
    dot: Any
    log: Any

    def scores(
        self, dots: NDArray[np.float32], features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Scores ``[n]`` of items with dot products ``[n]`` and all ``features [features, n]``."""
        scores: NDArray[np.float32] = self.dot * dots + self.log * np.log1p(self.shares @ features)
        scores += self.session * features[_SESSION_PLACE]
        return scores


@dataclass(frozen=True, kw_only=True)
class TermGate:
    """The learned part of the terms.

    Attributes:
        names: the terms, in the order of ``hiertcn.sessions.request_features.FEATURES``.
        weight: float32 ``[features + 2, context]``, zeros for features that are no terms.
        bias: float32 ``[features + 2]``.
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
        places = [FEATURES.index(name) for name in names]
        places += [len(FEATURES), len(FEATURES) + 1]
        weight = np.zeros((len(FEATURES) + 2, len(CONTEXT)), np.float32)
        bias = np.zeros(len(FEATURES) + 2, np.float32)
        weight[places], bias[places] = tensors["weight"], tensors["bias"]
        return cls(names=names, weight=weight, bias=bias)

    def at(self, context: NDArray[np.float32]) -> Mixture:
        """The gate's values for a request's context, float32 ``[context]``, or ``[n, context]``."""
        values = context @ self.weight.T
        values += self.bias
        grown = np.exp(values)
        return Mixture(
            shares=grown[..., :-2] * self._is_share,
            session=values[..., _SESSION_PLACE],
            dot=grown[..., -2],
            log=grown[..., -1],
        )

    @cached_property
    def _is_share(self) -> NDArray[np.float32]:
        return np.array(
            [name in self.names and name != _SESSION_ITEMS for name in FEATURES], np.float32
        )
