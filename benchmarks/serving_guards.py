"""What each guard of the sidecar's door costs: its processor time a request, beside an open door.

    python -m benchmarks.serving_guards --folder .serving_load [--json PATH]

`hiertcn serve` with Triton, asked in turn with every guard; the figure is the time (user and
system) of the serving process alone for a Recommend of 500 candidates, k = 20, at concurrency 8
on few connections, so neither the load nor what else runs on the machine counts. A TLS handshake
is paid once a connection and is not in it.
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
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.without_terms = False
    root = prepared_release(arguments.folder, arguments)
    bodies = _bodies(arguments)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch, _collector() as endpoint:
        for name, options, access in _guards(Path(scratch), endpoint):
            serving = ServingProcess(
                root, Path(scratch, "state"), Path(scratch, "log"), options=options
            )
            try:
                _asked(serving, access, bodies, arguments.requests)
                turns = [
                    _asked(serving, access, bodies, arguments.requests)
                    for _ in range(arguments.turns)
                ]
            finally:
                serving.stop()
            figures[name] = statistics.median(turns)
    print("| guard | processor time a request, ms | more than an open door |")
    print("|---|---|---|")
    for name, milliseconds in figures.items():
        more = milliseconds / figures["none"] - 1
        print(f"| {name} | {milliseconds:.3f} | {more:+.1%} |")
    if arguments.json:
        write_json(arguments.json, {"requests": arguments.requests, "ms_a_request": figures})


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
    yield "none", [], Access()
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
