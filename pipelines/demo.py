"""``make demo``: from a log to live recommendations on this machine, and what it found.

Simulates a log (or takes one), holds out its newest interactions, runs the daily pipeline on the
rest, starts Triton and the sidecar, replays the held-out interactions through gRPC, and stops
what it started. Everything lies under ``.demo``; the figures also go to ``.demo/summary.json``.
A demo that was interrupted resumes at the step it had reached.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import duckdb
import typer
from rich.console import Console
from rich.table import Table

from hiertcn.errors import HiertcnError, InputError
from hiertcn.events.ingest import IngestOptions, ingest
from hiertcn.events.simulate import SimulationOptions, simulate
from hiertcn.files import read_json, write_json
from hiertcn.serving.client import RecommenderClient
from pipelines.replay import ReplayResult, replay
from pipelines.serving_process import SERVING_FILE, ServingProcess

_HELD_OUT_SHARES = (0.005, 0.2)

# About a minute of training on one core, whatever the size of the log.
_TRAINING_STEPS = 800

_console = Console()


@dataclass(frozen=True, kw_only=True)
class _Log:
    """Which log the demo runs on, and how to read it."""

    events: str
    items: str | None
    oracle: str | None
    ingest: dict[str, Any]
    run_arguments: list[str] = field(default_factory=list)


def main() -> None:
    """Run the command line; errors of the user's making end with one line and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(demo)
    try:
        app()
    except HiertcnError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted; `make demo` resumes where this run stopped", file=sys.stderr)
        raise SystemExit(130) from None


def demo(
    events: Annotated[
        str, typer.Option(help="Events: CSV or parquet, a file, folder or URL. Default: simulate.")
    ] = "",
    items: Annotated[str, typer.Option(help="Items file or URL. Default: none.")] = "",
    event_type: Annotated[
        list[str] | None, typer.Option(help="Event type to keep; repeat for several. Default: all.")
    ] = None,
    session_gap: Annotated[
        float, typer.Option(help="Seconds without an interaction that end a session.")
    ] = 1800.0,
    feature_column: Annotated[
        list[str] | None,
        typer.Option(help="Item column to use as a feature; repeat. Default: all usable ones."),
    ] = None,
    item_filter: Annotated[
        str, typer.Option(help="Keep items where this holds: a boolean column or column=value.")
    ] = "",
    timestamp_unit: Annotated[
        str, typer.Option(help="Unit of integer timestamps: auto, s, ms, us or ns.")
    ] = "auto",
    users: Annotated[int, typer.Option(help="Users to simulate, where no log is given.")] = 20_000,
    catalogue: Annotated[
        int, typer.Option(help="Items to simulate, where no log is given.")
    ] = 1_000,
    days: Annotated[int, typer.Option(help="Days to simulate, where no log is given.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the simulation and of training.")] = 0,
    replay_interactions: Annotated[
        int, typer.Option(help="Held-out interactions to replay at most.")
    ] = 2_000,
    run_option: Annotated[
        list[str] | None,
        typer.Option(
            help="Passed on to `python -m pipelines run`, such as --max-epochs=2; repeat."
        ),
    ] = None,
    keep: Annotated[bool, typer.Option(help="Leave Triton and the sidecar serving.")] = False,
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path(".demo"),
) -> None:
    """Take a log to live recommendations on this machine, and print what was found."""
    folder = folder.absolute()
    arguments = {name: value for name, value in locals().items() if name not in ("keep", "folder")}
    _prepare(folder, arguments)
    seconds: dict[str, float] = {}
    started = time.monotonic()

    log = _given_log(events, items, event_type or [], session_gap, item_filter, timestamp_unit)
    if log is None:
        with _timed(seconds, "simulate", f"simulating {users:,} users and {catalogue:,} items"):
            log = _simulated_log(
                folder / "data",
                SimulationOptions(users=users, items=catalogue, days=days, seed=seed),
                session_gap,
            )
    with _timed(seconds, "hold_out", "holding out the newest interactions"):
        since_us = _hold_out(log, folder / "held_out")
    with _timed(seconds, "pipeline", "running the daily pipeline"):
        run = _run_pipeline(
            log,
            folder,
            [
                f"--data-date={_rfc3339(since_us)}",
                f"--seed={seed}",
                *[f"--feature-column={name}" for name in feature_column or []],
                f"--max-steps={_TRAINING_STEPS}",
                *(run_option or []),
            ],
        )
    seconds.update({step: round(value, 2) for step, value in run["step_seconds"].items()})
    summary: dict[str, Any] = {
        "step_seconds": seconds,
        "graph": run["graph"],
        "training": run["training"],
        "offline": run["offline"],
        "online": None,
        "latency_ms": None,
        "release": run["release"],
        "report": run["report"],
        "repository": run["repository"],
        "triton_repository": str(Path(run["repository"], "triton_repo")),
        "gate": run["gate"],
    }
    server = None
    if run["release"] is None:
        _console.print(f"[yellow]nothing to serve:[/] {run['gate']['reason']}")
    else:
        with _timed(seconds, "serve", "starting Triton and the sidecar"):
            server = ServingProcess(
                folder / "repository",
                folder / "state",
                folder / "serve.log",
                # A busy laptop's replay should measure the model, not its fallback.
                model_deadline_ms=10_000,
            )
        try:
            with _timed(seconds, "replay", "replaying held-out interactions through gRPC"):
                result = replay(
                    server.address,
                    folder / "held_out" / "events",
                    since_us=since_us,
                    max_interactions=replay_interactions,
                    catalogue=run["graph"]["items"],
                )
            summary["online"], summary["latency_ms"] = _online(result)
            _show_recommendations(server.address, folder / "held_out" / "events")
        except BaseException:
            server.stop()
            raise
        if not keep:
            with _timed(seconds, "stop", "stopping the sidecar and Triton"):
                server.stop()
    installed = Path(sys.prefix, "install.seconds")
    if installed.exists():
        seconds["install_when_fresh"] = round(float(installed.read_text()), 2)
    seconds["total"] = round(time.monotonic() - started, 2)
    write_json(folder / "summary.json", summary)
    _show_summary(summary, folder)
    if keep and server is not None:
        _show_one_liners(server, folder)


def _prepare(folder: Path, arguments: dict[str, Any]) -> None:
    """Empty the folder unless it holds an interrupted demo with the same arguments."""
    serving = folder / "state" / SERVING_FILE
    if serving.exists() and _alive(pid := int(read_json(serving)["pid"])):
        raise InputError(
            f"a demo kept with KEEP=1 is still serving from {folder} (process {pid}); "
            f"stop it with `kill {pid}` and run again"
        )
    started = folder / "arguments.json"
    interrupted = started.exists() and not (folder / "summary.json").exists()
    if interrupted and json.loads(started.read_text()) == arguments:
        _console.print(f"resuming the interrupted demo in {folder}")
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, arguments)
    shutil.rmtree(folder / "state", ignore_errors=True)


def _given_log(
    events: str,
    items: str,
    event_types: list[str],
    session_gap: float,
    item_filter: str,
    timestamp_unit: str,
) -> _Log | None:
    if not events:
        if items:
            raise InputError(f"--items {items} was given without --events; give both or neither")
        return None
    return _Log(
        events=events,
        items=items or None,
        oracle=None,
        ingest={
            "event_types": tuple(event_types),
            "session_gap_s": session_gap,
            "item_filter": item_filter,
            "timestamp_unit": timestamp_unit,
        },
        run_arguments=[
            *[f"--event-type={name}" for name in event_types],
            f"--session-gap={session_gap}",
            *([f"--item-filter={item_filter}"] if item_filter else []),
            f"--timestamp-unit={timestamp_unit}",
        ],
    )


def _simulated_log(data: Path, options: SimulationOptions, session_gap: float) -> _Log:
    done = data / "options.json"
    if not (done.exists() and json.loads(done.read_text()) == asdict(options)):
        simulate(data, options)
        write_json(done, asdict(options))
    return _Log(
        events=str(data / "events"),
        items=str(data / "items.parquet"),
        oracle=str(data / "oracle"),
        ingest={"session_gap_s": session_gap},
        run_arguments=[f"--oracle={data / 'oracle'}", f"--session-gap={session_gap}"],
    )


def _hold_out(log: _Log, output: Path) -> int:
    """Ingest the whole log unfiltered; return the time (us) from which it is held out.

    The newest UTC days that hold between 0.5% and 20% of the interactions, so that a few stray
    last clicks do not count as a day; a log of few days is cut inside its last one.
    """
    if not (output / "snapshot.json").exists():
        ingest(
            log.events,
            output,
            items_url=log.items,
            options=IngestOptions(
                min_user_interactions=1,
                max_user_interactions=sys.maxsize,
                min_item_interactions=1,
                **log.ingest,
            ),
        )
    least, most = _HELD_OUT_SHARES
    rows = duckdb.sql(
        "select epoch_us(date_trunc('day', timestamp)) as day_us, count(*) as n "
        f"from read_parquet('{output}/events/**/*.parquet') group by 1 order by 1 desc"
    ).fetchall()
    total = sum(n for _, n in rows)
    after = 0
    for day_us, n in rows:
        after += n
        if after > most * total:
            break
        if after >= least * total:
            return int(day_us)
    cut = duckdb.sql(
        "select epoch_us(quantile_disc(timestamp, 0.95)) "
        f"from read_parquet('{output}/events/**/*.parquet')"
    ).fetchall()
    return int(cut[0][0])


def _run_pipeline(log: _Log, folder: Path, arguments: list[str]) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "pipelines", "run", f"--events={log.events}"),
        *([f"--items={log.items}"] if log.items else []),
        f"--repository={folder / 'repository'}",
        f"--work-dir={folder / 'run'}",
        *log.run_arguments,
        *arguments,
    ]
    _console.print(f"[dim]{shlex.join(command)}[/]", soft_wrap=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        # The pipeline has said why in one line.
        raise SystemExit(code)
    result: dict[str, Any] = read_json(folder / "run" / "run.json")
    return result


def _online(result: ReplayResult) -> tuple[dict[str, Any], dict[str, float]]:
    online = result.to_dict()
    latency = {
        name.removesuffix("_ms"): round(online.pop(name), 3)
        for name in [key for key in online if key.endswith("_ms")]
    }
    return {
        key: round(value, 4) if isinstance(value, float) else value for key, value in online.items()
    }, latency


def _show_recommendations(address: str, events: Path) -> None:
    rows = duckdb.sql(
        f"select user_id, count(*) n from read_parquet('{events}/**/*.parquet') "
        "group by 1 order by n desc, 1 limit 1"
    ).fetchall()
    user = str(rows[0][0])
    with RecommenderClient(address) as client:
        reply = client.recommend(user, k=5)
    table = Table("rank", "item", "score", title=f"now for user {user}, release {reply.release}")
    for rank, item in enumerate(reply.items, start=1):
        table.add_row(str(rank), item.item_id, f"{item.score:.3f}")
    _console.print(table)


def _show_summary(summary: dict[str, Any], folder: Path) -> None:
    graph, offline, online = summary["graph"], summary["offline"], summary["online"]
    _console.print(
        f"graph: {graph['items']:,} items, {graph['edges']:,} edges; "
        f"{graph['isolated_items']:,} items without a neighbour"
    )
    for name, curve in summary["training"].items():
        ends = ", ".join(f"{key} {a:.4g} -> {b:.4g}" for key, (a, b) in curve.items())
        _console.print(f"training of {name}: {ends}")
    table = Table("offline", "Recall@10", "MRR", title=f"candidates: {offline['candidates']}")
    for name, row in offline["models"].items():
        table.add_row(name, f"{row['recall@10']:.4f}", f"{row['mrr']:.4f}")
    _console.print(table)
    if online:
        latency = summary["latency_ms"]
        _console.print(
            f"online: Recall@10 {online['recall_at_10']:.4f} over {online['known_targets']:,} "
            f"replayed requests ({online['candidates']}; by chance "
            f"{online['random_recall_at_10']:.4f}); {online['recall_at_10_all']:.4f} over all "
            f"{online['requests']:,}, with items that the release does not have"
        )
        _console.print(
            f"latency, one caller: recommend p50 {latency['recommend_p50']:.2f} ms, "
            f"p99 {latency['recommend_p99']:.2f} ms; record p50 {latency['record_p50']:.2f} ms, "
            f"p99 {latency['record_p99']:.2f} ms"
        )
    _console.print(f"gate: {summary['gate']['reason']}", soft_wrap=True)
    _console.print(f"release: {summary['release']} in {summary['repository']}", soft_wrap=True)
    _console.print(f"report: {summary['report']}", soft_wrap=True)
    _console.print(f"figures: {folder / 'summary.json'}", soft_wrap=True)
    _console.print(f"took {summary['step_seconds']['total']:.0f} s")


def _show_one_liners(server: ServingProcess, folder: Path) -> None:
    hiertcn = shlex.quote(str(Path(sys.executable).parent / "hiertcn"))
    address = server.address
    _console.print(f"serving on {address} (process {server.pid}, log {server.log})")
    for line in (
        f"{hiertcn} recommend USER -k 10 --address {address}",
        f"{hiertcn} record --user USER --item ITEM --address {address}",
        f"{hiertcn} releases list --repository {folder / 'repository'}",
        f"kill {server.pid}",
    ):
        _console.print(f"  {line}", soft_wrap=True, highlight=False)


@contextmanager
def _timed(seconds: dict[str, float], step: str, what: str) -> Iterator[None]:
    _console.print(f"[bold]{what}[/]")
    start = time.monotonic()
    yield
    seconds[step] = round(time.monotonic() - start, 2)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _rfc3339(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1e6, tz=UTC).isoformat().replace("+00:00", "Z")


if __name__ == "__main__":
    main()
