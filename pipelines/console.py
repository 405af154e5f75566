"""What a local run shows: the steps' own lines, without what Kubeflow's runner puts around them.

Kubeflow's local runner reads each step's output line by line and prints it on standard output,
between its own log lines and the executor's. This writer stands in for standard output during the
run, passes on what a step says between its start and its end, and remembers the rest, so that it
can be shown if a step dies without a word. A progress bar arrives as one line per update; on a
terminal the updates overwrite each other.
"""

import io
import logging
import re
from collections import deque
from typing import TextIO

from components.step import FINISHED, STARTED

_INDENT = " " * 4
_REMEMBERED_LINES = 200
_CACHE_HIT = re.compile(r"Task (?P<step>\S+) cache hit \(key=(?P<key>[0-9a-f]+)\)")
_PROGRESS = re.compile(r"\d+%\||\d+(it|\S*) \[\d\d:\d\d")


class StepConsole(io.TextIOBase):
    """A text stream for ``contextlib.redirect_stdout`` around a local run."""

    def __init__(self, steps: tuple[str, ...], terminal: TextIO) -> None:
        self._starts = {f"{name} {STARTED}": name for name in steps}
        self._ends = tuple(f"{name} {FINISHED}" for name in steps)
        self._terminal = terminal
        self._in_place = terminal.isatty()
        self._step = ""
        self._is_child_line = False
        self._on_progress = False
        self._silent: deque[str] = deque(maxlen=_REMEMBERED_LINES)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Take what the runner prints; the line after a lone indent is a step's."""
        if text == _INDENT:
            self._is_child_line = True
        elif self._is_child_line and text:
            self._is_child_line = False
            for line in text.splitlines():
                self._take(line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Flush the terminal."""
        self._terminal.flush()

    def reused(self, step: str) -> None:
        """Say that a step was skipped because nothing it depends on has changed."""
        self._show(f"{step}: unchanged, using the earlier result")

    def last_words(self) -> str:
        """Return what was said outside any step, newest last: an import error, for one."""
        return "\n".join(line for line in self._silent if line)

    def _take(self, line: str) -> None:
        if line in self._starts:
            self._step = self._starts[line]
            self._silent.clear()
            self._show(self._step)
        elif line.startswith(self._ends):
            self._show(_INDENT + line.removeprefix(self._step).strip())
            self._step = ""
        elif self._step and line:
            self._show(_INDENT + line, progress=bool(_PROGRESS.search(line)))
        else:
            self._silent.append(line)

    def _show(self, line: str, *, progress: bool = False) -> None:
        if self._in_place:
            # Erase to the end of the line: the bar before may have been longer.
            before = "\r" if self._on_progress and progress else "\n" if self._on_progress else ""
            self._terminal.write(f"{before}{line}\x1b[K" + ("" if progress else "\n"))
            self._on_progress = progress
        else:
            self._terminal.write(line + "\n")
        self._terminal.flush()


class CacheHits(logging.Handler):
    """Collects which steps the local runner skipped, and the cache entries that it used."""

    def __init__(self, console: StepConsole) -> None:
        super().__init__(logging.INFO)
        self.keys: dict[str, str] = {}
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of a cache hit; ignore every other record."""
        hit = _CACHE_HIT.search(record.getMessage())
        if hit:
            step = hit["step"].replace("-", "_")
            self.keys[step] = hit["key"]
            self._console.reused(step)
