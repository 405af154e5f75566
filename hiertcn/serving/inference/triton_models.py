"""Load and unload versions of models in a running Triton, ours or any that shares the repository.

Triton must run in explicit model-control mode. A load names the versions that shall be served;
the versions that stay keep answering while a new one loads, and a failed load leaves them as
they were.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient import grpc as triton_grpc
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from hiertcn.errors import ReleaseError, ServingError

_log = logging.getLogger(__name__)


class TritonModels:
    """Model control of the Triton at ``url`` (``host:port`` of its gRPC door).

    ``repository`` is the folder Triton was started on, as seen from here: the hand-written
    configs are read from it.
    """

    def __init__(self, url: str, repository: Path, *, timeout_s: float = 60.0) -> None:
        self.url = url
        self._repository = repository
        self._timeout_s = timeout_s
        self._client: Any = triton_grpc.InferenceServerClient(url)

    def __enter__(self) -> "TritonModels":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; Triton and its models stay as they are."""
        self._client.close()

    def is_ready(self) -> bool:
        """Whether Triton answers and calls itself ready."""
        try:
            return bool(self._client.is_server_ready(client_timeout=2.0))
        except InferenceServerException:
            return False

    def load(self, model: str, versions: Sequence[int]) -> None:
        """Serve exactly these versions of the model and return when they are ready.

        Raises:
            ReleaseError: the repository has no usable config or file for a version, or Triton
                cannot load it; versions served before keep serving.
            ServingError: Triton does not answer.
        """
        config = self._config(model)
        config.version_policy.specific.versions[:] = sorted(set(versions))
        for version in versions:
            path = self._repository / model / str(version)
            if not path.is_dir():
                raise ReleaseError(
                    f"{path} does not exist, so Triton cannot load version {version} of {model}; "
                    "publish the release again"
                )
        text = json_format.MessageToJson(config, preserving_proto_field_name=True, indent=None)
        try:
            self._client.load_model(model, config=text, client_timeout=self._timeout_s)
        except InferenceServerException as error:
            raise self._failure(error, f"load versions {list(versions)} of {model}") from None
        unready = [version for version in versions if not self.has(model, version)]
        if unready:
            raise ReleaseError(
                f"Triton at {self.url} did not make versions {unready} of {model} ready; "
                "its log says why"
            )
        _log.info("Triton at %s serves versions %s of %s", self.url, list(versions), model)

    def unload(self, model: str) -> None:
        """Stop serving every version of the model.

        Raises:
            ServingError: Triton does not answer.
        """
        try:
            self._client.unload_model(model, client_timeout=self._timeout_s)
        except InferenceServerException as error:
            raise self._failure(error, f"unload {model}") from None

    def has(self, model: str, version: int) -> bool:
        """Whether this version of the model is loaded and ready."""
        try:
            return bool(self._client.is_model_ready(model, str(version), client_timeout=5.0))
        except InferenceServerException:
            return False

    def loaded(self, model: str) -> list[int]:
        """The versions of the model that are ready, oldest first.

        Raises:
            ServingError: Triton does not answer.
        """
        try:
            index = self._client.get_model_repository_index(client_timeout=5.0)
        except InferenceServerException as error:
            raise self._failure(error, "list models") from None
        return sorted(
            int(entry.version)
            for entry in index.models
            if entry.name == model and entry.state == "READY" and entry.version
        )

    def _config(self, model: str) -> Any:
        path = self._repository / model / "config.pbtxt"
        try:
            return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
            raise ReleaseError(
                f"{path} is not a readable Triton model config ({error}); publish again"
            ) from None

    def _failure(self, error: InferenceServerException, action: str) -> Exception:
        status = str(error.status() or "")
        if "UNAVAILABLE" in status or "DEADLINE" in status:
            return ServingError(
                f"Triton at {self.url} does not answer, so it could not {action} "
                f"({error.message()}); see whether it runs and look at its log"
            )
        return ReleaseError(f"Triton at {self.url} could not {action}: {error.message()}")
