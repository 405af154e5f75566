"""Seconds of each step of ``make demo``, beside the time the demo may take (4 minutes installed).

    python -m benchmarks.demo_steps [--runs 3] [--json PATH] [-- demo options]

Each run starts from an empty folder, so nothing is cached. Prints the median of each step and its
share of the whole, and the ratio of the whole to the limit.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from hiertcn.files import read_json, write_json

LIMIT_S: Final = 240.0


def main() -> None:
    """Run the demo a few times and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs of the demo (default 3)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("demo", nargs="*", help="options of the demo, after --")
    arguments = parser.parse_args()
    runs = [_run(arguments.demo) for _ in range(arguments.runs)]
    steps = {
        step: statistics.median(run["step_seconds"].get(step, 0.0) for run in runs)
        for step in runs[0]["step_seconds"]
        if step != "install_when_fresh"
    }
    for step, seconds in steps.items():
        print(f"{step:<24}{seconds:8.1f} s{seconds / steps['total']:8.0%}")
    ratio = steps["total"] / LIMIT_S
    print(f"median of {len(runs)} runs: {steps['total']:.1f} s, {ratio:.2f} of the limit")
    if arguments.json:
        write_json(
            arguments.json,
            {
                "step_seconds": steps,
                "limit_seconds": LIMIT_S,
                "ratio": ratio,
                "runs": [run["step_seconds"]["total"] for run in runs],
                "last": runs[-1],
            },
        )


def _run(options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "demo")
        command = [sys.executable, "-m", "pipelines.demo", "--folder", str(target), *options]
        subprocess.run(command, check=True, stdout=sys.stderr)
        summary: dict[str, Any] = read_json(target / "summary.json")
    return summary


if __name__ == "__main__":
    main()
