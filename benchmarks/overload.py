"""What the sidecar answers when it is asked five times as often as it can, and what it would do
without a bound on the requests in flight.

    python -m benchmarks.overload --folder .serving_load [--json PATH]

The sidecar, release and load of benchmarks/serving_load.py. First the closed loop gives the rate
that can be sustained; then calls leave at five times that rate, whatever happens. ``goodput`` is
what was answered in time a second, over the sustained rate; a call that takes longer than
``--deadline`` seconds counts as failed. The alternative is the same sidecar with so high a bound
that no request is ever refused.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.serving_load import Load, load_parser, prepared_release
from hiertcn.files import write_json
from pipelines.serving_process import ServingProcess

_UNBOUNDED: Final = 1_000_000


def main() -> None:
    """Measure and print."""
    parser = load_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--times", type=float, default=5.0, help="the sustained rate")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds")
    parser.add_argument("--bound", type=int, default=256, help="--max-in-flight")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    root = prepared_release(arguments.folder, arguments)
    load = Load(arguments.folder, arguments)
    figures: dict[str, Any] = {"bound": arguments.bound, "workers": arguments.workers}
    for name, bound in (("bounded", arguments.bound), ("unbounded", _UNBOUNDED)):
        with tempfile.TemporaryDirectory() as scratch:
            serving = ServingProcess(
                root,
                Path(scratch, "state"),
                Path(scratch, "log"),
                options=[f"--max-in-flight={bound}", f"--models={arguments.models}"]
                + ([f"--workers={arguments.workers}"] if arguments.workers > 1 else []),
            )
            try:
                figures[name] = _overloaded(load, serving, arguments)
            finally:
                serving.stop()
    print(json.dumps(figures, indent=2))
    if arguments.json:
        write_json(arguments.json, figures)


def _overloaded(
    load: Load, serving: ServingProcess, arguments: argparse.Namespace
) -> dict[str, Any]:
    where = serving.address, serving.pid
    sustained = load.run(*where, load.mix, "--concurrency", "32")["per_second"]
    rate = arguments.times * sustained
    asked = load.run(
        *where, load.mix, "--rate", f"{rate:.0f}", "--deadline", str(arguments.deadline)
    )
    after = load.run(*where, load.mix, "--concurrency", "32")["per_second"]
    return {
        "sustained_per_second": sustained,
        "asked_per_second": rate,
        "answered_per_second": asked["per_second"],
        "goodput": asked["per_second"] / sustained,
        "answered_ms": asked["ms"],
        "errors": asked["errors"],
        "afterwards_per_second": after,
    }


if __name__ == "__main__":
    main()
