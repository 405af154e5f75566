"""What a process leaves behind when it dies in native code, for the next start to find.

A damaged page of a memory-mapped file can kill whoever touches it (SIGBUS, SIGSEGV), and would at
every start. Python's faulthandler writes where that was into a file beside the store; a start that
finds it does not trust the store any more (``store_lmdb.py``). ``kill -9`` leaves no note.
"""

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_NOTE: Final = "crash"


@contextlib.contextmanager
def crashes_noted(directory: Path) -> Iterator[None]:
    """Note a crash of this process in ``directory``, while the block runs."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _NOTE).open("ab") as note:
        faulthandler.enable(note)
        try:
            yield
        finally:
            faulthandler.disable()


def take_note(directory: Path) -> str:
    """The note that an earlier process left in ``directory``, "" for none; it is gone then."""
    note = directory / _NOTE
    try:
        text = note.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    # Emptied in place: this process may have it open for its own note.
    os.truncate(note, 0)
    return text
