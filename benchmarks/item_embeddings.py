"""Item-to-item retrieval on held-out co-interactions, after PinSage's Table 1, for several methods.

    python -m benchmarks.item_embeddings --out FOLDER --data FOLDER_OF_LOGS [--logs online_retail]
    python -m benchmarks.item_embeddings --out FOLDER --data FOLDER_OF_LOGS --hiertcn

The newest days of each log are held out; a user touched two items within ten minutes there; given
one, where does the other rank among all items? Ties never help. Intervals are 95%, over queries.
``--hiertcn`` asks what the vectors are for: HierTCN alone, without scoring terms and with frozen
vectors, trained equally long on ours, on raw features and on random vectors, and its MRR on the
newest tenth of the sessions. What was measured stays in the folder, so a run that was stopped, or
asked for more rows, continues.
"""

import argparse
import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.item_embeddings_data import LOGS, LogName, Phase, RetrievalCase, load_case
from benchmarks.item_embeddings_hiertcn import hiertcn_table
from benchmarks.item_embeddings_methods import OURS, ROWS
from benchmarks.item_embeddings_ranks import (
    COLUMNS,
    RowRanks,
    intervals,
    measure,
    metric_values,
)
from hiertcn.errors import HiertcnError
from hiertcn.files import write_json


def main() -> None:
    """Print the tables."""
    arguments = _parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    values: dict[str, Any] = {}
    try:
        for name in arguments.logs:
            cases = functools.cache(functools.partial(_case, arguments, name))
            if arguments.hiertcn:
                values[name] = hiertcn_table(cases("test"), arguments.out / "hiertcn", arguments)
            else:
                values[name] = _retrieval_table(name, cases, arguments)
            written = arguments.json or arguments.out / "item_embeddings.json"
            write_json(written, values)
    except HiertcnError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _case(arguments: argparse.Namespace, name: LogName, phase: Phase) -> RetrievalCase:
    return load_case(
        arguments.out / "logs", arguments.data, name, phase, questions=arguments.questions
    )


def _retrieval_table(name: LogName, cases: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    case = cases("test")
    measured = {
        row: measure(row, ROWS[row], cases, arguments.out / "rows") for row in arguments.rows
    }
    print(
        f"\n### {name}: {len(case.queries):,} questions of {case.first_date} to {case.last_date}, "
        f"{len(case.index):,} items\n\nBoth items were known in {case.share_known:.0%} of the "
        f"meetings (only those are asked); {case.met_before.mean():.0%} of the pairs had met "
        "before.\n"
    )
    titles = ["", *COLUMNS, "without popularity: hit rate@10", "MRR", "ours minus it: MRR"]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    found = {}
    for row, ranks in measured.items():
        found[row] = _summary(case, ranks, measured.get(OURS))
        _print_row(row, found[row])
    return {
        "questions": len(case.queries),
        "items": len(case.index),
        "share_known": case.share_known,
        "share_met_before": float(case.met_before.mean()),
        "held_out": [case.first_date, case.last_date],
        "rows": found,
    }


def _summary(case: RetrievalCase, row: RowRanks, ours: RowRanks | None) -> dict[str, Any]:
    values = metric_values(row.ranks)
    low, high = intervals(values, case.queries)
    plain = metric_values(row.plain_ranks).mean(axis=0)
    summary: dict[str, Any] = {
        column: [float(values[:, at].mean()), float(low[at]), float(high[at])]
        for at, column in enumerate(COLUMNS)
    }
    summary["without popularity"] = dict(zip(COLUMNS, plain.tolist(), strict=True))
    for group, chosen in (("met before", case.met_before), ("never met", ~case.met_before)):
        means = values[chosen].mean(axis=0) if chosen.any() else np.full(len(COLUMNS), np.nan)
        summary[group] = dict(zip(COLUMNS, means.tolist(), strict=True))
    if ours is not None and ours is not row:
        difference = metric_values(ours.ranks) - values
        low, high = intervals(difference, case.queries)
        summary["ours minus it"] = {
            column: [float(difference[:, at].mean()), float(low[at]), float(high[at])]
            for at, column in enumerate(COLUMNS)
        }
    return summary | {"facts": {key: row.facts[key] for key in ("options", "prior", "cpu_seconds")}}


def _print_row(name: str, summary: Mapping[str, Any]) -> None:
    cells = [_interval(summary[column]) for column in COLUMNS]
    plain = summary["without popularity"]
    # Without it "popularity" ties all items.
    nothing = name == "popularity"
    cells += ["–" if nothing else _short(plain[column]) for column in ("hit rate@10", "MRR")]
    cells.append(_interval(summary["ours minus it"]["MRR"]) if "ours minus it" in summary else "")
    shown = f"**{name}**" if name == OURS else name
    print(f"| {shown} | " + " | ".join(cells) + " |", flush=True)


def _interval(values: Sequence[float]) -> str:
    return f"{_short(values[0])} [{_short(values[1])}, {_short(values[2])}]"


def _short(value: float) -> str:
    return f"{value:.4f}".replace("0.", ".", 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for everything that is kept")
    add("--data", type=Path, default=Path(), help="folder with a folder of each log")
    add("--logs", nargs="+", choices=LOGS, default=list(LOGS))
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add("--questions", type=int, default=20_000, help="most questions of a log")
    add("--hiertcn", action="store_true", help="train HierTCN on the vectors instead")
    add("--steps", type=int, default=800, help="training steps of each HierTCN")
    add("--requests", type=int, default=20_000, help="most requests that HierTCN is asked")
    add("--seeds", type=int, nargs="+", default=[0], help="of HierTCN's training")
    add("--json", type=Path, help="file for the figures; by default in --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
