"""What each guard of the sidecar's door costs: its processor time a request, beside an open door.

    python -m benchmarks.serving_guards --folder .serving_load [--json PATH]

`hiertcn serve` with Triton, one with an open door throughout and beside it one with each guard,
asked in turn; the figure is the time (user and system) of the serving process alone for a
Recommend of 500 candidates, k = 20, at concurrency 8 on few connections, so neither the load nor
the waiting for what else runs on the machine counts. A TLS handshake is paid once a connection and
is not in it.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import psutil

from benchmarks.serving_load import prepared_release
from benchmarks.serving_load_release import item_ids, user_ids
from hiertcn.files import write_json
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.security.access import Access
from pipelines.serving_process import ServingProcess

_METHOD: Final = "/hiertcn.v1.Recommender/Recommend"
_CANDIDATES: Final = 500
_TOKEN: Final = "0123456789abcdef" * 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="release")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=3000, help="of each measurement")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.without_terms = False
    root = prepared_release(arguments.folder, arguments)
    bodies = _bodies(arguments)
    with contextlib.ExitStack() as parts:
        scratch = Path(parts.enter_context(tempfile.TemporaryDirectory()))
        endpoint = parts.enter_context(_collector())
        beside = parts.enter_context(_serving(root, scratch / "beside", []))
        _asked(beside, Access(), bodies, arguments.requests)
        figures: dict[str, tuple[float, float, float]] = {}
        for name, options, access in _guards(scratch, endpoint):
            with _serving(root, scratch / str(len(figures)), options) as guarded:
                _asked(guarded, access, bodies, arguments.requests)
                figures[name] = _compared(
                    [
                        (
                            _asked(beside, Access(), bodies, arguments.requests),
                            _asked(guarded, access, bodies, arguments.requests),
                        )
                        for _ in range(arguments.turns)
                    ]
                )
    print("| guard | open door, ms | with the guard, ms | more |")
    print("|---|---|---|---|")
    for name, (before, after, more) in figures.items():
        print(f"| {name} | {before:.3f} | {after:.3f} | {more:+.1%} |")
    if arguments.json:
        write_json(arguments.json, {"requests": arguments.requests, "ms_a_request": figures})


@contextlib.contextmanager
def _serving(root: Path, folder: Path, options: list[str]) -> Iterator[ServingProcess]:
    folder.mkdir()
    serving = ServingProcess(root, folder / "state", folder / "log", options=options)
    try:
        yield serving
    finally:
        serving.stop()


def _compared(turns: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Medians of both, and of how much more the second was than the first in the same turn."""
    return (
        statistics.median(before for before, _ in turns),
        statistics.median(after for _, after in turns),
        statistics.median(after / before - 1 for before, after in turns),
    )


def _guards(scratch: Path, endpoint: str | None) -> Iterator[tuple[str, list[str], Access]]:
    tokens, certificate, key = scratch / "tokens", scratch / "cert.pem", scratch / "key.pem"
    tokens.write_text(f"read {_TOKEN}\n")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out"),
            str(certificate),
        ],
        check=True,
        capture_output=True,
    )
    with_token = ["--token-file", str(tokens)]
    with_tls = ["--tls-cert", str(certificate), "--tls-key", str(key)]
    yield "none (a second open door)", [], Access()
    yield "tokens", with_token, Access(token_file=tokens)
    yield "tokens, rates", [*with_token, "--rate-limit", "1e6"], Access(token_file=tokens)
    yield "TLS", with_tls, Access(tls_ca=certificate)
    if endpoint is None:
        return
    for share in (0.01, 1.0):
        options = ["--otlp-endpoint", endpoint, "--trace-sampling", str(share)]
        yield f"traces of {share:.0%}", options, Access()


def _asked(serving: ServingProcess, access: Access, bodies: list[bytes], requests: int) -> float:
    """Milliseconds of the serving process's processor time for each request."""
    process = psutil.Process(serving.pid)
    before = process.cpu_times()
    asyncio.run(_ask(serving.address, access, bodies, requests))
    # What the last requests left to do, such as sending spans, is theirs too.
    time.sleep(1)
    after = process.cpu_times()
    spent_s = float(after.user + after.system - before.user - before.system)
    return 1000 * spent_s / requests


async def _ask(address: str, access: Access, bodies: list[bytes], requests: int) -> None:
    channel = access.aio_channel(address, [])
    method = channel.unary_unary(_METHOD)
    metadata = access.metadata()
    left = iter(range(requests))

    async def one_after_the_other() -> None:
        for number in left:
            await method(bodies[number % len(bodies)], timeout=30, metadata=metadata)

    await asyncio.gather(*(one_after_the_other() for _ in range(8)))
    await channel.close()


def _bodies(arguments: argparse.Namespace) -> list[bytes]:
    rng = random.Random(0)
    items, users = item_ids(arguments.items), user_ids(arguments.users)
    return [
        pb.RecommendRequest(
            user_id=rng.choice(users), k=20, candidates=rng.sample(items, _CANDIDATES)
        ).SerializeToString()
        for _ in range(512)
    ]


@contextlib.contextmanager
def _collector() -> Iterator[str | None]:
    try:
        from opentelemetry.proto.collector.trace.v1 import (
            trace_service_pb2,
            trace_service_pb2_grpc,
        )
    except ImportError:
        print("opentelemetry is not installed (extra: tracing); traces are not measured")
        yield None
        return

    class Received(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Received(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


if __name__ == "__main__":
    main()
