"""An int8 TCN where it ranks as the float32 one does: a smaller and faster file, or none.

Ranges of activations are found on real sessions and stored in the file (onnxruntime's static
quantization, QDQ, weights per channel). With ranges found anew for every batch (dynamic), what a
user gets would depend on whose requests share the batch. Only the TCN is quantized: ``gru_step``
runs once a session, and its errors would add up in the stored states.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.export.session import open_session
from hiertcn.export.tensors import SESSION_ITEMS, SESSION_LENGTH, USER_STATE
from hiertcn.files import whole_file
from hiertcn.items.table import ItemTable

AGREEMENT: Final = 0.99
TOP: Final = 20

_BATCH: Final = 64
_ITEMS_PER_CHUNK: Final = 1 << 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class OpenSessions:
    """Open sessions of real users, as the TCN takes them.

    Attributes:
        session_items: float32 [n, length, dim], newest first.
        session_length: int32 [n, 1].
        user_state: float32 [n, hidden].
    """

    session_items: NDArray[np.float32]
    session_length: NDArray[np.int32]
    user_state: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.session_length)

    def batches(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Feeds of at most 64 sessions."""
        for first in range(0, len(self), _BATCH):
            part = slice(first, first + _BATCH)
            yield {
                SESSION_ITEMS.name: self.session_items[part],
                SESSION_LENGTH.name: self.session_length[part],
                USER_STATE.name: self.user_state[part],
            }

    def halves(self) -> tuple["OpenSessions", "OpenSessions"]:
        """Every second one, and the others."""
        parts = [
            OpenSessions(self.session_items[n::2], self.session_length[n::2], self.user_state[n::2])
            for n in (0, 1)
        ]
        return parts[0], parts[1]


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
    best = [_best(embeddings, table, top) for embeddings in (expected, found)]
    return float(np.mean([len(np.intersect1d(*rows)) / top for rows in zip(*best, strict=True)]))


def _best(embeddings: NDArray[np.float32], table: ItemTable, top: int) -> NDArray[np.int64]:
    """Rows of the best items, int64 [n, top], in any order."""
    scores = np.empty((len(embeddings), 0), np.float32)
    rows = np.empty((len(embeddings), 0), np.int64)
    for first in range(0, len(table), _ITEMS_PER_CHUNK):
        vectors = np.asarray(table.vectors[first : first + _ITEMS_PER_CHUNK], np.float32)
        here = np.arange(first, first + len(vectors))
        scores = np.concatenate([scores, embeddings @ vectors.T], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(here, (len(embeddings), len(here)))], axis=1)
        kept = np.argpartition(-scores, min(top, scores.shape[1]) - 1, axis=1)[:, :top]
        scores = np.take_along_axis(scores, kept, axis=1)
        rows = np.take_along_axis(rows, kept, axis=1)
    return rows


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
