"""Runs concurrent requests as one: the gathering, and the two models on what was gathered.

An item leaves with those that came before the event loop fell quiet, or when its delay is over;
while a batch is under way, items gather until it ends, so batches grow with the load. grpc.aio
handles one event a turn of the loop and a request takes several, so a batch that left at the first
chance would hold one request, and its work would keep the next ones out. Triton groups only equal
shapes, so sessions are padded to length buckets. Everything runs on the event loop's thread.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import ServingError
from hiertcn.export.tensors import (
    GRU_STEP,
    LENGTH_BUCKETS,
    NEXT_STATE,
    OUTPUTS,
    SESSION_ITEMS,
    SESSION_LENGTH,
    SESSION_MEAN,
    STATE,
    TCN,
    USER_EMBEDDING,
    USER_STATE,
    TensorSpec,
)
from hiertcn.serving.inference.breaker import CircuitBreaker
from hiertcn.serving.inference.inference import Inference
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.releases.serving_release import ServingRelease

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# While one runs the next one gathers; a second would only split it.
_MAX_UNDER_WAY: Final = 1
# A request comes in over some events, each of which takes a turn, and so do the answers before it.
_QUIET_TURNS: Final = 4
_MOST_QUIET_TURNS: Final = 40
# Of the delay: while nothing is under way few come, and waiting for them costs more than it saves.
_IDLE_SHARE: Final = 0.125
_COMPLAIN_EVERY_S: Final = 5.0
_MAX_SENT: Final = LENGTH_BUCKETS[-1]


class Gatherer(Generic[Item]):
    """Gathers items of equal keys and runs each gathering once.

    Args:
        run: runs the items of one key; what it raises is logged, so it has to tell the items.
        max_batch: items at which a gathering leaves at once.
        max_delay_s: longest an item waits after the run before, in seconds; an eighth of it where
            none was under way.
    """

    def __init__(
        self,
        run: Callable[[Hashable, list[Item]], Awaitable[None]],
        *,
        max_batch: int,
        max_delay_s: float,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._waiting: dict[Hashable, list[Item]] = {}
        self._timers: dict[Hashable, asyncio.Handle] = {}
        self._under_way: dict[Hashable, int] = {}
        self._last = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, key: Hashable, item: Item) -> None:
        """Queue an item."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(key, [])
        waiting.append(item)
        if self._under_way.get(key, 0) < _MAX_UNDER_WAY:
            if len(waiting) >= self._max_batch:
                self._leave(key)
            elif key not in self._timers:
                until = loop.time() + _IDLE_SHARE * self._max_delay_s
                self._timers[key] = loop.call_soon(self._settle, key, 0, 0, until)

    @property
    def waiting(self) -> int:
        """Items that have not left yet; to be read from any thread."""
        return sum(map(len, list(self._waiting.values())))

    def _settle(self, key: Hashable, seen: int, quiet: int, until: float) -> None:
        """Let the items leave once some turns of the loop brought no more of them."""
        loop, count = asyncio.get_running_loop(), len(self._waiting.get(key, ()))
        quiet = quiet + 1 if count == seen else 0
        # Callers who were answered together mostly come back together.
        if quiet >= min(_MOST_QUIET_TURNS, _QUIET_TURNS * (1 + self._last)) or loop.time() >= until:
            self._leave(key)
        else:
            self._timers[key] = loop.call_soon(self._settle, key, count, quiet, until)

    def _leave(self, key: Hashable) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        waiting = self._waiting.pop(key, None)
        if not waiting:
            return
        batch, rest = waiting[: self._max_batch], waiting[self._max_batch :]
        self._last = len(batch)
        if rest:
            self._waiting[key] = rest
        self._under_way[key] = self._under_way.get(key, 0) + 1
        task = asyncio.ensure_future(self._run_batch(key, batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_batch(self, key: Hashable, batch: list[Item]) -> None:
        try:
            await self._run(key, batch)
        except Exception:
            _log.exception("a batch of %d met an error that it did not answer", len(batch))
        finally:
            left = self._under_way[key] - 1
            if left:
                self._under_way[key] = left
            else:
                del self._under_way[key]
            if key in self._waiting and key not in self._timers:
                until = asyncio.get_running_loop().time() + self._max_delay_s
                self._settle(key, 0, 0, until)


class BatchQueue(Generic[Item, Result]):
    """A :class:`Gatherer` whose items each get a result, or the error of their batch.

    Args:
        run: runs the items of one key; returns one result for each.
        max_batch: items at which a gathering leaves at once.
        max_delay_s: longest an item waits, in seconds.
    """

    def __init__(
        self,
        run: Callable[[Hashable, list[Item]], Awaitable[Sequence[Result]]],
        *,
        max_batch: int,
        max_delay_s: float,
    ) -> None:
        self._run = run
        self._gatherer: Gatherer[tuple[Item, asyncio.Future[Result]]] = Gatherer(
            self._answer, max_batch=max_batch, max_delay_s=max_delay_s
        )

    @property
    def waiting(self) -> int:
        """Items that have not left yet."""
        return self._gatherer.waiting

    def submit(self, key: Hashable, item: Item) -> "asyncio.Future[Result]":
        """Queue an item; the future gives its result."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._gatherer.add(key, (item, future))
        return future

    async def _answer(
        self, key: Hashable, batch: list[tuple[Item, "asyncio.Future[Result]"]]
    ) -> None:
        try:
            results = await self._run(key, [item for item, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)


class ModelBatcher:
    """The two served models, batched over concurrent requests.

    Args:
        inference: what runs the models.
        metrics: where batch sizes and times are counted.
        max_batch: most requests in one call.
        max_delay_s: longest a request waits for others, in seconds.
        deadline_s: longest one call may take, in seconds.
    """

    def __init__(
        self,
        inference: Inference,
        metrics: Metrics,
        *,
        max_batch: int = 64,
        max_delay_s: float = 0.001,
        deadline_s: float = 0.2,
    ) -> None:
        self._inference = inference
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._complained_at = -_COMPLAIN_EVERY_S
        self._breakers = {model: _breaker(model, metrics) for model in (TCN, GRU_STEP)}
        self._gru: BatchQueue[
            tuple[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]
        ] = BatchQueue(self._run_gru, max_batch=max_batch, max_delay_s=max_delay_s)
        metrics.queue_depth.labels(GRU_STEP).set_function(lambda: self._gru.waiting)

    async def user_embeddings(
        self,
        release: ServingRelease,
        session_rows: Sequence[NDArray[np.int32]],
        user_states: Sequence[NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """The dynamic user embeddings (HierTCN Eq. 11) of one batch, float32 ``[n, dim]``.

        Args:
            release: the release whose model and vectors to use.
            session_rows: the open sessions' items, each int32 ``[length]``, oldest first; of each
                only the newest 128 are sent, which covers the TCN's receptive field, padded to the
                bucket of the longest.
            user_states: each float32 ``[hidden]``, top layer of the state before this session.

        Raises:
            ServingError: the models do not answer in time.
        """
        sent = [rows[-_MAX_SENT:] for rows in session_rows]
        lengths = np.fromiter(map(len, sent), np.int32, len(sent))
        length = length_bucket(int(lengths.max()))
        session_items = np.zeros((len(sent), length, release.dim), np.float32)
        if lengths.any():
            # One gather for the whole batch; the model wants the newest item first.
            newest_first = np.concatenate([rows[::-1] for rows in sent])
            real = np.arange(length) < lengths[:, None]
            session_items[real] = release.table.gather(newest_first)
        return await self._timed(
            TCN,
            release,
            (
                (SESSION_ITEMS, session_items),
                (SESSION_LENGTH, lengths[:, None]),
                (USER_STATE, np.stack(user_states)),
            ),
        )

    def next_state(
        self,
        release: ServingRelease,
        state: NDArray[np.float32],
        session_mean: NDArray[np.float32],
    ) -> "asyncio.Future[NDArray[np.float32]]":
        """The state after a closed session (HierTCN Eq. 10), float32 ``[layers, hidden]``.

        Args:
            release: the release whose model to use.
            state: float32 ``[layers, hidden]``.
            session_mean: float32 ``[dim]``, mean vector of the session's items.

        The future raises ServingError if Triton does not answer in time.
        """
        return self._gru.submit(release, (state, session_mean))

    async def next_states(
        self,
        release: ServingRelease,
        states: NDArray[np.float32],
        session_means: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """The states after closed sessions of ``n`` users, in one call.

        Args:
            release: the release whose model to use.
            states: float32 ``[n, layers, hidden]``, at most 1024.
            session_means: float32 ``[n, dim]``.

        Raises:
            ServingError: the model does not answer in time.
        """
        return await self._timed(
            GRU_STEP, release, ((STATE, states), (SESSION_MEAN, session_means))
        )

    async def warm(self, release: ServingRelease, *, timeout_s: float = 60.0) -> None:
        """Run every length bucket and the GRU once, so no user pays for a first execution.

        Raises:
            ServingError: Triton does not run a model of the release.
        """
        layers, hidden = release.start_state.shape
        for length in LENGTH_BUCKETS:
            for batch in (1, 8):
                await self._inference.run(
                    TCN,
                    release.number,
                    (
                        (SESSION_ITEMS, np.zeros((batch, length, release.dim), np.float32)),
                        (SESSION_LENGTH, np.full((batch, 1), length, np.int32)),
                        (USER_STATE, np.zeros((batch, hidden), np.float32)),
                    ),
                    USER_EMBEDDING,
                    timeout_s=timeout_s,
                )
        await self._inference.run(
            GRU_STEP,
            release.number,
            (
                (STATE, np.zeros((1, layers, hidden), np.float32)),
                (SESSION_MEAN, np.zeros((1, release.dim), np.float32)),
            ),
            NEXT_STATE,
            timeout_s=timeout_s,
        )
        for breaker in self._breakers.values():
            breaker.succeeded()

    async def _run_gru(
        self, key: Hashable, batch: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    ) -> Sequence[NDArray[np.float32]]:
        assert isinstance(key, ServingRelease)
        states = await self._timed(
            GRU_STEP,
            key,
            (
                (STATE, np.stack([state for state, _ in batch])),
                (SESSION_MEAN, np.stack([mean for _, mean in batch])),
            ),
        )
        return list(states)

    async def _timed(
        self, model: str, release: ServingRelease, inputs: Sequence[tuple[TensorSpec, NDArray[Any]]]
    ) -> NDArray[np.float32]:
        output = OUTPUTS[model][0]
        breaker = self._breakers[model]
        if not breaker.allows():
            raise ServingError(f"{model} keeps failing and is not asked for a moment")
        began = time.perf_counter()
        try:
            result: NDArray[np.float32] = await self._inference.run(
                model, release.number, inputs, output, timeout_s=self._deadline_s
            )
        except ServingError as error:
            breaker.failed()
            self._metrics.model_errors.labels(model).inc()
            if began - self._complained_at > _COMPLAIN_EVERY_S:
                self._complained_at = began
                _log.warning("%s; ranking without the model", error)
            raise
        breaker.succeeded()
        self._metrics.model_seconds.labels(model).observe(time.perf_counter() - began)
        self._metrics.model_batch.labels(model).observe(len(result))
        return result


def _breaker(model: str, metrics: Metrics) -> CircuitBreaker:
    is_open = metrics.breaker_open.labels(model)
    is_open.set(0)

    def changed(opened: bool) -> None:
        is_open.set(opened)
        metrics.breaker_changes.labels(model, "open" if opened else "closed").inc()
        _log.warning("%s", f"{model} is not asked any more" if opened else f"{model} answers again")

    return CircuitBreaker(changed=changed)


def length_bucket(length: int) -> int:
    """The padded length of a session of ``length`` items; longer than the largest is cut to it."""
    return next((bucket for bucket in LENGTH_BUCKETS if length <= bucket), _MAX_SENT)
