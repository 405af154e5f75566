"""Run NVIDIA's Triton Inference Server on a release repository, without Docker.

Starts a real ``tritonserver`` in a process group of its own in explicit model-control mode, with
no model loaded; it is up in about a second. It is stopped by process id, and dies with this
process even if that is killed. Its output goes to a log file, whose last lines are part of every
failure's message. What it does not do: restart a server that died (``is_alive`` tells).
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from hiertcn.errors import InputError, ServingError
from hiertcn.serving.inference.triton_models import TritonModels
from hiertcn.serving.processes.die_with_parent import dying_with_parent
from hiertcn.serving.processes.triton_install import TritonInstall, find_tritonserver

__all__ = ["TritonServer", "find_tritonserver"]

_log = logging.getLogger(__name__)
_POLL_S: Final = 0.05
_EXIT_TIMEOUT_S: Final = 5
_LOG_LINES: Final = 8


class TritonServer:
    """One tritonserver on ``repository``, a folder of ``<model>/config.pbtxt`` and versions.

    A port of 0 takes any free one; ``grpc_port`` and ``http_port`` say which. Ports are opened on
    ``host`` only. ``log`` is appended to; a folder ``<log>.backends`` appears beside it if the
    binary is the wheel's.

    Used as a context manager it starts on entry, is ready inside, and stops on exit.
    """

    def __init__(
        self,
        repository: Path,
        *,
        grpc_port: int = 8001,
        http_port: int = 8000,
        log: Path,
        host: str = "127.0.0.1",
        metrics_port: int | None = None,
        install: TritonInstall | None = None,
        start_timeout_s: float = 60.0,
    ) -> None:
        self.repository = repository.absolute()
        self.host = host
        self.grpc_port = grpc_port
        self.http_port = http_port
        self.log = log.absolute()
        self.metrics_port = metrics_port
        self._install = install
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._spawn_error: OSError | None = None
        self._ended = threading.Event()
        self._models: TritonModels | None = None

    def __enter__(self) -> "TritonServer":
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the server, None when it does not run."""
        return self._process.pid if self._process is not None and self.is_alive() else None

    @property
    def grpc_url(self) -> str:
        """``host:port`` for ``tritonclient.grpc``."""
        return f"{self.host}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """``host:port`` for ``tritonclient.http``."""
        return f"{self.host}:{self.http_port}"

    @property
    def models(self) -> TritonModels:
        """Model control of this server."""
        if self._models is None:
            self._models = TritonModels(self.grpc_url, self.repository)
        return self._models

    def start(self) -> None:
        """Start the server; it is not ready yet.

        Raises:
            InputError: no binary for this machine, or a port is in use.
            ServingError: it already runs, or the binary cannot be executed.
        """
        if self.is_alive():
            raise ServingError(f"Triton already runs as process {self.pid}; stop it first")
        install = self._install or find_tritonserver()
        self.repository.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.grpc_port = _usable_port(self.host, self.grpc_port, "gRPC")
        self.http_port = _usable_port(self.host, self.http_port, "HTTP")
        arguments = [
            str(install.executable),
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.grpc_port}",
            f"--http-address={self.host}",
            f"--http-port={self.http_port}",
            *install.write_backends(self.log.with_name(f"{self.log.name}.backends")),
        ]
        if self.metrics_port is None:
            arguments.append("--allow-metrics=false")
        else:
            self.metrics_port = _usable_port(self.host, self.metrics_port, "metrics")
            arguments.append(f"--metrics-address={self.host}")
            arguments.append(f"--metrics-port={self.metrics_port}")
        self._spawn(arguments, install.environment())
        _log.info("started Triton as process %s, gRPC on %s", self.pid, self.grpc_url)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Return when the server answers and is ready.

        Raises:
            ServingError: it died or did not become ready in time, with the log's last lines.
        """
        deadline = time.monotonic() + (timeout_s or self._start_timeout_s)
        while True:
            if self._ended.wait(_POLL_S):
                raise ServingError(f"Triton died at start; {self._last_words()}")
            # A connection attempt to a closed port makes gRPC back off for a second.
            if _accepts(self.host, self.grpc_port) and self.models.is_ready():
                return
            if time.monotonic() > deadline:
                raise ServingError(f"Triton did not become ready in time; {self._last_words()}")

    def is_alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and not self._ended.is_set()

    def load(self, model: str, versions: Sequence[int]) -> None:
        """Serve exactly these versions of the model; see ``TritonModels.load``."""
        self.models.load(model, versions)

    def unload(self, model: str) -> None:
        """Stop serving the model; see ``TritonModels.unload``."""
        self.models.unload(model)

    def stop(self, timeout_s: float = 2.0 * _EXIT_TIMEOUT_S) -> None:
        """Let requests in flight finish, end the server and its model processes; idempotent."""
        if self._models is not None:
            self._models.close()
            self._models = None
        if self._process is None:
            return
        if not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
        if not self._ended.wait(timeout_s):
            _log.warning("Triton did not stop within %g s; killing it", timeout_s)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._ended.wait()
        self._process = None

    def _spawn(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._ended.clear()
        self._spawn_error = None
        spawned = threading.Event()
        # The kernel ties the server's life to the thread that started it, so that thread must
        # live as long as the server.
        threading.Thread(
            target=self._keep, args=(arguments, environment, spawned), name="triton", daemon=True
        ).start()
        spawned.wait()
        if self._spawn_error is not None:
            raise ServingError(f"{arguments[0]} cannot be started: {self._spawn_error}")

    def _keep(
        self, arguments: list[str], environment: dict[str, str], spawned: threading.Event
    ) -> None:
        try:
            with self.log.open("ab") as output:
                process = subprocess.Popen(
                    dying_with_parent(*arguments),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
        except OSError as error:
            self._spawn_error = error
            self._ended.set()
            return
        else:
            self._process = process
        finally:
            spawned.set()
        # While the dead server is not yet reaped its group id cannot belong to anyone else.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._ended.set()

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        tail = " | ".join(line.strip() for line in lines[-_LOG_LINES:] if line.strip())
        return f"the last lines of {self.log} are: {tail or '(none)'}"


def _usable_port(host: str, port: int, purpose: str) -> int:
    with socket.socket() as probe:
        # As Triton does, so that a port in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port {port} on {host}, meant for Triton's {purpose}, cannot be used "
                f"({error.strerror}); stop the program that holds it or choose another port"
            ) from None
        return int(probe.getsockname()[1])


def _accepts(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False
