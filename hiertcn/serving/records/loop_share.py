"""Long work on the event loop that leaves requests their share of it."""

import asyncio
import time
from typing import Final

_LONGEST_S: Final = 0.002
_REST: Final = 2.0


class LoopShare:
    """A third of the event loop, in pieces of 2 ms, for work that is not waited for."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    async def leave(self) -> None:
        """Call between small pieces of work: every 2 ms it sleeps for twice as long as was worked.

        Time spent waiting elsewhere counts as work; call :meth:`resume` after it.
        """
        worked_s = time.monotonic() - self._since
        if worked_s >= _LONGEST_S:
            await asyncio.sleep(_REST * worked_s)
            self._since = time.monotonic()

    def resume(self) -> None:
        """Begin to work now."""
        self._since = time.monotonic()
