"""Starts, watches and stops the reading processes of a sidecar (``reader.py``).

A process that ends is started again; all of them die with this one.
"""

import asyncio
import logging
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from hiertcn.errors import ServingError
from hiertcn.files import read_json
from hiertcn.serving.options import SidecarOptions
from hiertcn.serving.processes.die_with_parent import dying_with_parent
from hiertcn.serving.reader import ReaderOptions

_log = logging.getLogger(__name__)

_READY_S: Final = 120.0
_POLL_S: Final = 0.05
_AGAIN_S: Final = 1.0


class WorkerProcesses:
    """The reading processes beside the one that writes.

    Args:
        options: of the writing process, with the port it bound.
        folder: of its socket, private to this user; options and signs of life are kept there.
        count: how many.
    """

    def __init__(self, options: SidecarOptions, folder: Path, count: int) -> None:
        # Each has figures of its own, so each has a port for them.
        self._options = replace(
            options, ui_port=None, metrics_port=None if options.metrics_port is None else 0
        )
        self._folder = folder
        self._count = count
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._watching: list[asyncio.Task[None]] = []

    @property
    def pids(self) -> list[int]:
        """Process ids."""
        return [process.pid for process in self._processes.values()]

    @property
    def metrics_ports(self) -> list[int]:
        """Prometheus ports, of those that serve metrics."""
        found = [read_json(self._ready(number))["metrics_port"] for number in self._processes]
        return [port for port in found if port is not None]

    async def start(self) -> None:
        """Start all and return when they answer.

        Raises:
            ServingError: one ended or did not answer in time; the others are stopped.
        """
        try:
            await asyncio.gather(*(self._start(number) for number in range(1, self._count + 1)))
        except BaseException:
            await self.stop()
            raise
        self._watching = [
            asyncio.create_task(self._keep_alive(number)) for number in self._processes
        ]

    async def stop(self) -> None:
        """Let requests in flight finish and end all."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await asyncio.gather(*(self._end(process) for process in self._processes.values()))
        self._processes.clear()

    async def _start(self, number: int) -> None:
        ready = self._ready(number)
        ready.unlink(missing_ok=True)
        settings = self._folder / f"worker-{number}.json"
        ReaderOptions(sidecar=self._options, door=self._folder, ready=ready).save(settings)
        process = await asyncio.create_subprocess_exec(
            *dying_with_parent(sys.executable, "-m", "hiertcn.serving.reader", str(settings)),
        )
        self._processes[number] = process
        waited_s = 0.0
        while not ready.exists():
            if process.returncode is not None:
                raise ServingError(f"worker {number} ended at its start; the lines above say why")
            if waited_s > _READY_S:
                raise ServingError(f"worker {number} did not answer within {_READY_S:g} s")
            await asyncio.sleep(_POLL_S)
            waited_s += _POLL_S
        _log.info("worker %d answers as process %d", number, process.pid)

    async def _keep_alive(self, number: int) -> None:
        while True:
            code = await self._processes[number].wait()
            _log.error("worker %d ended with status %d; starting it again", number, code)
            await asyncio.sleep(_AGAIN_S)
            try:
                await self._start(number)
            except ServingError as error:
                _log.error("%s", error)
                await self._end(self._processes[number])

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), self._options.drain_s + 10.0)
        except TimeoutError:
            process.kill()
            await process.wait()

    def _ready(self, number: int) -> Path:
        return self._folder / f"worker-{number}.ready"
