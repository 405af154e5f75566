"""Reads user records for requests without making the event loop wait for a network.

A local store is read at once. Of a remote one, all reads asked for within one turn of the event
loop, or while another read is under way, go out together: batching is worth a factor of ten there.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from hiertcn.errors import ServingError
from hiertcn.serving.records.record import UserRecord
from hiertcn.serving.stores.store import RecordStore

_MAX_KEYS: Final = 1024
_MAX_UNDER_WAY: Final = 2


class RecordReader:
    """Asynchronous reads of a store.

    Args:
        store: the store.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._waiting: list[tuple[bytes, asyncio.Future[UserRecord | None]]] = []
        self._under_way = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(_MAX_UNDER_WAY, thread_name_prefix="record-reader")

    async def get(self, key: bytes) -> UserRecord | None:
        """The user's record, None if there is none.

        Raises:
            ServingError: the store cannot be reached.
        """
        if self._store.is_local:
            return self._store.get(key)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[UserRecord | None] = loop.create_future()
        if not self._waiting and self._under_way < _MAX_UNDER_WAY:
            loop.call_soon(self._leave)
        self._waiting.append((key, future))
        return await future

    async def get_many(self, keys: Sequence[bytes]) -> list[UserRecord | None]:
        """The users' records ``[n]``, None where there is none.

        Raises:
            ServingError: the store cannot be reached.
        """
        if self._store.is_local:
            return self._store.get_many(keys)
        return list(await asyncio.gather(*map(self.get, keys)))

    def is_damaged(self, key: bytes) -> bool:
        """Whether the user's record read as None only because it is damaged."""
        return key in self._store.damaged()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)

    def _leave(self) -> None:
        if not self._waiting or self._under_way >= _MAX_UNDER_WAY:
            return
        batch, self._waiting = self._waiting[:_MAX_KEYS], self._waiting[_MAX_KEYS:]
        self._under_way += 1
        task = asyncio.ensure_future(self._run(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: "list[tuple[bytes, asyncio.Future[UserRecord | None]]]") -> None:
        loop = asyncio.get_running_loop()
        try:
            keys = [key for key, _ in batch]
            found = await loop.run_in_executor(self._threads, self._store.get_many, keys)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(
                        error
                        if isinstance(error, ServingError)
                        else ServingError(f"user records could not be read ({error!r})")
                    )
        else:
            for (_, future), record in zip(batch, found, strict=True):
                if not future.done():
                    future.set_result(record)
        finally:
            self._under_way -= 1
            self._leave()
