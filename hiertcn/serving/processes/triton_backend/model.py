"""A Python-based Triton backend named ``onnxruntime``, for Triton builds without NVIDIA's.

Triton loads this file for every model whose config says ``backend: "onnxruntime"`` when the
folder ``onnxruntime/`` of its backend directory holds it. It serves the same repository as
NVIDIA's C++ backend with the same results, at the price of a process hop (about 0.2 ms) and a
process of some 80 MB per model instance. It runs on CPU only and reads two of that backend's
parameters, ``intra_op_thread_count`` and ``inter_op_thread_count``, both 1 by default.

Requests of one ``execute`` call whose shapes agree run as one batch; a request that the model
refuses gets its own error and spoils no other.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as triton
from numpy.typing import NDArray

Inputs = dict[str, NDArray[Any]]


class TritonPythonModel:
    """One instance of one version of one model; Triton calls these methods by name."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Leave the hand-written config as it is."""
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the version's ONNX file; an exception here marks the version as failed."""
        config = json.loads(args["model_config"])
        file = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file
        options = ort.SessionOptions()
        options.intra_op_num_threads = _threads(config, "intra_op_thread_count")
        options.inter_op_num_threads = _threads(config, "inter_op_thread_count")
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]
        self._batched = int(config.get("max_batch_size", 0)) > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, in order."""
        inputs = [self._read(request) for request in requests]
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for place, tensors in enumerate(inputs):
            # Without a batch axis nothing may be joined, so every request is its own group.
            shape = tuple(tensors[name].shape[1:] for name in self._inputs)
            groups[shape if self._batched else (place,)].append(place)
        responses: list[Any] = [None] * len(requests)
        for places in groups.values():
            answers = self._run_together([inputs[place] for place in places])
            for place, answer in zip(places, answers, strict=True):
                responses[place] = _response(requests[place], answer)
        return responses

    def finalize(self) -> None:
        """Free the session before the process ends."""
        del self._session

    def _read(self, request: Any) -> Inputs:
        # The wheel's stub was built for numpy 1 and gets the strides of a numpy 2 array wrong, in
        # both directions; DLPack says what a tensor looks like whatever numpy's own layout is.
        return {
            name: np.from_dlpack(triton.get_input_tensor_by_name(request, name))
            for name in self._inputs
        }

    def _run_together(self, group: list[Inputs]) -> list[Inputs | Exception]:
        if len(group) == 1:
            return [self._run(group[0])]
        joined = {name: np.concatenate([one[name] for one in group]) for name in self._inputs}
        outputs = self._run(joined)
        if isinstance(outputs, Exception):
            return [self._run(one) for one in group]
        ends = np.cumsum([len(one[self._inputs[0]]) for one in group])[:-1]
        parts = {name: np.split(values, ends) for name, values in outputs.items()}
        return [{name: parts[name][place] for name in parts} for place in range(len(group))]

    def _run(self, tensors: Inputs) -> Inputs | Exception:
        try:
            values = self._session.run(self._outputs, tensors)
        except Exception as error:
            # onnxruntime raises a dozen unrelated classes; each is this request's answer.
            return error
        return dict(zip(self._outputs, values, strict=True))


def _threads(config: dict[str, Any], name: str) -> int:
    parameter = config.get("parameters", {}).get(name)
    return 1 if parameter is None else int(parameter["string_value"])


def _response(request: Any, answer: Inputs | Exception) -> Any:
    if isinstance(answer, Exception):
        return triton.InferenceResponse(error=triton.TritonError(str(answer)))
    wanted = request.requested_output_names()
    return triton.InferenceResponse(
        [
            triton.Tensor.from_dlpack(name, values)
            for name, values in answer.items()
            if name in wanted
        ]
    )
