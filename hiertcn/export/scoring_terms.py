"""Export a model's scoring terms for ``term_gate.py``, and prove that they compute the same."""

import json
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from hiertcn.errors import InputError
from hiertcn.export.term_gate import NAMES, TermGate
from hiertcn.sessions.request_features import CONTEXT, FEATURES

_CASES: Final = 64
_ITEMS: Final = 5
_TOLERANCE: Final = 1e-4


def export_terms(terms: nn.Module, path: Path, *, seed: int = 0) -> float:
    """Write a model's terms to ``path`` and prove them; return the largest error against torch.

    Args:
        terms: ``models.scoring_terms.ScoringTerms``.
        path: the file to write.
        seed: of the random inputs that the proof uses.

    Raises:
        InputError: the file does not compute what torch does.
    """
    state = terms.state_dict()
    names = tuple(getattr(terms, "names", ()))
    tensors = {name: state[f"gate.{name}"].detach().cpu().numpy() for name in ("weight", "bias")}
    save_file(tensors, path, {NAMES: json.dumps(names)})
    gate = TermGate.open(path)
    generator = np.random.default_rng(seed)
    dots = generator.normal(size=(_CASES, _ITEMS)).astype(np.float32)
    context = generator.random((_CASES, len(CONTEXT))).astype(np.float32)
    features = generator.exponential(size=(len(FEATURES), _CASES, _ITEMS)).astype(np.float32)
    own = features[[FEATURES.index(name) for name in names]]
    with torch.inference_mode():
        expected = terms(*map(torch.from_numpy, (dots, context, own))).numpy()
    got = [gate.at(context[n]).scores(dots[n], features[:, n]) for n in range(_CASES)]
    error = np.abs(np.stack(got) - expected) / np.maximum(1.0, np.abs(expected))
    largest = float(error.max(initial=0.0))
    if not largest <= _TOLERANCE:
        raise InputError(
            f"{path} differs from torch by {largest:.3g}; expected at most {_TOLERANCE:g}: look "
            "for NaN among the model's scoring terms"
        )
    return largest
