"""Remembers whose checksums were right, so that a restart need not read gigabytes again.

A file counts as the one that was verified while its size, its times of modification and of change,
its inode number and the checksum that its manifest expects are the same. So whatever is written to
it, or put in its place, is found at the next start; what a disk returns wrongly of a file that
nobody wrote is found when the file is verified anew, on another machine or with another folder.
"""

import contextlib
from pathlib import Path
from typing import Any

from hiertcn.errors import InputError
from hiertcn.files import read_json, write_json
from hiertcn.release.manifest import Manifest
from hiertcn.release.repository import ReleaseRepository


class VerifiedFiles:
    """The releases of one repository that were verified here.

    Args:
        path: the JSON file that remembers them; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def verify(self, repository: ReleaseRepository, release: int) -> None:
        """Hold every file of the release against its manifest, computing only new checksums.

        Raises:
            ReleaseError: the release is unknown, incomplete or damaged, naming the bad file.
        """
        manifest = repository.verify(release, checksums=False)
        # Before the checksums: a file that changes meanwhile is not the one that was verified.
        identities = _identities(repository, manifest)
        if self._known().get(str(release)) == identities:
            return
        manifest.check(repository.root)
        kept = {str(number) for number in repository.numbers()}
        known = {number: value for number, value in self._known().items() if number in kept}
        with contextlib.suppress(InputError, OSError):
            write_json(self._path, {**known, str(release): identities})

    def _known(self) -> dict[str, Any]:
        try:
            known = read_json(self._path)
        except InputError:
            return {}
        return known if isinstance(known, dict) else {}


def _identities(repository: ReleaseRepository, manifest: Manifest) -> dict[str, list[Any]]:
    identities: dict[str, list[Any]] = {}
    for entry in manifest.files:
        stat = (repository.root / entry.path).stat()
        times = [stat.st_mtime_ns, stat.st_ctime_ns]
        identities[entry.path] = [entry.sha256, stat.st_size, *times, stat.st_ino]
    return identities
