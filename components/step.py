"""What every step shares: how it fails, what it records, and the lineage that caching keys on.

Not a component itself. It runs inside a step, on a cluster as in a local run:

- An error of the user's making (hiertcn/errors.py) ends the step with its one sentence as the last
  log line and its exit code, without a traceback. Anything else keeps its traceback. (In a local
  run the sentence goes into the records instead: the command repeats it as its own last line.)
- The local runner sets environment variables. ``HIERTCN_STEP_RECORDS`` names a JSON-lines file to
  which each step appends how it ended; ``HIERTCN_SNAPSHOTS`` a folder in which outputs are kept
  under their content's hash; ``HIERTCN_SOURCE`` is the hash of the program. On a cluster none of
  them is set and nothing is written.
- Kubeflow's cache keys on a step's parameters and on the *names* of its input artifacts, never on
  what they hold. So every step hands on a lineage: a hash over the step's name, its parameters and
  the lineages it received, which changes whenever anything upstream does.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

RECORDS: Final = "HIERTCN_STEP_RECORDS"
SNAPSHOTS: Final = "HIERTCN_SNAPSHOTS"
SOURCE: Final = "HIERTCN_SOURCE"
STARTED: Final = "started"
FINISHED: Final = "finished"
FAILED: Final = "failed"

_log = logging.getLogger("hiertcn.step")


class Step:
    """One running step; ``lineage`` is what it hands to the steps that read its outputs."""

    def __init__(self, name: str, lineage: str) -> None:
        self.name = name
        self.lineage = lineage
        self.values: dict[str, Any] = {}

    def record(self, **values: Any) -> None:
        """Keep JSON-ready values for the local runner's summary of the run."""
        self.values.update(values)


@contextlib.contextmanager
def step(name: str, arguments: Mapping[str, Any]) -> Iterator[Step]:
    """Run the body of the step called ``name``.

    Args:
        name: the component's name.
        arguments: the component's ``locals()`` before anything else is bound. Texts, numbers,
            booleans and lists of them enter the lineage; artifacts do not.

    Raises:
        SystemExit: the body raised an error of hiertcn/errors.py; the code is that error's.
    """
    from hiertcn.errors import HiertcnError

    _log_to_stderr()
    running = Step(name, lineage(name, arguments))
    started = time.monotonic()
    _record(step=name, status=STARTED)
    _log.info("%s %s", name, STARTED)
    try:
        yield running
    except HiertcnError as error:
        values = {"message": str(error), "exit_code": error.exit_code}
        if not _record(step=name, status=FAILED, **values):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        _record(step=name, status=FAILED, message=message, exit_code=1)
        raise
    seconds = time.monotonic() - started
    _record(step=name, status=FINISHED, values=running.values)
    _log.info("%s %s in %.1f s", name, FINISHED, seconds)


def lineage(name: str, arguments: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a step's name and its plain arguments."""
    plain = {
        key: value
        for key, value in arguments.items()
        if isinstance(value, str | int | float | bool | list)
    }
    return hashlib.sha256(json.dumps([name, plain], sort_keys=True).encode()).hexdigest()


def keep_under(digest: str, artifact: Any) -> None:
    """In a local run, keep an output folder under its content's digest and point there.

    A step that is never cached writes to a new place in every run; where the content is the same
    as before, the earlier copy is used, so that the steps that read it find themselves cached.
    """
    root = os.environ.get(SNAPSHOTS)
    if not root:
        return
    kept = Path(root) / digest / artifact.name
    written = Path(artifact.path)
    if kept.exists():
        shutil.rmtree(written)
    else:
        kept.parent.mkdir(parents=True, exist_ok=True)
        written.rename(kept)
    # The local runner drops the snapshots that were not used for longest.
    os.utime(kept.parent)
    artifact.uri = str(kept)


@contextlib.contextmanager
def resumable_folder(output: Path, checkpoint_store: str, lineage: str) -> Iterator[Path]:
    """Yield the folder to train into; what it holds at the end becomes ``output``.

    With a checkpoint store it is the same folder for every try at the same inputs with the same
    program, so a training that was killed resumes where its last checkpoint left it, in another
    process or pod. Without a store it is ``output`` itself.
    """
    if not checkpoint_store:
        yield output
        return
    folder = Path(checkpoint_store) / f"{lineage[:16]}-{os.environ.get(SOURCE, '')[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    yield folder
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, output)
    _log.info("moved %s to %s", folder, output)


def _record(**values: Any) -> bool:
    """Tell the local runner, if there is one; return whether there is."""
    path = os.environ.get(RECORDS)
    if not path:
        return False
    with Path(path).open("a") as file:
        file.write(json.dumps({"time": time.time(), **values}) + "\n")
    return True


def _log_to_stderr() -> None:
    # Kubeflow's executor has the root logger print every library's chatter.
    logging.getLogger().setLevel(logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("hiertcn", "models", "components"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
