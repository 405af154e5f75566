"""Has active users rebuilt for a new release before it serves, so its first requests find states.

A record belongs to the serving release until the flip, so what is rebuilt waits in a file: the
records of everyone who interacted in the last day, made by a process of its own
(``rebuilding.py``). At the flip they are handed to the writer, which keeps each whose record did
not change meanwhile; a second pass rebuilds the rest. Whoever asks before their turn is rebuilt at
that touch, as always: the warmer saves time and decides nothing.
"""

import asyncio
import contextlib
import itertools
import logging
import sys
import tempfile
from typing import BinaryIO, Final

from hiertcn.errors import HiertcnError
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.options import SidecarOptions
from hiertcn.serving.processes.die_with_parent import dying_with_parent
from hiertcn.serving.records.batch_fold import settled_until_us
from hiertcn.serving.records.loop_share import LoopShare
from hiertcn.serving.records.rebuilding import Rebuilding, rebuilt_records
from hiertcn.serving.records.record import decode
from hiertcn.serving.records.writer import RecordWriter
from hiertcn.serving.releases.serving_release import ServingRelease
from hiertcn.serving.stores.store import RecordStore

_log = logging.getLogger(__name__)

_ACTIVE_US: Final = 86_400_000_000
_HANDED_OVER: Final = 32
_PASSES: Final = 3
_FEW: Final = 10_000
"""Records or users that are gone through before anybody notices."""
_PROGRAM: Final = "hiertcn.serving.records.rebuilding"


class Warmer:
    """Rebuilds the active users of one store.

    Args:
        options: of the sidecar, whose store another process opens with them.
        store: the records, written by ``writer``.
        writer: keeps what was rebuilt.
        recent: what was recorded, whose time folding goes by.
        metrics: where rebuilds are counted.
        longest_s: seconds after which the flip is not held up any longer.
    """

    def __init__(
        self,
        options: SidecarOptions,
        store: RecordStore,
        writer: RecordWriter,
        recent: RecentInteractions,
        metrics: Metrics,
        *,
        longest_s: float = 60.0,
    ) -> None:
        self._options = options
        self._store = store
        self._writer = writer
        self._recent = recent
        self._metrics = metrics
        self._longest_s = longest_s
        self._files = contextlib.ExitStack()
        self._staged: BinaryIO | None = None
        self._task: asyncio.Task[None] | None = None

    async def stage(self, release: ServingRelease) -> int:
        """Rebuild the active users under a release that does not serve yet; return how many.

        Failing or running out of time costs rebuilds at first touch, so it is logged, not raised.
        """
        await self.close()
        try:
            self._staged = self._opened()
            return await self._stage(release, self._staged)
        except (HiertcnError, OSError) as error:
            _log.warning("active users are rebuilt at their next touch: %s", error)
            return 0

    async def keep(self, release: ServingRelease) -> None:
        """Hand over what was staged, if the release was; then rebuild who is left. Does not wait.

        Args:
            release: which serves now.
        """
        staged, self._staged = self._staged, None
        if staged is None:
            await self.close()
        self._task = asyncio.create_task(self._keep(release, staged))

    async def kept(self) -> None:
        """Wait until everything was handed over."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Stop and forget what is staged."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        self._files.close()
        self._staged = None
        self._metrics.warming.set(0)

    def _opened(self) -> BinaryIO:
        self._metrics.warming.set(1)
        return self._files.enter_context(
            tempfile.TemporaryFile(dir=self._options.state_dir, prefix="warm-")
        )

    async def _keep(self, release: ServingRelease, staged: BinaryIO | None) -> None:
        try:
            staged = staged or self._opened()
            for _ in range(_PASSES):
                await self._hand_over(staged)
                # Freeing the blocks of a large file takes a while.
                await asyncio.to_thread(staged.truncate, 0)
                staged.seek(0)
                if not await self._stage(release, staged):
                    break
            _log.info("active users are rebuilt under release %d", release.number)
        except (HiertcnError, OSError) as error:
            _log.warning("active users are rebuilt at their next touch: %s", error)
        finally:
            self._metrics.warming.set(0)

    async def _hand_over(self, staged: BinaryIO) -> None:
        share = LoopShare()
        rebuilt = rebuilt_records(staged)
        while some := list(itertools.islice(rebuilt, _HANDED_OVER)):
            share.resume()
            for key, base, stored in some:
                self._writer.keep_fold(key, base, decode(stored))
            # The writing thread keeps the event loop waiting, too.
            await self._writer.caught_up()
            self._metrics.rebuilds.inc(len(some))
            await share.leave()

    async def _stage(self, release: ServingRelease, file: BinaryIO) -> int:
        records = len(self._store) if self._store.is_local else None
        if records == 0:
            return 0
        settled_us = settled_until_us(release, self._recent)
        asked = Rebuilding(
            sidecar=self._options,
            release=release.number,
            active_since_us=settled_us - _ACTIVE_US,
            folded_until_us=settled_us,
            only_known=len(release.overlay) > 0,
            aside=records is None or max(records, len(release.snapshot.users)) > _FEW,
        )
        process = await asyncio.create_subprocess_exec(
            *dying_with_parent(sys.executable, "-m", _PROGRAM, str(file.fileno())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[file.fileno()],
        )
        try:
            async with asyncio.timeout(self._longest_s):
                count, _ = await process.communicate(asked.to_json().encode())
        except TimeoutError:
            _log.warning("release %d flips before all active users are rebuilt", release.number)
            return await asyncio.to_thread(_count, file)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            _log.warning("some active users are rebuilt only at their next touch")
            return 0
        return int(count)


def _count(file: BinaryIO) -> int:
    return sum(1 for _ in rebuilt_records(file))
