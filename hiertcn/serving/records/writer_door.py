"""The door of the process that writes, for the others of the same sidecar: a Unix socket.

Everything that changes something goes through it, so one user's interactions are applied in one
order and once, whichever process received them. Beside the public services it takes folds: records
that a reading process has folded or rebuilt, and that would otherwise be computed again; and the
keys of records that one found damaged, to be made again.
"""

import asyncio
import logging
import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from hiertcn.errors import ServingError
from hiertcn.serving.log.event_log import Entry
from hiertcn.serving.records.applying import Applied
from hiertcn.serving.records.record import CorruptRecordError, UserRecord, decode, encode
from hiertcn.serving.records.writer import RecordWriter

_log = logging.getLogger(__name__)

_SERVICE: Final = "hiertcn.internal.Writer"
_KEEP: Final = "KeepFold"
_REPAIR: Final = "Repair"
_FOLD: Final = struct.Struct("<16s?q")
_MOST_FOLDS: Final = 256
_KEY_BYTES: Final = 16
_REPAIR_S: Final = 60.0


def writer_url(folder: Path) -> str:
    """Where the door in a folder is, for gRPC. The folder is one that only this user may enter."""
    return f"unix:{folder / 'writer.sock'}"


def fold_handler(writer: RecordWriter) -> Any:
    """The handler that takes folds, and what is damaged, from other processes."""

    async def keep(request: bytes, context: Any) -> bytes:
        key, has_base, base = _FOLD.unpack_from(request)
        try:
            record = decode(request[_FOLD.size :])
        except CorruptRecordError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        writer.keep_fold(key, base if has_base else None, record)
        return b""

    async def repair(request: bytes, context: Any) -> bytes:
        starts = range(0, len(request), _KEY_BYTES)
        await writer.repair([request[at : at + _KEY_BYTES] for at in starts])
        return b""

    return grpc.method_handlers_generic_handler(
        _SERVICE,
        {
            _KEEP: grpc.unary_unary_rpc_method_handler(keep),
            _REPAIR: grpc.unary_unary_rpc_method_handler(repair),
        },
    )


class RemoteWriter:
    """Hands folds to the writing process; everything else is passed on as it came.

    Args:
        channel: a ``grpc.aio`` channel to the door.
    """

    def __init__(self, channel: Any) -> None:
        self._keep = channel.unary_unary(f"/{_SERVICE}/{_KEEP}")
        self._repair = channel.unary_unary(f"/{_SERVICE}/{_REPAIR}")
        self._tasks: set[asyncio.Task[None]] = set()

    def keep_fold(self, key: bytes, base_revision: int | None, record: UserRecord) -> None:
        """See ``RecordWriter.keep_fold``. Where too many are on their way, this one is lost."""
        if len(self._tasks) >= _MOST_FOLDS:
            return
        base = 0 if base_revision is None else base_revision
        request = _FOLD.pack(key, base_revision is not None, base) + encode(record)
        task = asyncio.ensure_future(self._send(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def repair(self, keys: Collection[bytes]) -> None:
        """See ``RecordWriter.repair``."""
        try:
            await self._repair(b"".join(keys), timeout=_REPAIR_S)
        except grpc.aio.AioRpcError as error:
            _log.error("damaged records are not made again yet (%s)", error.code())

    async def commit(self, entries: Sequence[Entry]) -> list[Applied]:
        """Refuse.

        Raises:
            ServingError: always.
        """
        raise ServingError("this process only reads; the writing one takes what is to be logged")

    async def _send(self, request: bytes) -> None:
        try:
            await self._keep(request, timeout=1.0)
        except grpc.aio.AioRpcError as error:
            _log.debug("a fold was not kept (%s); the next touch folds again", error.code())
