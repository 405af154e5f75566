"""One rate for each caller over all processes of a sidecar: token buckets in a file that they map.

The table has 2,048 sets of eight slots (32 bytes each, half a MiB in all). A caller's keyed digest
says in which set its slot is, so nobody can choose whom to meet there; of a full set, the slot goes
whose bucket is full again first, which loses least. A set is changed under a lock on its first byte
(fcntl), which the kernel takes back from a process that dies; the table stays. Costs two system
calls a request beside what ``rate_limit.py`` does.
"""

import fcntl
import hashlib
import mmap
import secrets
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hiertcn.serving.security.rate_limit import Bucket, Caller, RateLimiter

_KEY_BYTES: Final = 32

_SETS: Final = 2048
_WAYS: Final = 8
_DIGEST_BYTES: Final = 16
_SLOT: Final = struct.Struct(f"<{_DIGEST_BYTES}sdd")
_SET_BYTES: Final = _WAYS * _SLOT.size
_UNUSED: Final = bytes(_DIGEST_BYTES)


def rate_table(folder: Path, *, create: bool = False) -> Path:
    """The table's file in a folder that only this user may enter.

    Args:
        folder: the folder.
        create: write an empty table there, with a key drawn for it.
    """
    path = folder / "rates"
    if create:
        path.write_bytes(secrets.token_bytes(_KEY_BYTES) + bytes(_SETS * _SET_BYTES))
    return path


class SharedRateLimiter(RateLimiter):
    """Admits at most ``per_second`` requests a second of each caller, over all who open the table.

    One thread of a process asks: a process does not wait for its own locks.

    Args:
        per_second: requests a second, more than 0; also the size of a bucket, at least 1.
        table: the file that :func:`rate_table` made.
        clock: seconds that never run backwards, the same in all processes.
    """

    def __init__(
        self, per_second: float, table: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(per_second, clock=clock)
        self._file = table.open("r+b")
        self._table = mmap.mmap(self._file.fileno(), _KEY_BYTES + _SETS * _SET_BYTES)
        self.key: Final = self._table[:_KEY_BYTES]
        """Secret of this table, the same in all processes."""

    def wait_s(self, caller: Caller) -> float:
        """Take a request out of the bucket and return 0, or return the seconds until one is in."""
        name = caller if isinstance(caller, bytes) else caller.encode()
        digest = hashlib.blake2b(name, key=self.key, digest_size=_DIGEST_BYTES).digest()
        start = _KEY_BYTES + int.from_bytes(digest[:4], "little") % _SETS * _SET_BYTES
        descriptor = self._file.fileno()
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, start)
        try:
            at, bucket = self._slot(start, digest)
            bucket, wait_s = self._taken(bucket)
            _SLOT.pack_into(self._table, at, digest, *bucket)
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, start)
        return wait_s

    def _slot(self, start: int, digest: bytes) -> tuple[int, Bucket | None]:
        """Where the caller's bucket is, or goes (None), in the set that starts at ``start``."""
        fullest, full_at = start, float("inf")
        for at in range(start, start + _SET_BYTES, _SLOT.size):
            found, left, then = _SLOT.unpack_from(self._table, at)
            if found == digest:
                return at, Bucket(left, then)
            # All buckets are of one size and rate, so this orders them by when they are full.
            full = -float("inf") if found == _UNUSED else then - left / self._per_second
            if full < full_at:
                fullest, full_at = at, full
        return fullest, None
