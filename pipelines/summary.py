"""What a local run found, gathered from its steps' outputs: ``run.json`` and ``report.html``.

`make demo` and dashboards read ``run.json``:

    step_seconds  seconds by step, its process's start included; 0.0 for a step that was skipped
    cached        the steps that were skipped because nothing they depend on had changed
    seconds       of the whole run
    data          the ingested log: snapshot.json and, under "statistics", the paper's Table 1
    graph         statistics of the item graph (items, edges, isolated_items, ...)
    training      {"item encoder" | "HierTCN": {curve: [first, last]}}
    offline       {"candidates": text, "requests": n, "models": {name: {metric: value}}}
    gate          {"passed": bool, "reason": sentence}
    release       number of the release that was published and activated, or null
    report        path of the report
    repository    path of the release repository
    parameters    every parameter's value
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiertcn.evaluation.metrics import METRIC_NAMES
from hiertcn.evaluation.results import ORACLE, EvaluationResult
from hiertcn.files import read_json, write_json


def write_summary(
    work_dir: Path,
    *,
    values: Mapping[str, Any],
    outputs: Mapping[str, Any],
    records: list[dict[str, Any]],
    step_seconds: Mapping[str, float],
    cached: list[str],
    seconds: float,
) -> dict[str, Any]:
    """Write ``run.json`` and ``report.html`` to the work directory and return the former.

    Args:
        work_dir: the run's work directory.
        values: the run's parameters.
        outputs: the pipeline's outputs by name (pipelines/daily.py).
        records: how the steps ended (components/step.py).
        step_seconds: seconds by step.
        cached: the steps that were skipped.
        seconds: seconds of the whole run.
    """
    report = work_dir / "report.html"
    shutil.copyfile(outputs["report"].uri, report)
    gate = read_json(Path(outputs["evaluation"].uri) / "gate.json")
    summary = {
        "step_seconds": dict(step_seconds),
        "cached": cached,
        "seconds": round(seconds, 3),
        "data": _data(Path(outputs["snapshot"].uri)),
        "graph": read_json(Path(outputs["graph"].uri) / "statistics.json"),
        "training": {
            "item encoder": _ends(read_json(Path(outputs["item_encoder"].uri) / "curve.json")),
            "HierTCN": _ends(read_json(Path(outputs["model"].uri) / "curve.json")),
        },
        "offline": _offline(read_json(Path(outputs["evaluation"].uri) / "evaluation.json")),
        "gate": {name: gate[name] for name in ("passed", "reason")},
        "release": _published(records),
        "report": str(report),
        "repository": values["repository"],
        "parameters": dict(values),
    }
    write_json(work_dir / "run.json", summary)
    return summary


def describe(summary: Mapping[str, Any], work_dir: Path) -> list[str]:
    """Return what a run ends by saying: what was found, written, and where."""
    graph, offline = summary["graph"], summary["offline"]
    lines = [
        f"graph: {graph['items']:,} items, {graph['edges']:,} edges, "
        f"{graph['isolated_items']:,} items without a neighbor",
        f"evaluation on {offline['requests']:,} interactions ({offline['candidates']}):",
    ]
    width = max(map(len, offline["models"]), default=0)
    lines += [
        f"    {name:<{width}}  "
        + "  ".join(
            f"{metric} {row[metric]:.4f}" for metric in ("recall@10", "mrr") if metric in row
        )
        for name, row in offline["models"].items()
    ]
    if summary["release"] is None:
        lines.append(
            f"gate: {summary['gate']['reason']}; nothing was published, and what serves stays"
        )
    else:
        lines += [
            f"gate: {summary['gate']['reason']}",
            f"release {summary['release']} is published and active in {summary['repository']}",
        ]
    skipped = f"; unchanged and not run again: {', '.join(summary['cached'])}"
    lines += [
        f"report: {summary['report']}",
        f"figures: {work_dir / 'run.json'}",
        f"took {summary['seconds']:.0f} s{skipped if summary['cached'] else ''}",
    ]
    return lines


def _data(snapshot: Path) -> dict[str, Any]:
    return {
        **read_json(snapshot / "snapshot.json"),
        "statistics": read_json(snapshot / "statistics.json"),
    }


def _ends(curve: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return each curve's first and last finite value, without the horizontal axes."""
    ends = {}
    for name, points in curve.items():
        if name in ("step", "steps", "epoch", "epochs") or not isinstance(points, list):
            continue
        numbers = [
            float(point)
            for point in points
            if isinstance(point, int | float) and math.isfinite(point)
        ]
        if numbers:
            ends[name] = [numbers[0], numbers[-1]]
    return ends


def _offline(values: Mapping[str, Any]) -> dict[str, Any]:
    result = EvaluationResult.from_dict(values)
    groups = {ranker.name: ranker.groups["ALL"] for ranker in result.rankers}
    if result.oracle is not None:
        groups[ORACLE] = result.oracle.metrics["ALL"]
    kinds = [
        kind
        for kind, pools in (
            ("impressions", result.impression_pools),
            ("catalogue", result.catalogue_pools),
        )
        if pools
    ]
    return {
        "candidates": f"{' or '.join(kinds) or 'none'}, {result.mean_pool_size:.1f} on average",
        "requests": result.requests,
        "models": {
            name: {
                metric: group.value(metric)
                for metric in METRIC_NAMES
                if not math.isnan(group.value(metric))
            }
            for name, group in groups.items()
        },
    }


def _published(records: list[dict[str, Any]]) -> int | None:
    for record in records:
        if "release" in record.get("values", {}):
            return int(record["values"]["release"])
    return None
