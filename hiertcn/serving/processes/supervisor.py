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
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hiertcn.errors import HiertcnError
from hiertcn.files import write_json
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.options import STORE_FOLDER, ServeOptions, SidecarOptions
from hiertcn.serving.preflight import check_before_starting
from hiertcn.serving.stores.crash_note import crashes_noted

if TYPE_CHECKING:
    from hiertcn.serving.processes.triton import TritonServer
    from hiertcn.serving.processes.worker_processes import WorkerProcesses

_log = logging.getLogger(__name__)

SERVING_FILE: Final = "serving.json"
_CHECK_S: Final = 1.0


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        InputError: no release, no Triton binary, a port or the state folder in use.
        ServingError: Triton cannot be started or reached.
    """
    asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> None:
    check_before_starting(options)
    # Imported late, so that what the check finds is said at once and not after seconds of imports.
    from hiertcn.serving.sidecar import Sidecar

    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    state_dir = options.sidecar.state_dir
    async with contextlib.AsyncExitStack() as parts:
        if not options.sidecar.store:
            parts.enter_context(crashes_noted(state_dir / STORE_FOLDER))
        triton: TritonServer | None = None
        url = options.triton_url
        if url is None and options.sidecar.models == "triton":
            triton = await asyncio.to_thread(_started_triton, options)
            parts.push_async_callback(asyncio.to_thread, triton.stop)
            url = triton.grpc_url
        running = replace(options.sidecar, triton_url=url or "")
        door = _private_folder(parts) if running.workers > 1 else None
        sidecar = Sidecar(running, door)
        await sidecar.start()
        parts.push_async_callback(sidecar.stop)
        workers = await _started_workers(replace(running, port=sidecar.port), door)
        if workers is not None:
            # They stop first: what they pass on while they drain needs the one that writes.
            parts.push_async_callback(workers.stop)
            started = workers
            sidecar.further_metrics_ports = lambda: started.metrics_ports
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
                "ui": sidecar.ui_url,
                "triton_grpc": url,
                "triton_http": triton.http_url if triton is not None else None,
                "release": sidecar.release,
                "workers": [os.getpid(), *(workers.pids if workers is not None else ())],
                "worker_metrics": [
                    f"http://{running.host}:{port}/metrics"
                    for port in (workers.metrics_ports if workers is not None else ())
                ],
            },
        )
        parts.callback((state_dir / SERVING_FILE).unlink, missing_ok=True)
        _log.info("ready; where everything is says %s", state_dir / SERVING_FILE)
        await stopping.wait()
        _log.info("stopping: no new requests, those in flight finish")


def _private_folder(parts: contextlib.AsyncExitStack) -> Path:
    # In the state folder a socket's path could be longer than the 107 bytes that Linux allows.
    return Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="hiertcn-")))


async def _started_workers(options: SidecarOptions, door: Path | None) -> "WorkerProcesses | None":
    if door is None:
        return None
    from hiertcn.serving.processes.worker_processes import WorkerProcesses

    workers = WorkerProcesses(options, door, count=options.workers - 1)
    await workers.start()
    return workers


def _started_triton(options: ServeOptions) -> "TritonServer":
    from hiertcn.serving.processes.triton import TritonServer

    triton = TritonServer(
        ReleaseRepository(options.sidecar.repository).triton_repository,
        grpc_port=options.triton_grpc_port,
        http_port=options.triton_http_port,
        log=options.sidecar.state_dir / "triton.log",
    )
    return triton.__enter__()


async def _keep_alive(triton: "TritonServer") -> None:
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


def _restart(triton: "TritonServer") -> None:
    triton.stop()
    triton.start()
    triton.wait_ready()
