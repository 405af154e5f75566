"""Map a file read-only, whole, the ways a large table wants it: lazily, pre-faulted, or copied.

Costs nothing but address space until pages are touched. Pages of a mapped file are shared by every
process that maps it; a copy into anonymous huge pages is this process's alone.
"""

import contextlib
import mmap
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE_BYTES: Final = 2 << 20

# Linux 5.14; the mmap module of Python 3.11 does not name it.
_MADV_POPULATE_READ: Final = 22
_COPY_CHUNK_BYTES: Final = 64 << 20


def map_file(path: Path, *, prefault: bool = False) -> NDArray[np.uint8]:
    """Map a non-empty file, shared and read-only, as uint8 [bytes].

    The kernel is asked for huge pages; one that grants them to anonymous memory only ignores that.

    Args:
        path: the file.
        prefault: read every page in before returning, so that no later access waits for the disk.

    Raises:
        OSError: the file cannot be opened or mapped.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _advise(mapped, getattr(mmap, "MADV_HUGEPAGE", None))
    if prefault and not _advise(mapped, _MADV_POPULATE_READ):
        np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE].max()
    return np.frombuffer(mapped, np.uint8)


def copy_to_huge_pages(path: Path) -> NDArray[np.uint8]:
    """Copy a non-empty file into anonymous memory aligned to 2 MiB, as read-only uint8 [bytes].

    Most kernels grant huge pages to anonymous memory only; where none are granted this is a plain
    copy.

    Raises:
        OSError: the file cannot be read, or memory runs out.
    """
    size = path.stat().st_size
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    skipped = -whole.ctypes.data % HUGE_PAGE_BYTES
    _advise(memory, getattr(mmap, "MADV_HUGEPAGE", None))
    copy = whole[skipped : skipped + size]
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < size:
            chunk = copy.data[done : done + _COPY_CHUNK_BYTES]
            read = file.readinto(chunk)
            if not read:
                raise OSError(f"{path} ended at {done} of {size} bytes")
            done += read
    copy.flags.writeable = False
    return copy


def _advise(mapped: Any, advice: int | None) -> bool:
    if advice is None:
        return False
    with contextlib.suppress(OSError):
        mapped.madvise(advice)
        return True
    return False
