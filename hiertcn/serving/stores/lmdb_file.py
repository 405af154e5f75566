"""The file of an LMDB store: opened, tried, grown into, and copied without its free pages.

LMDB keeps no checksums of pages and reuses the pages of what was replaced but never gives them
back. So whoever writes tries a write before it trusts a file, and a file of which more than three
quarters are free is copied without them.
"""

import logging
import os
from pathlib import Path
from typing import Any, Final

import lmdb

from hiertcn.files import whole_directory

_log = logging.getLogger(__name__)

DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
"""What LMDB raises for damaged pages; its other errors say nothing of them."""

_DATA: Final = "data.mdb"
_COMPACT_BYTES: Final = 64 << 20
_COMPACT_SHARE: Final = 0.25


def opened(directory: Path, map_bytes: int, *, read_only: bool) -> Any:
    """Open the file in a folder without syncing it; whoever writes creates it.

    Raises:
        lmdb.Error: there is none to read, or it is damaged.
    """
    return lmdb.open(
        str(directory),
        map_size=map_bytes,
        readonly=read_only,
        create=not read_only,
        sync=False,
        metasync=False,
        max_dbs=0,
        max_readers=512,
    )


def opened_and_tried(directory: Path, map_bytes: int, key: bytes) -> Any:
    """Open the file in a folder to write it, and try a write of one key that changes nothing.

    Raises:
        lmdb.Error: it is damaged.
    """
    environment = opened(directory, map_bytes, read_only=False)
    try:
        size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if (directory / _DATA).stat().st_size < size:
            # Touching a mapped page behind the file's end kills; an empty one is an error.
            os.truncate(directory / _DATA, size)
        transaction = environment.begin(write=True)
        try:
            # Reads the list of free pages, as every write will.
            transaction.put(key, transaction.get(key, b""))
        except lmdb.MapFullError:
            pass
        finally:
            transaction.abort()
    except BaseException:
        environment.close()
        raise
    return environment


def file_number(directory: Path) -> int:
    """The inode of the file in a folder: another one once the writer has begun it anew."""
    return (directory / _DATA).stat().st_ino


def live_bytes(environment: Any) -> int:
    """Bytes of the file that hold something."""
    pages = environment.stat()
    return int(pages["psize"] * _live_pages(pages))


def compact_if_mostly_free(environment: Any, directory: Path) -> bool:
    """Replace a file that is mostly free by a copy without its free pages; return whether it was.

    The environment is closed then, and the folder has another file.

    Raises:
        lmdb.Error: a page is damaged; the file stays as it is.
    """
    pages = environment.stat()
    live = _live_pages(pages)
    in_file = environment.info()["last_pgno"] + 1
    if in_file * pages["psize"] < _COMPACT_BYTES or live > in_file * _COMPACT_SHARE:
        return False
    with whole_directory(directory) as aside:
        environment.copy(str(aside), compact=True)
        environment.close()
    _log.info("compacted %s from %d to %d pages", directory, in_file, live)
    return True


def _live_pages(pages: dict[str, int]) -> int:
    return sum(pages[kind] for kind in ("branch_pages", "leaf_pages", "overflow_pages"))
