"""The exported ``gru_step`` as a function of arrays, in this process."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.export.session import open_session
from hiertcn.export.tensors import NEXT_STATE, SESSION_MEAN, STATE


class GruStep:
    """HierTCN Eq. 10 as the release has it, on one thread.

    Args:
        path: the ONNX file.
        start_state: float32 ``[layers, hidden]``, the state before a first session.
        dim: length of an item vector.

    Raises:
        InputError: the file is no model, or takes other shapes.
    """

    def __init__(self, path: Path, start_state: NDArray[np.float32], dim: int) -> None:
        self._session = open_session(path)
        expected = {STATE.name: list(start_state.shape), SESSION_MEAN.name: [dim]}
        for entry in self._session.get_inputs():
            if entry.shape[1:] != expected.get(entry.name):
                raise InputError(
                    f"{path} takes {entry.name} with dims {entry.shape[1:]}; the start state and "
                    f"the item table give {expected.get(entry.name)}: export the model again"
                )

    def __call__(
        self, state: NDArray[np.float32], session_mean: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The states float32 ``[n, layers, hidden]`` after sessions of mean ``[n, dim]``."""
        inputs = {STATE.name: state, SESSION_MEAN.name: session_mean}
        (after,) = self._session.run([NEXT_STATE.name], inputs)
        values: NDArray[Any] = after
        return values
