"""Long work that leaves requests their share of the event loop, or of a processor."""

import asyncio
import os
import threading
import time
from typing import Final

_LONGEST_S: Final = 0.002
_REST: Final = 2.0


def give_way() -> None:
    """Have this thread, and those it starts, run only where a processor has nothing else to do.

    A lower nice value does not do: such a thread keeps its processor for milliseconds from what
    wakes up to answer a request, which needs several wake-ups (``SCHED_IDLE``, sched(7)). Not for
    threads that hold the GIL of requests for long: they would hold it while they wait.
    """
    os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))


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
