"""What each edge partition was made of, and whether it would be made of the same again."""

import datetime
import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from hiertcn.files import sha256
from hiertcn.graph.log_fingerprints import DayFingerprint, log_fingerprints
from hiertcn.graph.options import GraphOptions

_KEY: Final = b"hiertcn.log"
_VERSION: Final = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DayLog:
    """What a partition was made of, as its file says it or as it would say it now.

    Attributes:
        events: digest of the rules and of the day's events.
        before: digest of the previous day's last events.
        files: digest of the rules and of the files' bytes: while it holds, rows need no reading.
        fingerprint: of the day's events.
    """

    events: str
    before: str
    files: str
    fingerprint: DayFingerprint

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """What goes into the partition's file, for :meth:`of_partition`."""
        return {_KEY: json.dumps(asdict(self)).encode()}

    @classmethod
    def of_partition(cls, path: Path) -> "DayLog | None":
        """Return what a partition says of itself, None if there is none or it cannot be read."""
        try:
            stored = json.loads((pq.read_metadata(path).metadata or {})[_KEY])
            parts = stored.pop("fingerprint")
            return cls(
                **stored,
                fingerprint=DayFingerprint(tuple(parts["events"]), tuple(parts["tail"])),
            )
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            _log.warning("%s cannot be read and is built again", path)
            return None


class EdgeLog:
    """What the partitions of a log should be made of, known as far as it has been read.

    A day that has no partition yet is not read for its fingerprint alone, if the day after it has
    none either: with ``codes`` it is fingerprinted while it is built, before that day.

    Args:
        files: the log's parquet files by date.
        partitions: where each date's partition lies or will lie.
        options: window, cap and threads.
        codes: whether building a day also tells its fingerprint.

    Raises:
        InputError: a file of the log cannot be read or is no such file.
    """

    def __init__(
        self,
        files: dict[str, list[Path]],
        partitions: dict[str, Path],
        options: GraphOptions,
        *,
        codes: bool,
    ) -> None:
        self.files = files
        self.partitions = partitions
        self.options = options
        self._rules = (_VERSION, options.window_s, options.max_followers)
        with ThreadPoolExecutor(options.thread_count) as pool:
            digests = list(pool.map(lambda day: [sha256(file) for file in day], files.values()))
        self._read = {
            date: _digest(self._rules, digest) for date, digest in zip(files, digests, strict=True)
        }
        self._stored = {date: DayLog.of_partition(partitions[date]) for date in files}
        self.fingerprints = {
            date: stored.fingerprint
            for date, stored in self._stored.items()
            if stored is not None and stored.files == self._read[date]
        }
        changed = {
            date: files[date]
            for date in files
            if date not in self.fingerprints
            and not (codes and self._is_new(date) and self._is_new(_next(date)))
        }
        self.fingerprints |= log_fingerprints(changed, options.window_s, options.threads)

    def of_day(self, date: str) -> DayLog:
        """Describe a day; it and the day before it must have been fingerprinted."""
        before = self.fingerprints.get(previous(date))
        tail = before.tail if before and before.tail[0] else None
        found = self.fingerprints[date]
        return DayLog(_digest(self._rules, found.events), _digest(tail), self._read[date], found)

    def is_current(self, date: str) -> bool:
        """Say whether the day's partition may stay."""
        stored = self._stored[date]
        if stored is None:
            return False
        wanted = self.of_day(date)
        # A log that begins at this date has lost the events before it, the partition has not.
        is_first = date == min(self.files)
        return stored.events == wanted.events and (is_first or stored.before == wanted.before)

    def _is_new(self, date: str) -> bool:
        return self._stored.get(date) is None


def previous(date: str) -> str:
    """Return the date of the day before, both ``YYYY-MM-DD``."""
    return (datetime.date.fromisoformat(date) - datetime.timedelta(days=1)).isoformat()


def _next(date: str) -> str:
    return (datetime.date.fromisoformat(date) + datetime.timedelta(days=1)).isoformat()


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:32]
