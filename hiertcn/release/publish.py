"""Publish a release: copy every part under a new number, then write its manifest.

The manifest comes last and makes the release exist; a publisher that fails or is killed before
leaves nothing that counts, and what it left is removed at once or by the next publisher. Of two
publishers the second waits for the first and gets the next number. Copies, because the parts are
a pipeline's outputs and may be overwritten by its next run; each file is hashed while it is
copied. Does not make the release serve: ``ReleaseRepository.activate`` does.
"""

import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.files import whole_file, write_json
from hiertcn.release.agreement import read_settings
from hiertcn.release.manifest import FileEntry, Manifest
from hiertcn.release.repository import MODELS, OPTIONAL_MODELS, ReleaseRepository

_log = logging.getLogger(__name__)
_CHUNK_BYTES: Final = 1 << 20
_RESERVE_BYTES: Final = 16 << 20
_CONFIGS: Final = Path(__file__).parents[2] / "triton_repo"


@dataclass(frozen=True, kw_only=True)
class ReleaseInput:
    """What a release is published with beside its files.

    ``data_date`` (``YYYY-MM-DD``, or an instant of that day) numbers the release; ``metrics`` are
    any JSON values, kept in the manifest and in ``metrics.json``.
    """

    data_date: str
    metrics: Mapping[str, Any] = field(default_factory=dict)


def publish(
    repository: ReleaseRepository,
    parts: Mapping[str, Path],
    models: Mapping[str, Path],
    info: ReleaseInput,
    *,
    configs: Path | None = None,
    wait_s: float = 600.0,
) -> int:
    """Publish and return the release's number.

    Args:
        repository: where to.
        parts: files and folders by their name in the release's folder; at least
            ``hiertcn.release.agreement.SERVING_PARTS``.
        models: the ONNX file of ``tcn``, of ``gru_step`` and, where items between builds shall be
            embedded, of ``item_encoder``.
        info: data date and metrics.
        configs: folder of hand-written ``<model>/config.pbtxt``; the checkout's ``triton_repo``
            by default.
        wait_s: how long to wait for another publisher.

    Raises:
        InputError: the disk is too small or full, the configs are missing, or another publisher
            holds the repository for longer than ``wait_s``; nothing is published.
        ReleaseError: parts are missing or do not fit together; nothing is published.
    """
    settings = read_settings(parts, models)
    folder = configs or _CONFIGS
    with repository.lock(wait_s=wait_s):
        repository.remove_leftovers()
        number = repository.next_number(info.data_date)
        copies = list(_copies(repository, number, parts, models))
        configs_of = {name: folder / name / "config.pbtxt" for name in _brought(models)}
        _require_space(repository.root, sum(source.stat().st_size for source, _ in copies))
        try:
            manifest = _write(repository, number, copies, parts, settings, info, configs_of)
        except OSError as error:
            repository.remove(number)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                raise
            raise InputError(
                f"release {number} was not published: writing below {repository.root} failed "
                f"({error.strerror}); make room there and publish again (nothing was left)"
            ) from error
        except BaseException:
            repository.remove(number)
            raise
    _log.info(
        "published release %d to %s: %d files, %.1f MB",
        number,
        repository.path(number),
        len(manifest.files),
        manifest.total_bytes / 1e6,
    )
    return number


def _write(
    repository: ReleaseRepository,
    number: int,
    copies: list[tuple[Path, Path]],
    parts: Mapping[str, Path],
    settings: Mapping[str, Any],
    info: ReleaseInput,
    configs: Mapping[str, Path],
) -> Manifest:
    root, directory = repository.root, repository.path(number)
    for model, config in configs.items():
        _place_config(config, repository.triton_repository / model)
    entries = []
    total = sum(source.stat().st_size for source, _ in copies)
    with tqdm(total=total, desc="publish", unit="B", unit_scale=True, mininterval=2) as progress:
        for source, target in copies:
            entries.append(_copy(source, target, root))
            progress.update(entries[-1].bytes)
    for name, value in _records(number, settings, info.metrics, parts).items():
        write_json(directory / name, value)
        content = (directory / name).read_bytes()
        entries.append(
            FileEntry(
                path=str((directory / name).relative_to(root)),
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )
    for folder in {(root / entry.path).parent for entry in entries}:
        _fsync_folders(folder, root)
    manifest = Manifest(
        release=number,
        created_us=time.time_ns() // 1000,
        watermark_us=settings["watermark_us"],
        parent=repository.current(),
        settings=settings,
        metrics=info.metrics,
        files=tuple(entries),
    )
    manifest.write(directory / "manifest.json")
    return manifest


def _records(
    number: int,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    parts: Mapping[str, Path],
) -> dict[str, dict[str, Any]]:
    records = {"release.json": {"release": number, **settings}, "metrics.json": dict(metrics)}
    return {name: value for name, value in records.items() if name not in parts}


def _copies(
    repository: ReleaseRepository,
    number: int,
    parts: Mapping[str, Path],
    models: Mapping[str, Path],
) -> Iterator[tuple[Path, Path]]:
    for name, source in parts.items():
        target = repository.path(number) / name
        if source.is_dir():
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                yield file, target / file.relative_to(source)
        else:
            yield source, target
    for model in _brought(models):
        yield models[model], repository.model_path(model, number)


def _brought(models: Mapping[str, Path]) -> list[str]:
    return [*MODELS, *(model for model in OPTIONAL_MODELS if model in models)]


def _copy(source: Path, target: Path, root: Path) -> FileEntry:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return FileEntry(path=str(target.relative_to(root)), bytes=size, sha256=digest.hexdigest())


def _place_config(source: Path, folder: Path) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InputError(
            f"the Triton config {source} cannot be read ({error.strerror}); run from a checkout "
            "of the project, or name the folder of configs"
        ) from None
    target = folder / "config.pbtxt"
    if target.is_file() and target.read_bytes() == content:
        return
    with whole_file(target) as aside:
        aside.write_bytes(content)


def _require_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed + _RESERVE_BYTES:
        raise InputError(
            f"{root} has {free / 1e6:.0f} MB free but the release needs {needed / 1e6:.0f} MB and "
            f"a reserve of {_RESERVE_BYTES / 1e6:.0f} MB; make room there or prune old releases"
        )


def _fsync_folders(folder: Path, root: Path) -> None:
    while folder != root:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        folder = folder.parent
