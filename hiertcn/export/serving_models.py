"""Export the two models of a release and prove them: the pipeline's ``export_onnx`` step.

tcn/model.onnx       (session_items, session_length, user_state) -> user_embedding
gru_step/model.onnx  (state, session_mean) -> next_state
start_state.npy      float32 [layers, hidden], the state before a user's first session
scoring_terms.safetensors  the gate of the scoring terms, where the model has them
parity.json          largest errors against torch, by model and input shape
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.export.onnx import export_model
from hiertcn.export.parity import ParityProof, prove_parity
from hiertcn.export.scoring_terms import export_terms
from hiertcn.export.tensors import GRU_STEP, INPUTS, OUTPUTS, SESSION_ITEMS, TCN
from hiertcn.export.term_gate import TERMS_FILE
from hiertcn.files import whole_directory, write_json

_log = logging.getLogger(__name__)

# The smallest shapes catch axes taken for constants, the largest is longer than the cone.
_TCN_SHAPES = ((1, 1), (1, 2), (2, 5), (3, 16), (5, 33), (2, 128))
_GRU_BATCHES = (1, 2, 7, 64)


def export_serving_models(
    tcn: nn.Module,
    gru_step: nn.Module,
    start_state: NDArray[np.float32],
    output: Path,
    *,
    item_dim: int,
    terms: nn.Module | None = None,
    seed: int = 0,
) -> dict[str, ParityProof]:
    """Write the folder above to ``output``, whole or not at all; return the proofs by model.

    Args:
        tcn: ``models.hiertcn_serving.TcnCone``.
        gru_step: ``models.hiertcn_serving.GruStep``.
        start_state: float32 ``[layers, hidden]``.
        output: folder to write.
        item_dim: width of an item vector.
        terms: ``models.scoring_terms.ScoringTerms`` of a model that has them.
        seed: of the random inputs that the proof uses.

    Raises:
        InputError: a model cannot be exported, or the file does not compute what torch does.
    """
    if start_state.ndim != 2 or start_state.dtype != np.float32:
        raise InputError(
            f"start_state is {start_state.dtype} {list(start_state.shape)}; expected float32 "
            "[layers, hidden]"
        )
    layers, hidden = start_state.shape
    generator = torch.Generator().manual_seed(seed)
    tcn_cases = [_tcn_case(b, n, item_dim, hidden, generator) for b, n in _TCN_SHAPES]
    gru_cases = [
        (
            torch.randn(batch, layers, hidden, generator=generator),
            torch.randn(batch, item_dim, generator=generator),
        )
        for batch in _GRU_BATCHES
    ]
    proofs = {}
    with whole_directory(output) as aside:
        for name, module, cases, example, axes in (
            (TCN, tcn, tcn_cases, tcn_cases[2], {SESSION_ITEMS.name: (1,)}),
            (GRU_STEP, gru_step, gru_cases, gru_cases[1], {}),
        ):
            path = aside / name / "model.onnx"
            _log.info("exporting %s", name)
            export_model(module, example, INPUTS[name], OUTPUTS[name], path, dynamic_axes=axes)
            proofs[name] = prove_parity(module, path, cases)
        np.save(aside / "start_state.npy", start_state)
        report = _report(proofs)
        if terms is not None:
            report["scoring_terms"] = {"max_error": export_terms(terms, aside / TERMS_FILE)}
        write_json(aside / "parity.json", report)
    _log.info(
        "wrote %s: largest error against torch %.2g",
        output,
        max(proof.max_error for proof in proofs.values()),
    )
    return proofs


def _tcn_case(
    batch: int, length: int, item_dim: int, hidden: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.randint(0, length + 1, (batch, 1), generator=generator, dtype=torch.int32)
    return (
        torch.randn(batch, length, item_dim, generator=generator),
        lengths,
        torch.randn(batch, hidden, generator=generator),
    )


def _report(proofs: dict[str, ParityProof]) -> dict[str, Any]:
    return {name: proof.to_dict() for name, proof in proofs.items()}
