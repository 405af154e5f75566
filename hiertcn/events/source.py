"""Finding the files behind a URL and bringing each to local disk while it is read.

Any fsspec URL works: a path, ``file://``, ``memory://``, ``http(s)://``, and whatever has its
file-system package installed (``s3://`` needs ``s3fs``). Local files are read in place; remote
ones are downloaded one at a time into a scratch folder, so a log larger than the disk must come
in several files.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from hiertcn.errors import InputError

_PARQUET_SUFFIXES = {".parquet", ".pq", ".parq"}
_CSV_SUFFIXES = {".csv", ".tsv", ".txt"}
_COMPRESSION_SUFFIXES = {".gz", ".zst"}
_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class SourceFile:
    """One data file behind a URL.

    Attributes:
        name: how to name it to the user: its path, or its full URL if remote.
        is_parquet: parquet, else CSV.
        path_values: values in folder names of the style ``key=value``.
    """

    name: str
    is_parquet: bool
    path_values: dict[str, str]
    _file_system: Any
    _path: str

    @contextlib.contextmanager
    def local(self, scratch: Path) -> Iterator[Path]:
        """Yield a local path of the file; a download is removed afterwards.

        Raises:
            InputError: the file cannot be downloaded.
        """
        if isinstance(self._file_system, LocalFileSystem):
            yield Path(self._path)
            return
        folder = scratch / "download"
        folder.mkdir()
        path = folder / PurePosixPath(self._path).name
        try:
            try:
                self._file_system.get_file(self._path, str(path))
            # Each file system raises errors of its own libraries.
            except Exception as error:
                raise InputError(
                    f"{self.name} could not be downloaded ({_brief(error)}); check the address, "
                    "the network and the credentials"
                ) from error
            yield path
        finally:
            shutil.rmtree(folder)


def list_files(url: str) -> list[SourceFile]:
    """Return the data files behind a file, glob or folder URL, sorted by name.

    In a folder, files are taken by suffix (parquet, pq, parq, csv, tsv, txt; CSV also with .gz or
    .zst) at any depth. In folders and globs, names that start with ``_`` or ``.`` are skipped, as
    data tools do: they are markers and files still being written.

    Raises:
        InputError: nothing is there, it cannot be reached, or its file system has no driver.
    """
    try:
        file_system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(
            f"{url} needs a package that is not installed ({_brief(error)}); install it and run "
            "again"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{url} is not an address that can be read ({_brief(error)}); expected a path, "
            "file://, memory://, http(s)://, s3:// or another fsspec URL"
        ) from error
    root = str(root)
    try:
        paths, listed = _expand(file_system, root)
    except FileNotFoundError:
        raise InputError(
            f"{url} does not exist or cannot be reached; expected a parquet or CSV file, a glob "
            "or a folder of them"
        ) from None
    except Exception as error:
        raise InputError(
            f"{url} could not be read ({_brief(error)}); check the address, the network and the "
            "credentials"
        ) from error
    files = []
    for path in sorted(paths):
        is_parquet = _is_parquet(path)
        if is_parquet is None:
            if listed:
                continue
            is_parquet = _has_parquet_magic(file_system, path)
        local = isinstance(file_system, LocalFileSystem)
        name = path if local else str(file_system.unstrip_protocol(path))
        files.append(SourceFile(name, is_parquet, _path_values(path), file_system, path))
    if not files:
        raise InputError(
            f"{url} holds no parquet or CSV file; expected names that end in .parquet, .csv, "
            ".tsv, .csv.gz or .csv.zst"
        )
    return files


def _expand(file_system: Any, root: str) -> tuple[list[str], bool]:
    if any(mark in root for mark in "*?[") and not file_system.exists(root):
        first_mark = min(root.find(mark) for mark in "*?[" if mark in root)
        start = root.rfind("/", 0, first_mark) + 1
        found = [str(path) for path in file_system.glob(root) if file_system.isfile(path)]
        return _visible(found, start), True
    if file_system.info(root)["type"] == "directory":
        found = [str(path) for path in file_system.find(root)]
        return _visible(found, len(root.rstrip("/")) + 1), True
    return [root], False


def _visible(paths: list[str], start: int) -> list[str]:
    return [
        path
        for path in paths
        if not any(part.startswith(("_", ".")) for part in path[start:].split("/"))
    ]


def _is_parquet(path: str) -> bool | None:
    name = PurePosixPath(path.lower())
    if name.suffix in _PARQUET_SUFFIXES:
        return True
    if name.suffix in _COMPRESSION_SUFFIXES:
        name = name.with_suffix("")
    return False if name.suffix in _CSV_SUFFIXES else None


def _has_parquet_magic(file_system: Any, path: str) -> bool:
    with file_system.open(path, "rb") as file:
        return bool(file.read(4) == _PARQUET_MAGIC)


def _path_values(path: str) -> dict[str, str]:
    folders = path.split("/")[:-1]
    return {
        key: unquote(value)
        for key, separator, value in (folder.partition("=") for folder in folders)
        if separator
    }


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def read_head(path: Path, size: int) -> bytes:
    """Return the first ``size`` bytes of a file, decompressed if its suffix says so."""
    with pa.input_stream(str(path), compression="detect") as stream:
        return bytes(stream.read(size))
