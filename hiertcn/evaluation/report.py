"""The daily report: one HTML page with everything needed to judge a release.

The page is self-contained: styles and charts are inside it, so it opens from a mail, from a KFP
artifact or from a release folder years later. Every part may be missing; what is missing is left
out. All text that comes from data is escaped. Does not compute: evaluate.py and gate.py do.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from hiertcn.evaluation.data_sections import data_section, graph_section, training_section
from hiertcn.evaluation.drift_section import drift_section
from hiertcn.evaluation.gate import GateDecision
from hiertcn.evaluation.gate_section import gate_section
from hiertcn.evaluation.report_parts import Section
from hiertcn.evaluation.result_sections import result_sections, tiles
from hiertcn.evaluation.results import EvaluationResult
from hiertcn.files import whole_file

_log = logging.getLogger(__name__)


def write_report(
    path: Path,
    *,
    title: str = "Daily release report",
    facts: Mapping[str, Any] | None = None,
    evaluation: EvaluationResult | Mapping[str, Any] | None = None,
    gate: GateDecision | Mapping[str, Any] | None = None,
    challenger: str = "HierTCN",
    serving: str | None = None,
    data_statistics: Mapping[str, Any] | None = None,
    graph_statistics: Mapping[str, Any] | None = None,
    encoder_curve: Mapping[str, Any] | None = None,
    model_curve: Mapping[str, Any] | None = None,
    terms: Section | None = None,
    gallery: Section | None = None,
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: the HTML file.
        title: heading of the page.
        facts: what identifies the run, shown under the heading: release, data date, watermark.
        evaluation: the result, or its `to_dict`.
        gate: the decision, or its `to_dict`.
        challenger: name of the ranker of the new release.
        serving: name of the ranker of the serving release, if one was evaluated.
        data_statistics: the ingest's statistics.json (Table 1).
        graph_statistics: the item graph's statistics.json.
        encoder_curve: the item encoder's curve.json; with its drift where an earlier release
            serves.
        model_curve: HierTCN's curve.json.
        terms: what `term_section.term_section` made of the model's scoring terms, if it has any.
        gallery: what `gallery.gallery_section` made of the item vectors.

    Raises:
        InputError: the evaluation is not what `EvaluationResult.to_dict` wrote, or the disk is
            full.
    """
    if isinstance(evaluation, Mapping):
        evaluation = EvaluationResult.from_dict(evaluation)
    if isinstance(gate, Mapping):
        gate = GateDecision.from_dict(gate)

    sections: list[Section] = []
    if evaluation is not None:
        sections += result_sections(evaluation, challenger, serving)
    if gate is not None and gate.checks:
        sections.append(gate_section(gate))
    if terms is not None:
        sections.append(terms)
    if gallery is not None:
        sections.append(gallery)
    if encoder_curve or model_curve:
        sections.append(training_section(encoder_curve or {}, model_curve or {}))
    if encoder_curve and encoder_curve.get("drift"):
        sections.append(drift_section(encoder_curve["drift"]))
    if data_statistics:
        sections.append(data_section(data_statistics))
    if graph_statistics:
        sections.append(graph_section(graph_statistics))

    page = _template().render(
        title=title,
        facts=[(name, str(value)) for name, value in (facts or {}).items()],
        gate=None if gate is None else {"passed": gate.passed, "text": _sentence(gate.reason)},
        tiles=[] if evaluation is None else tiles(evaluation, challenger, serving),
        sections=sections,
    )
    with whole_file(path) as aside:
        aside.write_text(page, encoding="utf-8")
    _log.info("wrote the report to %s", path)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hiertcn.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
    )
    return environment.get_template("report.html")


def _sentence(reason: str) -> str:
    """Return the gate's reason without the verdict that the page shows in its own way."""
    for verdict in ("passed: ", "refused: "):
        reason = reason.removeprefix(verdict)
    return reason[:1].upper() + reason[1:] + "."
