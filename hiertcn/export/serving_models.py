"""Export the models of a release and prove them: the pipeline's ``export_onnx`` step.

tcn/model.onnx       (session_items, session_length, user_state) -> user_embedding
gru_step/model.onnx  (state, session_mean) -> next_state
item_encoder/model.onnx  (features, features_present, neighbor_layers, neighbor_weights)
                     -> item_embedding
start_state.npy      float32 [layers, hidden], the state before a user's first session
scoring_terms.safetensors  the gate of the scoring terms, where the model has them
parity.json          largest errors against torch, by model and input shape; ``int8`` where a
                     quantized TCN was asked for
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.export.int8 import quantize_tcn
from hiertcn.export.onnx import export_model
from hiertcn.export.open_sessions import OpenSessions
from hiertcn.export.parity import ParityProof, prove_parity
from hiertcn.export.scoring_terms import export_terms
from hiertcn.export.tensors import (
    GRU_STEP,
    INPUTS,
    ITEM_ENCODER,
    NEIGHBOR_LAYERS,
    NEIGHBOR_WEIGHTS,
    OUTPUTS,
    SESSION_ITEMS,
    TCN,
)
from hiertcn.export.term_gate import TERMS_FILE
from hiertcn.files import whole_directory, write_json
from hiertcn.items.table import ItemTable

_log = logging.getLogger(__name__)

# The smallest shapes catch axes taken for constants, the largest is longer than the cone.
_Case = tuple[Tensor, ...]
_Export = tuple[str, nn.Module, Sequence[_Case], _Case, Mapping[str, Sequence[int]]]

_TCN_SHAPES = ((1, 1), (1, 2), (2, 5), (3, 16), (5, 33), (2, 128))
_GRU_BATCHES = (1, 2, 7, 64)
_ITEM_SHAPES = ((1, 1), (2, 3), (5, 1), (1, 10), (64, 20))


def export_serving_models(
    tcn: nn.Module,
    gru_step: nn.Module,
    start_state: NDArray[np.float32],
    output: Path,
    *,
    item_dim: int,
    terms: nn.Module | None = None,
    item_encoder: nn.Module | None = None,
    int8: tuple[OpenSessions, ItemTable] | None = None,
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
        item_encoder: ``models.item_encoder_serving.NewItemEncoder``, which embeds items that come
            after the release.
        int8: sessions to quantize the TCN on if it then ranks the item table as before; None
            leaves it float32.
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
    tcn_cases: list[_Case] = [_tcn_case(b, n, item_dim, hidden, generator) for b, n in _TCN_SHAPES]
    gru_cases: list[_Case] = [
        (
            torch.randn(batch, layers, hidden, generator=generator),
            torch.randn(batch, item_dim, generator=generator),
        )
        for batch in _GRU_BATCHES
    ]
    exports: list[_Export] = [
        (TCN, tcn, tcn_cases, tcn_cases[2], {SESSION_ITEMS.name: (1,)}),
        (GRU_STEP, gru_step, gru_cases, gru_cases[1], {}),
    ]
    if item_encoder is not None:
        item_cases = [_item_case(item_encoder, b, t, generator) for b, t in _ITEM_SHAPES]
        neighbors = {NEIGHBOR_LAYERS.name: (1,), NEIGHBOR_WEIGHTS.name: (1,)}
        exports.append((ITEM_ENCODER, item_encoder, item_cases, item_cases[1], neighbors))
    proofs = {}
    with whole_directory(output) as aside:
        for name, module, cases, example, axes in exports:
            path = aside / name / "model.onnx"
            _log.info("exporting %s", name)
            export_model(module, example, INPUTS[name], OUTPUTS[name], path, dynamic_axes=axes)
            proofs[name] = prove_parity(module, path, cases)
        np.save(aside / "start_state.npy", start_state)
        report = _report(proofs)
        if int8 is not None:
            # After the proof against torch, which int8 need not pass.
            proof = quantize_tcn(aside / TCN / "model.onnx", *int8)
            report["int8"] = proof.to_dict()
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
) -> _Case:
    lengths = torch.randint(0, length + 1, (batch, 1), generator=generator, dtype=torch.int32)
    return (
        torch.randn(batch, length, item_dim, generator=generator),
        lengths,
        torch.randn(batch, hidden, generator=generator),
    )


def _item_case(encoder: Any, batch: int, neighbors: int, generator: torch.Generator) -> _Case:
    """Items with and without features, with all, some, or no neighbors."""
    config = encoder.config
    present = torch.arange(batch) % 3 != 1
    features = torch.randn(batch, max(1, config.feature_dim), generator=generator)
    if not config.feature_dim:
        present, features = torch.zeros(batch, dtype=torch.bool), torch.zeros(batch, 1)
    counts = (torch.arange(batch) + neighbors) % (neighbors + 1)
    real = torch.arange(neighbors) < counts.unsqueeze(1)
    weights = torch.where(real, torch.rand(batch, neighbors, generator=generator) + 0.1, 0.0)
    return (
        features,
        present.to(torch.int32).unsqueeze(1),
        torch.randn(batch, neighbors, config.layers * config.hidden, generator=generator),
        weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9),
    )


def _report(proofs: dict[str, ParityProof]) -> dict[str, Any]:
    return {name: proof.to_dict() for name, proof in proofs.items()}
