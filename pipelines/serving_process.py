"""``hiertcn serve`` as a child process, for whoever has to start it, ask it and stop it."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hiertcn.errors import ServingError
from hiertcn.files import read_json

SERVING_FILE: Final = "serving.json"

_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0


class ServingProcess:
    """Triton and the sidecar on free ports, ready when the constructor returns.

    It is a session of its own, so it outlives the terminal's Ctrl-C until :meth:`stop`.

    Args:
        repository: the release repository.
        state_dir: of the sidecar; its ``serving.json`` says when it is ready.
        log: file for what it prints.
        model_deadline_ms: after which a simpler ranking answers.
        options: more of ``hiertcn serve``.

    Raises:
        ServingError: it ended, or was not ready within two minutes; nothing is left running.
    """

    def __init__(
        self,
        repository: Path,
        state_dir: Path,
        log: Path,
        *,
        model_deadline_ms: int = 200,
        options: Sequence[str] = (),
    ) -> None:
        self.log = log
        self._ready_file = state_dir / SERVING_FILE
        command = [
            *(sys.executable, "-m", "hiertcn.cli", "serve", f"--repository={repository}"),
            *(f"--state-dir={state_dir}", "--port=0", "--metrics-port=0"),
            *("--triton-grpc-port=0", "--triton-http-port=0"),
            f"--model-deadline-ms={model_deadline_ms}",
            *options,
        ]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self.address: str = self._wait_ready()["address"]
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process to send SIGTERM to."""
        return self._process.pid

    def stop(self) -> None:
        """End the sidecar, which ends the Triton it started."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_ready(self) -> dict[str, Any]:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                tail = "\n".join(self.log.read_text().splitlines()[-5:])
                raise ServingError(
                    f"`hiertcn serve` ended before it was ready; {self.log}:\n{tail}"
                )
            if self._ready_file.exists():
                serving: dict[str, Any] = read_json(self._ready_file)
                if serving["pid"] == self._process.pid:
                    return serving
            time.sleep(0.05)
        raise ServingError(
            f"`hiertcn serve` was not ready after {_READY_TIMEOUT_S:.0f} s; see {self.log}"
        )
