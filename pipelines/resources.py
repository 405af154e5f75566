"""What each step may use on a cluster: processors, memory, accelerator, retries, time, caching.

Set when the pipeline is compiled, as ``--resources STEP.KEY=VALUE`` (``all`` stands for every
step), or as the same keys in a TOML file with one table a step. Later settings win over earlier
ones, options over the file. The local runner ignores all of it but caching.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from hiertcn.errors import InputError

ALL_STEPS: Final = "all"
_QUANTITY = {
    "cpu": re.compile(r"\d+(\.\d+)?|\d+m"),
    "memory": re.compile(r"\d+(\.\d+)?([EPTGMK]i?)?"),
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one step requests and how it is run.

    Attributes:
        cpu: processors requested and allowed, such as ``2`` or ``500m``.
        memory: bytes requested and allowed, such as ``8Gi``.
        gpu: accelerators, 0 for none.
        accelerator: resource name of the accelerator.
        retries: how often a failed step is tried again.
        backoff_s: seconds before the first new try; doubled each time.
        timeout_s: seconds after which a running step is ended; 0 for no limit.
        cache: whether a step with unchanged inputs is skipped.
    """

    cpu: str = "2"
    memory: str = "8Gi"
    gpu: int = 0
    accelerator: str = "nvidia.com/gpu"
    retries: int = 2
    backoff_s: int = 60
    timeout_s: int = 14_400
    cache: bool = True

    def __post_init__(self) -> None:
        for name, pattern in _QUANTITY.items():
            if not pattern.fullmatch(value := getattr(self, name)):
                raise InputError(
                    f"resource {name} is {value!r}; expected a Kubernetes quantity such as "
                    f"{'2 or 500m' if name == 'cpu' else '8Gi'}"
                )
        for name in ("gpu", "retries", "backoff_s", "timeout_s"):
            if getattr(self, name) < 0:
                raise InputError(f"resource {name} is {getattr(self, name)}; expected 0 or more")


DEFAULTS: Final[Mapping[str, Resources]] = {
    # Its result depends on what lies behind a URL, so it is never cached.
    "ingest_events": Resources(cpu="4", memory="16Gi", cache=False),
    "build_sessions": Resources(cpu="4", memory="16Gi"),
    "build_item_graph": Resources(cpu="4", memory="16Gi"),
    "train_item_encoder": Resources(cpu="8", memory="32Gi", timeout_s=43_200),
    "embed_items": Resources(cpu="8", memory="32Gi"),
    "train_hiertcn": Resources(cpu="8", memory="32Gi", timeout_s=43_200),
    "evaluate": Resources(cpu="4", memory="16Gi"),
    # As much as embed_items, whose table it holds in float32.
    "tune_item_table": Resources(cpu="8", memory="32Gi"),
    "export_onnx": Resources(cpu="2", memory="8Gi"),
    "backfill_user_states": Resources(cpu="8", memory="16Gi"),
    # Its result depends on what is serving, so it is never cached.
    "publish_release": Resources(cpu="2", memory="8Gi", cache=False),
}
"""Every step of the pipeline, in its order, with what it gets if nothing else is asked for."""

NEVER_CACHED: Final = ("ingest_events", "publish_release")


def resources(options: Iterable[str] = (), file: Path | None = None) -> dict[str, Resources]:
    """Return every step's resources: defaults, then the file's tables, then the options.

    Raises:
        InputError: an unknown step or key, or a value of the wrong type; or caching asked for a
            step whose result does not depend on its inputs alone.
    """
    chosen = dict(DEFAULTS)
    for step, key, value in [*_from_file(file), *_from_options(options)]:
        for name in DEFAULTS if step == ALL_STEPS else (step,):
            if key == "cache" and name in NEVER_CACHED:
                if step != ALL_STEPS and value:
                    raise InputError(
                        f"--resources {step}.cache=true: {step} is never cached, because its "
                        "result depends on more than its inputs; leave it out"
                    )
                continue
            chosen[name] = replace(chosen[name], **{key: value})
    return chosen


def _from_options(options: Iterable[str]) -> list[tuple[str, str, Any]]:
    settings = []
    for option in options:
        path, equals, text = option.partition("=")
        step, dot, key = path.partition(".")
        if not (equals and dot):
            raise InputError(
                f"--resources {option!r} was not understood; expected STEP.KEY=VALUE, such as "
                "train_hiertcn.gpu=1"
            )
        settings.append((*_known(step, key), _parsed(step, key, text)))
    return settings


def _from_file(file: Path | None) -> list[tuple[str, str, Any]]:
    if file is None:
        return []
    try:
        tables = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"--resources-file {file} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--resources-file {file} is not valid TOML: {error}") from None
    settings = []
    for step, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(
                f"--resources-file {file}: {step!r} is not a table; expected [STEP] tables"
            )
        for key, value in table.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            settings.append((*_known(step, key), _parsed(step, key, text)))
    return settings


def _known(step: str, key: str) -> tuple[str, str]:
    if step != ALL_STEPS and step not in DEFAULTS:
        raise InputError(
            f"resources of step {step!r} were given; the steps are {', '.join(DEFAULTS)}, and "
            f"{ALL_STEPS!r} for all of them"
        )
    keys = [field.name for field in fields(Resources)]
    if key not in keys:
        raise InputError(
            f"resource {step}.{key} was given; the keys of a step are {', '.join(keys)}"
        )
    return step, key


def _parsed(step: str, key: str, text: str) -> Any:
    kind = {field.name: field.type for field in fields(Resources)}[key]
    try:
        if kind is int:
            return int(text)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        raise InputError(
            f"resource {step}.{key} is {text!r}; expected "
            f"{'a whole number' if kind is int else 'true or false'}"
        ) from None
    return text
