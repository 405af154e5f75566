"""One process at a time in a folder, by flock(2): a killed process leaves no lock behind."""

import fcntl
import os
from pathlib import Path

from hiertcn.errors import InputError


def locked(directory: Path) -> int:
    """Lock ``directory``, a folder of a sidecar's state; closing the descriptor unlocks it.

    Raises:
        InputError: another process holds the lock.
    """
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"the state folder {directory.parent} is in use by another sidecar; stop it or give "
            "another --state-dir"
        ) from None
    return descriptor
