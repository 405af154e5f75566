"""The report's view of the scoring terms, held against the model's own gate."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hiertcn.evaluation.report import write_report
from hiertcn.evaluation.report_parts import number
from hiertcn.evaluation.term_section import term_section
from hiertcn.sessions.request_features import FEATURES
from models.scoring_terms import ScoringTerms


@pytest.mark.parametrize("names", [FEATURES, ("transitions", "live_1h"), ("session_items",)])
def test_it_shows_what_the_gate_gives_a_typical_request(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    terms = ScoringTerms(names)
    torch.nn.init.normal_(terms.gate.weight)
    section = term_section(
        names, terms.gate.weight.detach().numpy(), terms.gate.bias.detach().numpy()
    )
    (table,) = section.tables
    assert len(table.rows) == len(names) + 2
    # As request_features.context_of defines them: a new user, and twenty interactions before.
    contexts = [[1.0, 0.0, 0.0, 0.0], [1.0, np.log1p(20) / 5, 0.0, 1.0]]
    with torch.inference_mode():
        gate = terms.gate(torch.tensor(contexts, dtype=torch.float32)).numpy()
    expected = {"(a)": np.exp(gate[:, -2]), "(b)": np.exp(gate[:, -1])}
    if "session_items" in names:
        expected["(d)"] = gate[:, names.index("session_items")]
    if "live_1h" in names:
        expected["the last hour"] = np.exp(gate[:, names.index("live_1h")])
    for part, values in expected.items():
        (row,) = [row for row in table.rows if part in row.label]
        assert [cell.text for cell in row.cells[:2]] == [number(float(value)) for value in values]
    write_report(tmp_path / "report.html", terms=section)
    assert "Scoring terms" in (tmp_path / "report.html").read_text()
