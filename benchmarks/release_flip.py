"""A release that follows another under load: failed and mixed replies, latencies, users rebuilt.

    python -m benchmarks.release_flip --folder .serving_load [--users 1000000] [--json PATH]

The sidecar, the load and the random releases of benchmarks/serving_load.py, one release more. Users
are made active by recording for them; then the open loop runs at ``--share`` of what the closed
loop reached, once undisturbed and once while ``ActivateRelease`` changes the release. Compared are
the latencies of the two, as they were before the call, and until the last active user was rebuilt.
"""

import argparse
import json
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.serving_load import Load, add_release, load_parser, prepared_release
from hiertcn.files import read_json, write_json
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.client import RecommenderClient
from pipelines.serving_process import SERVING_FILE, ServingProcess


def main() -> None:
    """Measure and print."""
    parser = load_parser(__doc__)
    parser.set_defaults(users=1_000_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--activate-at", type=float, default=10.0, help="seconds into it")
    parser.add_argument("--record-s", type=float, default=30.0, help="seconds of making active")
    parser.add_argument("--share", type=float, default=0.5, help="of the closed loop's rate")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    root = prepared_release(arguments.folder, arguments)
    first, second = _two_releases(root, arguments)
    load = Load(arguments.folder, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        serving = ServingProcess(root, Path(scratch, "state"), Path(scratch, "log"))
        ready_s = time.monotonic() - began
        try:
            figures = _flip(load, serving, Path(scratch, "state"), first, second, arguments)
        finally:
            serving.stop()
    figures = {"users": arguments.users, "items": arguments.items, "ready_s": ready_s} | figures
    print(json.dumps(figures, indent=2))
    if arguments.json:
        write_json(arguments.json, figures)


def _two_releases(root: Path, arguments: argparse.Namespace) -> tuple[int, int]:
    repository = ReleaseRepository(root)
    if len(repository.numbers()) == 1:
        add_release(root, arguments, date="2026-01-02", seed=1)
    first, second = sorted(repository.numbers())
    repository.activate(first)
    return first, second


def _flip(
    load: Load,
    serving: ServingProcess,
    state: Path,
    first: int,
    second: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    metrics = read_json(state / SERVING_FILE)["metrics"]
    where = serving.address, serving.pid
    seconds, arguments.seconds = arguments.seconds, arguments.record_s
    recorded = load.run(*where, load.mix[1:], "--concurrency", "64")
    arguments.seconds = 5.0
    rate = arguments.share * load.run(*where, load.mix, "--concurrency", "32")["per_second"]
    arguments.seconds = seconds
    open_loop = ("--rate", f"{rate:.0f}")
    undisturbed = load.run(*where, load.mix, *open_loop)
    before = _value(metrics, "hiertcn_rebuilds_total")
    activation: dict[str, float] = {}
    activating = threading.Thread(
        target=_activate, args=(serving.address, second, metrics, before, arguments, activation)
    )
    activating.start()
    flipped = load.run(*where, load.mix, *open_loop)
    activating.join()
    return {
        "recorded": recorded["ok"],
        "rate": rate,
        "undisturbed": _told(undisturbed),
        "flipped": _told(flipped),
        "p99_ratio": flipped["ms"]["p99"] / undisturbed["ms"]["p99"],
        "replies_of_another_release": sum(
            count
            for number, count in flipped["calls"]["Recommend"]["field_1"].items()
            if int(number) not in (first, second)
        ),
        **activation,
    }


def _activate(
    address: str,
    number: int,
    metrics: str,
    rebuilt_before: float,
    arguments: argparse.Namespace,
    told: dict[str, float],
) -> None:
    time.sleep(arguments.warm_up + arguments.activate_at)
    began = time.monotonic()
    with RecommenderClient(address, timeout_s=300.0) as client:
        client.activate(number)
    told["activation_s"] = time.monotonic() - began
    # Rebuilding goes on after the flip, for those who were active meanwhile.
    while _value(metrics, "hiertcn_warming"):
        time.sleep(0.1)
    told["all_rebuilt_s"] = time.monotonic() - began
    told["rebuilt"] = _value(metrics, "hiertcn_rebuilds_total") - rebuilt_before


def _value(metrics: str, name: str) -> float:
    with urllib.request.urlopen(metrics, timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def _told(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "per_second": found["per_second"],
        "ms": found["ms"],
        "errors": found["errors"],
        "fallbacks": found["calls"]["Recommend"].get("field_4", {}).get("1", 0),
        "releases": found["calls"]["Recommend"].get("field_1", {}),
    }


if __name__ == "__main__":
    main()
