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
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hiertcn.errors import HiertcnError
from hiertcn.files import write_json
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.options import ServeOptions
from hiertcn.serving.preflight import check_before_starting

if TYPE_CHECKING:
    from hiertcn.serving.triton import TritonServer

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
        triton: TritonServer | None = None
        url = options.triton_url
        if url is None and options.sidecar.models == "triton":
            triton = await asyncio.to_thread(_started_triton, options)
            parts.push_async_callback(asyncio.to_thread, triton.stop)
            url = triton.grpc_url
        sidecar = Sidecar(replace(options.sidecar, triton_url=url or ""))
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
                "ui": sidecar.ui_url,
                "triton_grpc": url,
                "triton_http": triton.http_url if triton is not None else None,
                "release": sidecar.release,
            },
        )
        parts.callback((state_dir / SERVING_FILE).unlink, missing_ok=True)
        _log.info("ready; where everything is says %s", state_dir / SERVING_FILE)
        await stopping.wait()
        _log.info("stopping: no new requests, those in flight finish")


def _started_triton(options: ServeOptions) -> "TritonServer":
    from hiertcn.serving.triton import TritonServer

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
