"""The exported gate computes what torch does, and a file that does not fit is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hiertcn.errors import InputError
from hiertcn.export.scoring_terms import export_terms
from hiertcn.export.term_gate import TermGate
from hiertcn.sessions.request_features import CONTEXT, FEATURES
from models.scoring_terms import ScoringTerms


def _terms(names: tuple[str, ...], seed: int = 0) -> ScoringTerms:
    torch.manual_seed(seed)
    terms = ScoringTerms(names)
    torch.nn.init.normal_(terms.gate.weight)
    return terms


@pytest.mark.parametrize(
    "names", [FEATURES, ("past_items",), ("session_items",), ("own_transitions", "live_1h")]
)
def test_the_gate_mixes_as_torch_does(tmp_path: Path, names: tuple[str, ...]) -> None:
    terms = _terms(names)
    assert export_terms(terms, tmp_path / "terms") < 1e-5
    gate = TermGate.open(tmp_path / "terms")
    assert gate.names == names
    context = np.linspace(0, 1, len(CONTEXT), dtype=np.float32)
    dots = np.array([-1.5, 0.0, 2.0], np.float32)
    features = np.random.default_rng(0).random((len(FEATURES), 3)).astype(np.float32)
    own = features[[FEATURES.index(name) for name in names]]
    with torch.no_grad():
        expected = terms(
            torch.from_numpy(dots[None]),
            torch.from_numpy(context[None]),
            torch.from_numpy(own[:, None]),
        )[0]
    got = gate.at(context).scores(dots, features)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_nan_does_not_pass_the_proof(tmp_path: Path) -> None:
    terms = _terms(FEATURES)
    with torch.no_grad():
        terms.gate.bias[2] = torch.nan
    with pytest.raises(InputError, match=r"bias is .* not finite"):
        export_terms(terms, tmp_path / "terms")


@pytest.mark.parametrize(
    ("change", "names", "reason"),
    [
        ({"weight": np.zeros((2, 4), np.float32)}, '["past_items", "live_1h"]', "weight is"),
        ({"bias": np.zeros(3, np.float32)}, '["past_items", "live_1h"]', "bias is"),
        ({}, '["live_1h", "past_items"]', "in this order"),
        ({}, '["past_items", "weather"]', "in this order"),
        ({}, "[]", "expected some of"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, np.ndarray], names: str, reason: str
) -> None:
    export_terms(_terms(("past_items", "live_1h")), tmp_path / "terms")
    save_file({**load_file(tmp_path / "terms"), **change}, tmp_path / "terms", {"terms": names})
    with pytest.raises(InputError, match=reason):
        TermGate.open(tmp_path / "terms")


def test_no_file_and_no_safetensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent cannot be read"):
        TermGate.open(tmp_path / "absent")
    (tmp_path / "text").write_text("weights")
    with pytest.raises(InputError, match="text cannot be read"):
        TermGate.open(tmp_path / "text")


def test_a_model_with_terms_exports_them_beside_its_networks(exported_model, tmp_path) -> None:
    from hiertcn.export.serving_models import export_serving_models
    from hiertcn.files import read_json
    from models.hiertcn import HierTCN
    from models.hiertcn_serving import GruStep, TcnCone

    assert not (exported_model(0).directory / "scoring_terms.safetensors").exists()
    model = HierTCN(replace(exported_model(0).model.config, terms=("transitions", "live_15m")))
    export_serving_models(
        TcnCone(model.eval()),
        GruStep(model),
        model.start_state.detach().numpy(),
        tmp_path / "onnx",
        item_dim=model.config.item_dim,
        terms=model.terms,
    )
    gate = TermGate.open(tmp_path / "onnx" / "scoring_terms.safetensors")
    assert gate.names == ("transitions", "live_15m")
    assert read_json(tmp_path / "onnx" / "parity.json")["scoring_terms"]["max_error"] < 1e-4
