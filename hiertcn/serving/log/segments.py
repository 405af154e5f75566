"""The files of an event log's folder: numbered segments, and what is kept of each beside it.

A segment that is sealed grows no more. Once its events lie in parquet a marker of the same number
says so, and how new the newest of them is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hiertcn.files import read_json, whole_file, write_json
from hiertcn.serving.log.entries import LoggedInteraction, framed, read_segment, void
from hiertcn.serving.records.record import user_key

IDENTITY_FILE: Final = "identity"


@dataclass(frozen=True, kw_only=True)
class SealedSegment:
    """A segment that grows no more; ``last_us`` is its newest event time, None without events."""

    number: int
    path: Path
    exported: bool
    last_us: int | None


def log_identity(directory: Path) -> str:
    """The name of the log in a folder, which `EventLog.identity` has given it."""
    return (directory / IDENTITY_FILE).read_text()


def segment_numbers(directory: Path) -> list[int]:
    """Number of each segment of the log in a folder, oldest first."""
    return sorted(int(path.stem) for path in directory.glob("*.log") if path.stem.isdecimal())


def segment_path(directory: Path, number: int) -> Path:
    """Where a segment lies."""
    return directory / f"{number:012d}.log"


def segment_paths(directory: Path) -> list[tuple[int, Path]]:
    """Number and file of each segment of the log in a folder, oldest first."""
    return [(number, segment_path(directory, number)) for number in segment_numbers(directory)]


def is_exported(directory: Path, number: int) -> bool:
    """Whether a segment's events lie in parquet."""
    return _marker_path(directory, number).exists()


def mark_exported(directory: Path, number: int, *, events: int, last_us: int | None) -> None:
    """Note that a sealed segment's events lie in parquet."""
    write_json(_marker_path(directory, number), {"events": events, "last_us": last_us})


def sealed_segment(directory: Path, number: int) -> SealedSegment:
    """Describe a segment that grows no more."""
    exported = is_exported(directory, number)
    return SealedSegment(
        number=number,
        path=segment_path(directory, number),
        exported=exported,
        last_us=read_json(_marker_path(directory, number))["last_us"] if exported else None,
    )


def erase(segment: SealedSegment, deleted: Mapping[bytes, int], *, whole: bool) -> None:
    """Rewrite a sealed segment with the deleted users' interactions void.

    Args:
        segment: the segment.
        deleted: the users' keys, and at which entry of the segment each was deleted.
        whole: the deletions came after this segment, so all of the users' entries go.
    """
    data = bytearray(segment.path.read_bytes())
    for order, (end, entry) in enumerate(read_segment(segment.path)):
        if isinstance(entry, LoggedInteraction):
            key = user_key(entry.user_id)
            if key in deleted and (whole or order < deleted[key]):
                size = len(framed(entry))
                data[end - size : end] = void(size)
    with whole_file(segment.path) as aside:
        aside.write_bytes(data)
    segment.path.with_suffix(".torn").unlink(missing_ok=True)


def drop(directory: Path, number: int) -> None:
    """Remove a sealed, exported segment."""
    segment_path(directory, number).unlink(missing_ok=True)
    _marker_path(directory, number).unlink(missing_ok=True)


def _marker_path(directory: Path, number: int) -> Path:
    return directory / f"{number:012d}.exported.json"
