"""The served models in the sidecar's own process, without a Triton.

For one machine that serves few models it saves the hop (two processes and a copy of every tensor);
Triton remains the way to share models between sidecars, to batch across them and to use a GPU. The
files are those of the release's Triton repository, run by the same onnxruntime on one thread a
call, so results are the same.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hiertcn.errors import InputError, ReleaseError, ServingError
from hiertcn.export.session import open_session
from hiertcn.export.tensors import TensorSpec
from hiertcn.serving.inference.inference import DTYPES

_log = logging.getLogger(__name__)

_THREADS: Final = 2
"""As many calls as the sidecar has under way (``batching.py``)."""


class InProcessModels:
    """Runs versions of models; takes the place of ``TritonInference`` and ``TritonModels``.

    Args:
        repository: the release repository's ``triton_repo``.
    """

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._sessions: dict[str, dict[int, ort.InferenceSession]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="models")

    def load(self, model: str, versions: Sequence[int]) -> None:
        """Serve exactly these versions of the model.

        Raises:
            ReleaseError: a version's file is missing or is no model; those before keep serving.
        """
        before = self._sessions.get(model, {})
        loaded = {}
        for version in versions:
            path = self._repository / model / str(version) / "model.onnx"
            try:
                loaded[version] = before.get(version) or open_session(path)
            except InputError as error:
                raise ReleaseError(
                    f"version {version} of {model} cannot be loaded: {error}"
                ) from None
        self._sessions[model] = loaded
        _log.info("this process runs versions %s of %s", list(versions), model)

    def unload(self, model: str) -> None:
        """Stop serving every version of the model."""
        self._sessions.pop(model, None)

    def loaded(self, model: str) -> list[int]:
        """The versions of the model that are served, oldest first."""
        return sorted(self._sessions.get(model, {}))

    async def run(
        self,
        model: str,
        version: int,
        inputs: Sequence[tuple[TensorSpec, NDArray[Any]]],
        output: TensorSpec,
        *,
        timeout_s: float,
    ) -> NDArray[Any]:
        """Run one batch and return the output tensor.

        Raises:
            ServingError: the version is not loaded, the model refused the tensors, or it did not
                answer within ``timeout_s``.
        """
        session = self._sessions.get(model, {}).get(version)
        if session is None:
            raise ServingError(f"version {version} of {model} is not loaded")
        tensors = {
            spec.name: np.ascontiguousarray(values, DTYPES[spec.datatype])
            for spec, values in inputs
        }
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._threads, _run, session, output.name, tensors)
        try:
            return await asyncio.wait_for(call, timeout_s)
        except TimeoutError:
            raise ServingError(
                f"{model} version {version} did not answer within {timeout_s:g} s"
            ) from None
        except Exception as error:
            # onnxruntime raises a dozen unrelated classes.
            raise ServingError(f"{model} version {version} failed: {error}") from error

    async def is_ready(self, model: str, version: int, *, timeout_s: float = 2.0) -> bool | None:
        """Whether that version of the model is loaded."""
        return version in self._sessions.get(model, {})

    async def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)


def _run(
    session: ort.InferenceSession, output: str, tensors: dict[str, NDArray[Any]]
) -> NDArray[Any]:
    result: NDArray[Any] = session.run([output], tensors)[0]
    return result
