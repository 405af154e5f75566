"""Torch modules to ONNX files that any runtime can serve.

Uses torch's dynamo exporter with the weights inside the file, so that a model is one file to
publish and to check. Costs a few seconds a model, most of it torch's tracing. Does not prove that
the file computes the same: ``hiertcn.export.parity`` does, and nothing may be published without.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.export.tensors import TensorSpec
from hiertcn.files import whole_file

OPSET: Final = 20
"""What onnxruntime 1.18 and every later one runs, so also the Triton images since mid-2024."""

_BATCH_AXIS: Final = 0
_TORCH_TYPES: Final = {"FP32": torch.float32, "INT32": torch.int32, "INT64": torch.int64}


def export_model(
    module: nn.Module,
    example_inputs: Sequence[Tensor],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    path: Path,
    *,
    dynamic_axes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Export ``module`` in evaluation mode to ``path``, whole or not at all.

    Args:
        module: takes the tensors of ``inputs`` in order, returns the one of ``outputs`` (or a
            tuple of them).
        example_inputs: one tensor per input, every dynamic axis longer than 1 (the exporter
            would take 0 and 1 for constants).
        inputs: names and types of the inputs.
        outputs: names of the outputs.
        path: the ``.onnx`` file.
        dynamic_axes: further axes, by input name and counted from 0 with the batch, whose size
            the request chooses; the batch axis of every input always is one of them.

    Raises:
        InputError: an example does not fit its spec, or the module cannot be exported.
    """
    chosen = dynamic_axes or {}
    for spec, example in zip(inputs, example_inputs, strict=True):
        _check_example(spec, example, chosen.get(spec.name, ()))
    shapes = tuple(
        dict.fromkeys((_BATCH_AXIS, *chosen.get(spec.name, ())), torch.export.Dim.DYNAMIC)
        for spec in inputs
    )
    with whole_file(path) as aside, warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        # Torch and onnxscript warn of their own deprecations here.
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module.eval(),
                tuple(example_inputs),
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise InputError(
                f"{type(module).__name__} cannot be exported to {path}: {error}"
            ) from error
        assert program is not None
        program.save(aside, external_data=False)


def _check_example(spec: TensorSpec, example: Tensor, axes: Sequence[int]) -> None:
    expected = _TORCH_TYPES[spec.datatype]
    if example.dtype != expected or example.dim() != 1 + len(spec.dims):
        raise InputError(
            f"the example of {spec.name} is {example.dtype} {list(example.shape)}; expected "
            f"{expected} with {1 + len(spec.dims)} axes, the batch first"
        )
    short = [axis for axis in (_BATCH_AXIS, *axes) if example.shape[axis] < 2]
    if short:
        raise InputError(
            f"the example of {spec.name} has shape {list(example.shape)}; expected its dynamic "
            f"axes {short} to be longer than 1, or the exporter takes them for constants"
        )


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    # The exporter reports each absent optional package as a warning.
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
