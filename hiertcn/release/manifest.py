"""The manifest of a release: every file with its size and SHA-256, written last.

A release exists exactly if its manifest does. Checking one reads every file once (hashing runs
at the disk's speed), which is what activation pays to never serve a damaged file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hiertcn.errors import InputError, ReleaseError
from hiertcn.files import read_json, sha256, write_json

FORMAT: Final = 1
_RECOVERY: Final = "publish the release again or roll back to another"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file: ``path`` relative to the repository's root, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a release consists of and where it comes from.

    ``settings`` hold the shapes that all its parts agree on (``dim``, ``layers``, ``hidden``) and
    the session gap ``gap_us``; ``parent`` is the release that was serving when it was published.
    """

    release: int
    created_us: int
    watermark_us: int
    parent: int | None
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    files: tuple[FileEntry, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files)

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(
            path,
            {
                "format": FORMAT,
                "release": self.release,
                "created_us": self.created_us,
                "watermark_us": self.watermark_us,
                "parent": self.parent,
                "settings": dict(self.settings),
                "metrics": dict(self.metrics),
                "files": [vars(entry) for entry in self.files],
            },
        )

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest.

        Raises:
            ReleaseError: the file is missing, is not a manifest, or is of another format.
        """
        try:
            value = read_json(path)
        except InputError as error:
            raise ReleaseError(f"{error}; {_RECOVERY}") from None
        found = value.get("format") if isinstance(value, dict) else None
        if found != FORMAT:
            raise ReleaseError(
                f"{path} has manifest format {found}; this version reads format {FORMAT}: "
                f"{_RECOVERY}"
            )
        try:
            return cls(
                release=int(value["release"]),
                created_us=int(value["created_us"]),
                watermark_us=int(value["watermark_us"]),
                parent=None if value["parent"] is None else int(value["parent"]),
                settings=dict(value["settings"]),
                metrics=dict(value["metrics"]),
                files=tuple(FileEntry(**entry) for entry in value["files"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReleaseError(
                f"{path} is not a complete manifest ({error!r}); {_RECOVERY}"
            ) from None

    def check(self, root: Path, *, checksums: bool = True) -> None:
        """Hold every file below ``root`` against its entry.

        Raises:
            ReleaseError: naming the first file that is missing, of another size, or (with
                ``checksums``) of another content.
        """
        for entry in self.files:
            path = root / entry.path
            if not path.is_file():
                raise ReleaseError(
                    f"release {self.release} lacks the file {path} that its manifest names; "
                    f"{_RECOVERY}"
                )
            size = path.stat().st_size
            if size != entry.bytes:
                raise ReleaseError(
                    f"{path} of release {self.release} has {size} bytes; its manifest expects "
                    f"{entry.bytes}: {_RECOVERY}"
                )
            if checksums and (digest := sha256(path)) != entry.sha256:
                raise ReleaseError(
                    f"{path} of release {self.release} has SHA-256 {digest}; its manifest "
                    f"expects {entry.sha256}: {_RECOVERY}"
                )
