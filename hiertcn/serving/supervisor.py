"""``hiertcn serve``: Triton and the sidecar as one foreground process.

Starts Triton (unless the URL of a running one is given), then the sidecar, says where they are in
``<state-dir>/serving.json``, restarts a Triton that dies, and on SIGTERM or SIGINT drains, stops
both and removes the file. Whatever fails at the start, nothing is left running.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from dataclasses import dataclass, replace
from typing import Final

from hiertcn.errors import HiertcnError, InputError
from hiertcn.files import write_json
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.sidecar import Sidecar, SidecarOptions
from hiertcn.serving.triton import TritonServer

_log = logging.getLogger(__name__)

SERVING_FILE: Final = "serving.json"
_CHECK_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to serve, and where.

    Attributes:
        sidecar: the sidecar's options; ``triton_url`` is set from Triton if one is started.
        triton_url: ``host:port`` of a running Triton's gRPC door; None starts one.
        triton_grpc_port: gRPC port of the Triton that is started; 0 takes any free one.
        triton_http_port: HTTP port of the Triton that is started; 0 takes any free one.
    """

    sidecar: SidecarOptions
    triton_url: str | None = None
    triton_grpc_port: int = 8001
    triton_http_port: int = 8000


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        InputError: no release, no Triton binary, a port or the state folder in use.
        ServingError: Triton cannot be started or reached.
    """
    asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    _check_before_starting(options)
    state_dir = options.sidecar.state_dir
    async with contextlib.AsyncExitStack() as parts:
        triton: TritonServer | None = None
        url = options.triton_url
        if url is None:
            triton = await asyncio.to_thread(_started_triton, options)
            parts.push_async_callback(asyncio.to_thread, triton.stop)
            url = triton.grpc_url
        sidecar = Sidecar(replace(options.sidecar, triton_url=url))
        await sidecar.start()
        parts.push_async_callback(sidecar.stop)
        if triton is not None:
            keeping = asyncio.create_task(_keep_alive(triton))
            parts.callback(keeping.cancel)
        write_json(
            state_dir / SERVING_FILE,
            {
                "pid": os.getpid(),
                "address": sidecar.address,
                "metrics": (
                    f"http://{options.sidecar.host}:{sidecar.metrics_port}/metrics"
                    if sidecar.metrics_port is not None
                    else None
                ),
                "triton_grpc": url,
                "triton_http": triton.http_url if triton is not None else None,
                "release": sidecar.release,
            },
        )
        parts.callback((state_dir / SERVING_FILE).unlink, missing_ok=True)
        _log.info("ready; where everything is says %s", state_dir / SERVING_FILE)
        await stopping.wait()
        _log.info("stopping: no new requests, those in flight finish")


def _check_before_starting(options: ServeOptions) -> None:
    """Say what is wrong before spending seconds on a start that must fail."""
    repository = ReleaseRepository(options.sidecar.repository)
    if not repository.root.is_dir():
        raise InputError(
            f"the release repository {repository.root} does not exist; publish a release there "
            "with 'python -m pipelines run', or give another --repository"
        )
    if repository.current() is None:
        raise InputError(
            f"{repository.root} has no current release; publish one with 'python -m pipelines "
            "run', or activate one with 'hiertcn releases activate'"
        )
    ports = [("--port", options.sidecar.port)]
    if options.sidecar.metrics_port is not None:
        ports.append(("--metrics-port", options.sidecar.metrics_port))
    for option, port in ports:
        _check_port(option, options.sidecar.host, port)


def _check_port(option: str, host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{option} {port} on {host} cannot be bound ({error.strerror}); stop what holds "
                "it or give another"
            ) from None


def _started_triton(options: ServeOptions) -> TritonServer:
    triton = TritonServer(
        ReleaseRepository(options.sidecar.repository).triton_repository,
        grpc_port=options.triton_grpc_port,
        http_port=options.triton_http_port,
        log=options.sidecar.state_dir / "triton.log",
    )
    return triton.__enter__()


async def _keep_alive(triton: TritonServer) -> None:
    """Restart a Triton that died; the sidecar answers by fallback meanwhile."""
    while True:
        await asyncio.sleep(_CHECK_S)
        if triton.is_alive():
            continue
        _log.error("Triton died; starting it again (its log is %s)", triton.log)
        try:
            await asyncio.to_thread(_restart, triton)
        except HiertcnError as error:
            _log.error("Triton could not be restarted: %s", error)


def _restart(triton: TritonServer) -> None:
    triton.stop()
    triton.start()
    triton.wait_ready()
