"""Makes the next batches in a thread while the current one is trained on.

Worth a thread, not processes: building a batch runs compiled and without the GIL, and a thread
hands its arrays over for nothing. The order of batches is the iterator's own.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Final, TypeVar

_T = TypeVar("_T")

_POLL_S: Final = 0.1


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(items: Iterator[_T], ahead: int) -> Iterator[_T]:
    """Yield what ``items`` yields, up to ``ahead`` of them made before they are asked for.

    The thread ends with the iterator, or soon after this generator is closed. An error of the
    iterator is raised here, at its place. ``ahead`` 0 uses no thread.
    """
    if ahead == 0:
        yield from items
        return
    made: queue.Queue[_T | _End] = queue.Queue(ahead)
    closed = threading.Event()

    def put(item: _T | _End) -> bool:
        while not closed.is_set():
            try:
                made.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        error = None
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as raised:
            error = raised
        put(_End(error))

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        thread.join()
