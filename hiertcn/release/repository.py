"""The release repository: a folder of immutable releases and one pointer to the serving one.

    root/triton_repo/<model>/config.pbtxt          shared by all versions of the model
    root/triton_repo/<model>/<release>/model.onnx  one Triton version per release
    root/releases/<release>/…                      everything else of the release
    root/releases/<release>/manifest.json          written last: a release without it is not one
    root/current.json                              {"release": N, "previous": M or null}

Readers need no lock: releases never change and the pointer is replaced atomically. Writers
(publish, activate, roll back, prune) take one lock file, which the kernel frees when its holder
dies. Works on any POSIX file system with atomic rename; it does not work on object stores, which
a pipeline mounts or copies from.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from hiertcn.errors import InputError, ReleaseError
from hiertcn.export.tensors import GRU_STEP, ITEM_ENCODER, TCN
from hiertcn.files import read_json, write_json
from hiertcn.release.manifest import Manifest

MODELS: Final = (TCN, GRU_STEP)
"""The Triton models that every release brings a version of."""

OPTIONAL_MODELS: Final = (ITEM_ENCODER,)
"""The Triton models that a release may bring a version of."""

_log = logging.getLogger(__name__)
_LAST_OF_A_DAY: Final = 99
_LOCK_POLL_S: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class ReleaseInfo:
    """One line of the release list. Times are int64 microseconds since the epoch, UTC."""

    number: int
    created_us: int
    watermark_us: int
    parent: int | None
    metrics: Mapping[str, Any]
    bytes: int
    is_current: bool
    is_previous: bool


class ReleaseRepository:
    """Reads and flips releases below ``root`` (which may also be given as its ``triton_repo``)."""

    def __init__(self, root: Path | str) -> None:
        path = Path(root)
        self.root = (path.parent if path.name == "triton_repo" else path).absolute()

    @property
    def triton_repository(self) -> Path:
        """The folder that Triton is started on."""
        return self.root / "triton_repo"

    def path(self, release: int) -> Path:
        """The folder of the release's parts."""
        return self.root / "releases" / str(release)

    def model_path(self, model: str, release: int) -> Path:
        """The release's version of a Triton model: ``…/<model>/<release>/model.onnx``."""
        return self.triton_repository / model / str(release) / "model.onnx"

    def has_model(self, model: str, release: int) -> bool:
        """Whether the release brings a version of the model."""
        return self.model_path(model, release).is_file()

    def current(self) -> int | None:
        """The release that serves, or None before the first activation.

        Raises:
            ReleaseError: ``current.json`` is not a pointer.
        """
        return self._pointer()[0]

    def previous(self) -> int | None:
        """The release that ``roll_back`` would return to, or None."""
        return self._pointer()[1]

    def numbers(self) -> list[int]:
        """Numbers of all complete releases, oldest first."""
        return sorted(
            int(path.parent.name)
            for path in self.root.glob("releases/*/manifest.json")
            if path.parent.name.isdecimal()
        )

    def releases(self) -> list[ReleaseInfo]:
        """All complete releases, oldest first; one with an unreadable manifest is left out."""
        current, previous = self._pointer()
        found = []
        for number in self.numbers():
            try:
                manifest = self.manifest(number)
            except ReleaseError as error:
                _log.warning("%s", error)
                continue
            found.append(
                ReleaseInfo(
                    number=number,
                    created_us=manifest.created_us,
                    watermark_us=manifest.watermark_us,
                    parent=manifest.parent,
                    metrics=manifest.metrics,
                    bytes=manifest.total_bytes,
                    is_current=number == current,
                    is_previous=number == previous,
                )
            )
        return found

    def next_number(self, data_date: str) -> int:
        """The next free release number ``YYYYMMDDNN`` of a data date ``YYYY-MM-DD``.

        A data date given as an instant counts as the day it falls in. Numbers of killed
        publishers are free again.

        Raises:
            InputError: not a date, or all 99 numbers of that day are taken.
        """
        day = data_date[:10]
        try:
            time.strptime(day, "%Y-%m-%d")
        except ValueError:
            raise InputError(
                f"data date {data_date!r} does not start with a date; expected YYYY-MM-DD"
            ) from None
        first = int(day.replace("-", "")) * 100
        taken = [number - first for number in self.numbers() if 0 < number - first <= 99]
        number = max(taken, default=0) + 1
        if number > _LAST_OF_A_DAY:
            raise InputError(
                f"{self.root} already holds release {first + _LAST_OF_A_DAY}, the last number of "
                f"{day}; prune releases of that day or publish another data date"
            )
        return first + number

    def manifest(self, release: int) -> Manifest:
        """The release's manifest.

        Raises:
            ReleaseError: there is no such release, or its manifest is unreadable.
        """
        path = self.path(release) / "manifest.json"
        if not path.is_file():
            held = ", ".join(map(str, self.numbers())) or "none"
            raise ReleaseError(
                f"{self.root} holds no release {release}; complete releases there: {held}"
            )
        manifest = Manifest.read(path)
        if manifest.release != release:
            raise ReleaseError(
                f"{path} is the manifest of release {manifest.release}, not of {release}; "
                "publish the release again"
            )
        return manifest

    def verify(self, release: int, *, checksums: bool = True) -> Manifest:
        """Hold every file of the release against its manifest.

        Raises:
            ReleaseError: the release is unknown, incomplete or damaged, naming the bad file.
        """
        manifest = self.manifest(release)
        named = {entry.path for entry in manifest.files}
        for model in (*MODELS, *OPTIONAL_MODELS):
            path = self.model_path(model, release)
            if str(path.relative_to(self.root)) not in named:
                if model in OPTIONAL_MODELS:
                    continue
                raise ReleaseError(
                    f"the manifest of release {release} does not name {path}; publish it again"
                )
            config = path.parents[1] / "config.pbtxt"
            if not config.is_file():
                raise ReleaseError(
                    f"{config} is missing, so Triton cannot load release {release}; publish again"
                )
        manifest.check(self.root, checksums=checksums)
        return manifest

    def activate(self, release: int, *, checksums: bool = True) -> Manifest:
        """Verify a release and point ``current.json`` at it; the one before becomes previous.

        Activating the current release again changes nothing.

        Args:
            release: its number.
            checksums: see :meth:`verify`; False for who has just compared them.

        Raises:
            ReleaseError: the release must not be served; the pointer stays.
        """
        with self.lock():
            manifest = self.verify(release, checksums=checksums)
            current, _ = self._pointer()
            if release != current:
                self._point(release, current)
        return manifest

    def roll_back(self) -> int:
        """Point back at the previous release and return its number.

        The release left behind becomes previous, so a second roll-back undoes the first.

        Raises:
            ReleaseError: there is no previous release, or it is damaged; the pointer stays.
        """
        with self.lock():
            current, previous = self._pointer()
            if previous is None:
                raise ReleaseError(
                    f"{self.root} has no previous release to roll back to; activate one by number"
                )
            self.verify(previous)
            self._point(previous, current)
        return previous

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest ``keep`` releases; return the numbers removed.

        The current and the previous release always stay, and what a sidecar serves (see
        :meth:`hold`), which may be behind the pointer.

        Raises:
            InputError: ``keep`` is below 1.
        """
        if keep < 1:
            raise InputError(f"keep is {keep}; expected at least 1 release")
        with self.lock():
            kept = {*self.numbers()[-keep:], *self._pointer()}
            return [
                number
                for number in self.numbers()
                if number not in kept and self._remove_unless_held(number)
            ]

    def hold(self, release: int) -> BinaryIO:
        """Keep a release from being pruned until the file returned is closed, or its holder dies.

        Raises:
            ReleaseError: there is no such release, or it is being removed.
        """
        self.manifest(release)
        try:
            file = (self.path(release) / "manifest.json").open("rb")
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise ReleaseError(
                f"release {release} of {self.root} is being removed ({error.strerror}); activate "
                "another"
            ) from None
        return file

    def _remove_unless_held(self, release: int) -> bool:
        # Network file systems grant an exclusive lock only to who may write.
        with (self.path(release) / "manifest.json").open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("release %d stays: a sidecar serves it", release)
                return False
            self.remove(release)
        return True

    def remove(self, release: int) -> None:
        """Delete whatever exists under a release number; the caller holds the lock."""
        # Without its manifest it is no release any more, whatever happens to the rest.
        (self.path(release) / "manifest.json").unlink(missing_ok=True)
        for model in (*MODELS, *OPTIONAL_MODELS):
            shutil.rmtree(self.model_path(model, release).parent, ignore_errors=True)
        shutil.rmtree(self.path(release), ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Delete what killed publishers left without a manifest; the caller holds the lock."""
        complete = set(self.numbers())
        folders = [*self.root.glob("releases/*/"), *self.triton_repository.glob("*/*/")]
        for path in folders:
            if path.name.isdecimal() and int(path.name) not in complete:
                _log.warning("removing %s, left by a publisher that did not finish", path)
                shutil.rmtree(path, ignore_errors=True)
        for path in [*self.root.glob(".*.partial"), *self.triton_repository.glob("*/.*.partial")]:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, *, wait_s: float = 600.0) -> Iterator[None]:
        """Hold the repository's writer lock.

        Raises:
            InputError: another process still holds it after ``wait_s`` seconds, or the
                repository cannot be written to.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            path = self.root / ".lock"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(
                f"the release repository {self.root} cannot be written to ({error.strerror}); "
                "expected a writable folder, or room for one"
            ) from None
        try:
            deadline = time.monotonic() + wait_s
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip()
                    raise InputError(
                        f"{self.root} is locked by another publisher (process {holder or '?'}) "
                        f"for over {wait_s:g} s; wait for it to finish and run again"
                    )
                time.sleep(_LOCK_POLL_S)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _pointer(self) -> tuple[int | None, int | None]:
        path = self.root / "current.json"
        if not path.exists():
            return None, None
        try:
            value = read_json(path)
            release, previous = value["release"], value["previous"]
        except (InputError, KeyError, TypeError):
            raise _bad_pointer(path) from None
        if not isinstance(release, int) or not isinstance(previous, int | None):
            raise _bad_pointer(path)
        return release, previous

    def _point(self, release: int, previous: int | None) -> None:
        write_json(self.root / "current.json", {"release": release, "previous": previous})


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bad_pointer(path: Path) -> ReleaseError:
    return ReleaseError(
        f'{path} is not a pointer of the form {{"release": N, "previous": M or null}}; '
        "delete it and activate a release"
    )
