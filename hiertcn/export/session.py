"""Open an ONNX file in this process, on one thread unless asked for more.

onnxruntime otherwise takes every core for each session, which slows small models and starves
whatever runs beside it.
"""

from pathlib import Path

import onnxruntime as ort

from hiertcn.errors import InputError


def open_session(path: Path, *, threads: int = 1) -> ort.InferenceSession:
    """Load ``path`` for the CPU.

    Raises:
        InputError: the file is missing or is no model that this onnxruntime can load.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads take a core even while they wait.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime raises a dozen unrelated classes.
        raise InputError(
            f"{path} is not an ONNX model that onnxruntime {ort.__version__} can load "
            f"({error}); export it again"
        ) from None
