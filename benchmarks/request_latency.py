"""Latency of the sidecar's requests, beside an empty gRPC call to the same process.

    python -m benchmarks.request_latency --repository .demo/repository [--json PATH]

Starts ``hiertcn serve`` (real Triton, fsynced log) on the repository's current release and calls it
one at a time from this process, the kinds of call in turn, so that the machine's noise meets all
of them alike. The empty call is the standard health check: what gRPC and Python cost by themselves.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hiertcn.files import write_json
from hiertcn.items.index import IdIndex
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.client import Interaction, RecommenderClient
from pipelines.serving_process import ServingProcess

EMPTY: Final = "empty call"
_WARM_UP: Final = 50


def main() -> None:
    """Measure and print each kind of call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="a release repository")
    parser.add_argument("--calls", type=int, default=1000, help="calls of each kind (default 1000)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    repository = ReleaseRepository(arguments.repository)
    release = repository.current()
    if release is None:
        parser.error(f"{repository.root} has no current release")
    index = IdIndex.open(repository.path(release) / "item_index")
    items = index.ids(range(len(index)))
    with tempfile.TemporaryDirectory() as folder:
        serving = ServingProcess(repository.root, Path(folder, "state"), Path(folder, "log"))
        try:
            milliseconds = _measure(serving.address, items, arguments.calls)
        finally:
            serving.stop()
    floor = statistics.median(milliseconds[EMPTY])
    figures: dict[str, dict[str, float]] = {}
    for name, values in milliseconds.items():
        p50, p99 = statistics.median(values), statistics.quantiles(values, n=100)[98]
        figures[name] = {"p50_ms": p50, "p99_ms": p99, "ratio_to_empty_call": p50 / floor}
        print(f"{name:<34}p50 {p50:7.2f} ms   p99 {p99:7.2f} ms   {p50 / floor:5.1f} x empty call")
    if arguments.json:
        write_json(arguments.json, {"items": len(items), "calls": arguments.calls, **figures})


def _measure(address: str, items: list[str], calls: int) -> dict[str, list[float]]:
    choose = random.Random(0)
    pools = [choose.sample(items, min(100, len(items))) for _ in range(16)]
    users = [f"benchmark-{n}" for n in range(200)]
    with RecommenderClient(address) as client, grpc.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        kinds: dict[str, Callable[[], object]] = {
            EMPTY: lambda: health.Check(request),
            "Recommend, 100 candidates": lambda: client.recommend(
                choose.choice(users), candidates=choose.choice(pools)
            ),
            f"Recommend, catalogue of {len(items):,}": lambda: client.recommend(
                choose.choice(users)
            ),
            "RecordInteractions, one": lambda: client.record(
                [Interaction(choose.choice(users), choose.choice(items))]
            ),
        }
        milliseconds: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(_WARM_UP + calls):
            for name, call in kinds.items():
                start = time.perf_counter()
                call()
                if turn >= _WARM_UP:
                    milliseconds[name].append((time.perf_counter() - start) * 1e3)
    return milliseconds


if __name__ == "__main__":
    main()
