"""Run the daily pipeline on this machine, with Kubeflow's local runner.

The work directory holds everything but the releases:

    run.json       what the last run did: seconds per step, statistics, metrics, release, report
    report.html    the last run's report
    steps.jsonl    how each step of the last run ended
    pipeline/      outputs by run and step, and Kubeflow's cache
    snapshots/     ingested logs by content
    edges/         connections counted per day
    checkpoints/   trainings that have not finished

Each step is a process of its own (0.3 s to start Python and Kubeflow's executor). A step with the
same inputs as before, and the same program, is skipped, so a run that failed resumes at the step
that failed. Retries, resources, timeouts and secrets are the cluster's business.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from components.step import FAILED, FINISHED, RECORDS, SNAPSHOTS, STARTED
from hiertcn.errors import HiertcnError, InputError
from pipelines.console import CacheHits, StepConsole
from pipelines.daily import NAME, STEPS, local_pipeline
from pipelines.parameters import complete
from pipelines.summary import write_summary

ROOT: Final = Path(__file__).resolve().parents[1]

_PATHS = ("events", "items", "oracle", "repository", "edge_store", "checkpoint_store")


class StepError(HiertcnError):
    """A step failed; the message and the exit code are the step's own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(
    parameters: Mapping[str, Any],
    work_dir: Path,
    *,
    cache: bool = True,
    keep_runs: int = 3,
) -> dict[str, Any]:
    """Run all steps and return what ``run.json`` holds (pipelines/summary.py).

    Args:
        parameters: values by name; see pipelines/parameters.py for names and defaults.
        work_dir: created if missing; one run at a time.
        cache: skip steps whose inputs and program are unchanged.
        keep_runs: outputs of this many newest runs are kept, beside those still in use.

    Raises:
        InputError: a parameter is wrong, or another run uses the work directory.
        StepError: a step failed.
    """
    if keep_runs < 1:
        raise InputError(f"keep_runs is {keep_runs}; expected at least 1 run")
    work_dir = work_dir.absolute()
    values = _with_absolute_paths(complete(parameters), work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    with _only_run(work_dir), _step_environment(work_dir):
        (work_dir / "run.json").unlink(missing_ok=True)
        (work_dir / "steps.jsonl").write_text("")
        console = StepConsole(STEPS, sys.stdout)
        hits = CacheHits(console)
        started = time.time()
        outputs = _execute(values, work_dir, cache, console, hits)
        records = _records(work_dir)
        summary = write_summary(
            work_dir,
            values=values,
            outputs=outputs,
            records=records,
            step_seconds=_step_seconds(records, started, list(hits.keys)),
            cached=list(hits.keys),
            seconds=time.time() - started,
        )
        _prune(work_dir, hits.keys.values(), keep_runs)
    return summary


def source_digest() -> str:
    """Return the SHA-256 (hex) of the program that the steps run."""
    digest = hashlib.sha256()
    for package in ("components", "hiertcn", "models"):
        files = [file for file in (ROOT / package).rglob("*") if file.suffix in (".py", ".html")]
        for file in sorted(files):
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _execute(
    values: Mapping[str, Any],
    work_dir: Path,
    cache: bool,
    console: StepConsole,
    hits: CacheHits,
) -> Mapping[str, Any]:
    from kfp import local

    pipeline = local_pipeline(cache=cache, source=source_digest())
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    # The runner tells of cache hits on the root logger, among much else that nobody needs.
    root.setLevel(logging.INFO)
    root.handlers = [hits]
    try:
        with contextlib.redirect_stdout(console), warnings.catch_warnings():
            # The image is for the cluster; here the steps run in this very environment.
            warnings.filterwarnings("ignore", message="You may be attemping to run a task")
            local.init(
                local.SubprocessRunner(use_venv=False),
                pipeline_root=str(work_dir / "pipeline"),
                enable_caching=True,
            )
            outputs: Mapping[str, Any] = pipeline(**values).outputs
            return outputs
    except RuntimeError as error:
        raise _failure(work_dir, console, error) from None
    finally:
        root.setLevel(level)
        root.handlers = handlers


def _failure(work_dir: Path, console: StepConsole, error: RuntimeError) -> StepError:
    """Return the failed step's own words, or the best there is."""
    running = ""
    for record in _records(work_dir):
        if record["status"] == FAILED:
            if record["exit_code"] == 1:
                return StepError(
                    f"{record['step']} failed: {record['message']} (its traceback is above; "
                    "the same command resumes at this step)",
                    1,
                )
            return StepError(record["message"], record["exit_code"])
        running = record["step"] if record["status"] == STARTED else ""
    if running:
        return StepError(
            f"{running} was killed before it finished, for instance because memory ran out; free "
            "some and run the same command to resume at this step",
            1,
        )
    print(console.last_words(), file=sys.stderr)
    return StepError(f"a step could not start ({error}); its output is above", 1)


def _records(work_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work_dir / "steps.jsonl").read_text().splitlines()]


def _step_seconds(
    records: list[dict[str, Any]], started: float, cached: list[str]
) -> dict[str, float]:
    """Return seconds by step, in the pipeline's order; skipped steps took none.

    Steps run one after the other, so a step took from the end of the one before to its own end:
    starting its process included.
    """
    seconds = dict.fromkeys(cached, 0.0)
    before = started
    for record in records:
        if record["status"] == FINISHED:
            seconds[record["step"]] = round(record["time"] - before, 3)
            before = record["time"]
    return {name: seconds[name] for name in STEPS if name in seconds}


def _with_absolute_paths(values: dict[str, Any], work_dir: Path) -> dict[str, Any]:
    values["edge_store"] = values["edge_store"] or str(work_dir / "edges")
    values["checkpoint_store"] = values["checkpoint_store"] or str(work_dir / "checkpoints")
    for name in _PATHS:
        if values[name] and "://" not in values[name]:
            values[name] = os.path.abspath(values[name])  # noqa: PTH100 (keeps glob patterns)
    return values


@contextlib.contextmanager
def _only_run(work_dir: Path) -> Iterator[None]:
    with (work_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run uses the work directory {work_dir}; wait for it to finish, or give "
                "another --work-dir"
            ) from None
        yield


@contextlib.contextmanager
def _step_environment(work_dir: Path) -> Iterator[None]:
    """Set what the steps' processes inherit."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {
        RECORDS: str(work_dir / "steps.jsonl"),
        SNAPSHOTS: str(work_dir / "snapshots"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        # OpenMP's threads spin while they wait: with one busy neighbor process, training on both
        # of two cores fell from 5,000 to 1,100 interactions/s (docs/decisions.md).
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // 2)),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prune(work_dir: Path, used_keys: Any, keep_runs: int) -> None:
    """Delete outputs of old runs that the cache entries just used do not point into."""
    root = work_dir / "pipeline"
    entries = [path for key in used_keys for path in (root / ".kfp_cache").glob(f"{key}*.json")]
    used = "\n".join(entry.read_text() for entry in entries)
    # Names end in the moment the run started.
    runs = sorted(root.glob(f"{NAME}-*/"))
    for folder in runs[:-keep_runs]:
        if str(folder) not in used:
            shutil.rmtree(folder, ignore_errors=True)
    snapshots = sorted((work_dir / "snapshots").glob("*/"), key=lambda path: path.stat().st_mtime)
    for folder in snapshots[:-keep_runs]:
        shutil.rmtree(folder, ignore_errors=True)
