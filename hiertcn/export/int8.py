"""An int8 TCN where it ranks as the float32 one does: a smaller and faster file, or none.

Ranges of activations are found on real sessions and stored in the file (onnxruntime's static
quantization, QDQ, weights per channel). With ranges found anew for every batch (dynamic), what a
user gets would depend on whose requests share the batch. Only the TCN is quantized: ``gru_step``
runs once a session, and its errors would add up in the stored states.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.export.open_sessions import OpenSessions
from hiertcn.export.session import open_session
from hiertcn.files import whole_file
from hiertcn.items.exact_search import best_items
from hiertcn.items.table import ItemTable

AGREEMENT: Final = 0.99
TOP: Final = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Int8Proof:
    """What the int8 model was held against.

    Attributes:
        agreement: share of the float32 model's best ``TOP`` items of the whole catalogue that are
            among the int8 model's, mean over ``sessions`` that it was not calibrated on.
        is_served: whether that is at least ``AGREEMENT``, so that the int8 file took the place of
            the float32 one.
        float32_bytes, int8_bytes: sizes of the files.
    """

    agreement: float
    is_served: bool
    sessions: int
    float32_bytes: int
    int8_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)


def quantize_tcn(path: Path, sessions: OpenSessions, table: ItemTable) -> Int8Proof:
    """Replace a TCN by its int8 version if the two agree; else leave it as it is and say so.

    Args:
        path: the exported ``tcn/model.onnx``.
        sessions: half of them calibrate, the other half judges.
        table: the catalogue that is ranked.

    Raises:
        InputError: there are fewer than two sessions, or onnxruntime cannot quantize the model.
    """
    if len(sessions) < 2:
        raise InputError(
            f"{len(sessions)} session(s) were given to calibrate int8 with; expected at least 2: "
            "serve float32 or give a longer log"
        )
    calibrating, judging = sessions.halves()
    with whole_file(path) as aside:
        _quantize(path, aside, calibrating)
        agreement = top_agreement(
            _embeddings(open_session(path), judging),
            _embeddings(open_session(aside), judging),
            table,
        )
        proof = Int8Proof(
            agreement=agreement,
            is_served=agreement >= AGREEMENT,
            sessions=len(judging),
            float32_bytes=path.stat().st_size,
            int8_bytes=aside.stat().st_size,
        )
        if not proof.is_served:
            aside.write_bytes(path.read_bytes())
    _log.info(
        "int8 tcn agrees on %.4f of the best %d items (expected %.2f): %s is served",
        proof.agreement,
        TOP,
        AGREEMENT,
        "int8" if proof.is_served else "float32",
    )
    return proof


def top_agreement(
    expected: NDArray[np.float32], found: NDArray[np.float32], table: ItemTable, top: int = TOP
) -> float:
    """Return the mean share of the best ``top`` items by one embedding that the other has, too.

    Args:
        expected: float32 [n, dim].
        found: float32 [n, dim].
        table: the catalogue.
        top: items compared; fewer where the catalogue has fewer.
    """
    top = min(top, len(table))
    best = [best_items(table, embeddings, top)[0] for embeddings in (expected, found)]
    return float(np.mean([len(np.intersect1d(*rows)) / top for rows in zip(*best, strict=True)]))


def _embeddings(session: ort.InferenceSession, sessions: OpenSessions) -> NDArray[np.float32]:
    found = [session.run(None, feed)[0] for feed in sessions.batches()]
    return np.concatenate(found).astype(np.float32, copy=False)


def _quantize(path: Path, output: Path, sessions: OpenSessions) -> None:
    # It takes a second to import, and most exports do without.
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = sessions.batches()

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self._feeds, None)

    with TemporaryDirectory(dir=output.parent) as scratch:
        prepared = Path(scratch, "prepared.onnx")
        try:
            # Symbolic shape inference would add nothing: the axes are named already.
            quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(output),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
            )
        except Exception as error:
            # onnxruntime raises a dozen unrelated classes.
            raise InputError(f"onnxruntime cannot quantize {path}: {error}") from error
