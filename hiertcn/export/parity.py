"""Proof that an exported file computes what the torch module does: a gate, not only a test.

Runs both on the same random inputs at several shapes, the smallest ones included, because
exporters have shipped recurrent cells that were silently wrong and axes that were silently
constant. What it does not prove: equality on another runtime or device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.export.session import open_session

TOLERANCE: Final = 1e-4
"""Largest accepted ``|onnx - torch| / max(1, |torch|)``: far above float32 noise of either, far
below any error that a wrong graph makes."""


@dataclass(frozen=True, kw_only=True)
class ParityProof:
    """What was compared.

    ``cases`` hold the shape of every input and the error of each run; ``max_abs_error`` is in the
    unit of the output, ``max_error`` relative to outputs larger than 1.
    """

    model: str
    max_abs_error: float
    max_error: float
    tolerance: float
    cases: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {**vars(self), "cases": list(self.cases)}


def prove_parity(
    module: nn.Module,
    path: Path,
    cases: Sequence[Sequence[Tensor]],
    *,
    tolerance: float = TOLERANCE,
) -> ParityProof:
    """Compare ``module`` with the ONNX file at ``path`` on every case.

    Args:
        module: the exported module, one tensor as output.
        path: what ``export_model`` wrote.
        cases: input tensors of each run, in the module's order; at least one.
        tolerance: largest accepted error, relative to outputs larger than 1.

    Raises:
        InputError: an output differs by more than ``tolerance`` or in shape, is not finite, or
            the file does not run, naming the shapes.
    """
    if not cases:
        raise InputError(f"no cases were given to prove {path}; expected at least one")
    session = open_session(path)
    names = [entry.name for entry in session.get_inputs()]
    module.eval()
    results = []
    for tensors in cases:
        shapes = {name: list(one.shape) for name, one in zip(names, tensors, strict=True)}
        with torch.inference_mode():
            expected = module(*tensors).numpy()
        got = _run(session, path, dict(zip(names, tensors, strict=True)), shapes)
        if got.shape != expected.shape:
            raise InputError(
                f"{path} returns shape {list(got.shape)} for {shapes}; torch returns "
                f"{list(expected.shape)}: export again with the pinned onnxscript"
            )
        difference = np.abs(got - expected)
        error = float((difference / np.maximum(1.0, np.abs(expected))).max(initial=0.0))
        if not error <= tolerance:
            raise InputError(
                f"{path} differs from torch by {error:.3g} for {shapes}; expected at most "
                f"{tolerance:g}: export again with the pinned onnxscript, and look for NaN weights"
            )
        results.append((shapes, float(difference.max(initial=0.0)), error))
    return ParityProof(
        model=path.parent.name,
        max_abs_error=max(absolute for _, absolute, _ in results),
        max_error=max(error for _, _, error in results),
        tolerance=tolerance,
        cases=tuple(
            {"shapes": shapes, "max_abs_error": absolute, "max_error": error}
            for shapes, absolute, error in results
        ),
    )


def _run(
    session: ort.InferenceSession, path: Path, tensors: dict[str, Tensor], shapes: dict[str, Any]
) -> NDArray[Any]:
    try:
        outputs = session.run(None, {name: one.numpy() for name, one in tensors.items()})
    except Exception as error:
        # onnxruntime raises a dozen unrelated classes.
        raise InputError(f"{path} does not run for {shapes}: {error}") from error
    first: NDArray[Any] = outputs[0]
    return first
