"""The report's section on what the gate said."""

import math

from hiertcn.evaluation.gate import GateDecision
from hiertcn.evaluation.metrics import metric_title
from hiertcn.evaluation.report_parts import Cell, Row, Section, Table, share


def gate_section(gate: GateDecision) -> Section:
    """Return the comparisons behind the gate's decision."""
    return Section(
        "gate",
        "Gate",
        paragraphs=(
            f"A release may serve if the {metric_title(gate.metric)} of {gate.challenger} is not "
            "worse than that of any baseline, and not worse than the serving release's by more "
            f"than {gate.tolerance:.1%} of it.",
        ),
        tables=(
            Table(
                f"{gate.challenger} against each opponent, by {metric_title(gate.metric)}",
                ("Opponent", "Role", "Opponent's value", "Limit", gate.challenger, "Verdict"),
                tuple(
                    Row(
                        check.opponent,
                        (
                            Cell(check.role),
                            Cell(share(_number(check.opponent_value))),
                            Cell(share(_number(check.limit))),
                            Cell(share(_number(check.challenger_value))),
                            Cell("✓ passed" if check.passed else "✗ refused", not check.passed),
                        ),
                    )
                    for check in gate.checks
                ),
            ),
        ),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
