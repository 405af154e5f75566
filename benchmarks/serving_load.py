"""Requests a second and latencies of the whole sidecar, beside an empty gRPC echo in the same run.

    python -m benchmarks.serving_load --folder .serving_load [--workers 2] [--json PATH]

Real parts throughout: ``hiertcn serve`` with Triton and a synced log on a release of random
contents (200,000 items, 100,000 users; made once in ``--folder`` and kept there). The load comes
from benchmarks/serving_load.cc, compiled on first use (Debian: ``apt-get install g++
libgrpc++-dev``), on the same cores. Every turn asks the empty echo, then the sidecar: closed loop,
open loop at ``--rate``, the catalogue at half that rate. ``share_of_echo`` is the closed loop's
requests a second over the echo's of the same turn; medians over the turns are printed.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks import serving_load_echo
from benchmarks.serving_load_release import item_ids, publish_release, user_ids
from hiertcn.errors import InputError
from hiertcn.files import write_json
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving import recommender_pb2 as pb
from pipelines.serving_process import ServingProcess

_SOURCE: Final = Path(__file__).with_suffix(".cc")
_LIBRARIES: Final = ("-lgrpc++", "-lgrpc", "-lgpr", "-labsl_synchronization", "-lpthread")
_SERVICE: Final = "/hiertcn.v1.Recommender"
_CANDIDATES: Final = 500
_K: Final = 20
_LISTS: Final = 4096


def main() -> None:
    """Measure and print."""
    parser = load_parser(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1000.0, help="of the open loop")
    parser.add_argument("--only", choices=("echo", "closed", "open", "catalogue"), action="append")
    parser.add_argument("--option", action="append", default=[], help="more for hiertcn serve")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    root = prepared_release(folder, arguments)
    load = Load(folder, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        serving = ServingProcess(
            root,
            Path(scratch, "state"),
            Path(scratch, "log"),
            options=[*_serve_options(arguments), *arguments.option],
        )
        try:
            turns = [_turn(load, serving, arguments) for _ in range(arguments.turns)]
        finally:
            serving.stop()
    figures = {
        "items": arguments.items,
        "users": arguments.users,
        "terms": not arguments.without_terms,
        "workers": arguments.workers,
        "models": arguments.models,
        "cores": len(os.sched_getaffinity(0)),
        **_medians(turns),
        "turns": turns,
    }
    print(json.dumps({name: value for name, value in figures.items() if name != "turns"}, indent=2))
    if arguments.json:
        write_json(arguments.json, figures)


def _serve_options(arguments: argparse.Namespace) -> list[str]:
    options = []
    if arguments.workers > 1:
        options.append(f"--workers={arguments.workers}")
    if arguments.models != "triton":
        options.append(f"--models={arguments.models}")
    return options


def prepared_release(folder: Path, arguments: argparse.Namespace) -> Path:
    """The repository in the folder, with a release made at its first use."""
    kind = "plain" if arguments.without_terms else "terms"
    root = folder / f"{kind}-{arguments.items}-{arguments.users}"
    if ReleaseRepository(root).current() is None:
        add_release(root, arguments, date="2026-01-01", seed=0)
    return root


def add_release(root: Path, arguments: argparse.Namespace, *, date: str, seed: int) -> None:
    """Publish and activate a release of random contents, of the sizes asked for."""
    parts = root.parent / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    publish_release(
        root,
        parts,
        date=date,
        items=arguments.items,
        users=arguments.users,
        with_terms=not arguments.without_terms,
        seed=seed,
    )
    shutil.rmtree(parts)


def load_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark of a loaded sidecar takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="release, bodies and binary")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--without-terms", action="store_true", help="the paper's configuration")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--models", choices=("triton", "in-process"), default="triton")
    return parser


class Load:
    """The compiled generator and the bodies that it sends."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._program = folder / "serving_load"
        if not self._program.exists() or (self._program.stat().st_mtime < _SOURCE.stat().st_mtime):
            _compile(self._program)
        choose = random.Random(0)
        items, users = item_ids(arguments.items), user_ids(arguments.users)
        self._bodies = folder / f"bodies-{arguments.items}-{arguments.users}"
        if not self._bodies.exists():
            aside = self._bodies.with_suffix(".new")
            aside.mkdir(parents=True)
            _write(aside / "empty", [b""])
            _write(aside / "users", (_recommend(user_id=user, k=_K) for user in users))
            _write(
                aside / "candidates",
                (_recommend(candidates=choose.sample(items, _CANDIDATES)) for _ in range(_LISTS)),
            )
            _write(
                aside / "interactions",
                (
                    pb.RecordInteractionsRequest(
                        interactions=[pb.Interaction(user_id=user, item_id=choose.choice(items))]
                    ).SerializeToString()
                    for user in users
                ),
            )
            aside.rename(self._bodies)

    @property
    def mix(self) -> list[str]:
        """Three rankings of 500 candidates to one recorded interaction."""
        return [
            f"Recommend,3,{_SERVICE}/Recommend,{self._bodies}/users,{self._bodies}/candidates",
            f"RecordInteractions,1,{_SERVICE}/RecordInteractions,{self._bodies}/interactions",
        ]

    @property
    def catalogue(self) -> list[str]:
        """The whole catalogue."""
        return [f"Recommend,1,{_SERVICE}/Recommend,{self._bodies}/users"]

    @property
    def echo(self) -> list[str]:
        """Nothing."""
        return [f"echo,1,{serving_load_echo.METHOD},{self._bodies}/empty"]

    def run(self, address: str, pid: int, calls: Sequence[str], *options: str) -> dict[str, Any]:
        """Run the generator once, on the server whose first process is ``pid``."""
        arguments = self._arguments
        before = _cpu_seconds(pid)
        done = subprocess.run(
            [
                str(self._program),
                *("--address", address),
                *("--seconds", str(arguments.seconds), "--warm-up", str(arguments.warm_up)),
                *("--connections", str(8 * arguments.workers)),
                *options,
                *(part for call in calls for part in ("--call", call)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        # The warm-up's requests are not among those counted, but their time is.
        share = arguments.seconds / (arguments.seconds + arguments.warm_up)
        answered = max(1, found["ok"])
        found["cpu_ms_per_request"] = {
            name: 1e3 * (seconds - before.get(name, 0.0)) * share / answered
            for name, seconds in _cpu_seconds(pid).items()
        }
        found["cpu_ms_per_request"]["generator"] = (
            1e3 * found["generator_cpu_seconds"] * share / answered
        )
        return found


def _cpu_seconds(pid: int) -> dict[str, float]:
    """Processor time so far of a process and its descendants, by program."""
    seconds: dict[str, float] = {}
    first = psutil.Process(pid)
    for process in (first, *first.children(recursive=True)):
        try:
            times = process.cpu_times()
            name = process.name()
        except psutil.NoSuchProcess:
            continue
        seconds[name] = seconds.get(name, 0.0) + times.user + times.system
    return seconds


def _turn(load: Load, serving: ServingProcess, arguments: argparse.Namespace) -> dict[str, Any]:
    wanted = arguments.only or ("echo", "closed", "open", "catalogue")
    closed = ("--concurrency", str(arguments.concurrency))
    address, pid = serving.address, serving.pid
    turn: dict[str, Any] = {}
    if "echo" in wanted:
        turn["echo"] = _echo(load, closed, arguments.workers)
    if "closed" in wanted:
        turn["closed"] = load.run(address, pid, load.mix, *closed)
        if "echo" in wanted:
            turn["share_of_echo"] = turn["closed"]["per_second"] / turn["echo"]["per_second"]
    if "open" in wanted:
        turn["open"] = load.run(address, pid, load.mix, "--rate", str(arguments.rate))
    if "catalogue" in wanted:
        turn["catalogue"] = load.run(
            address, pid, load.catalogue, "--rate", str(arguments.rate / 2)
        )
    print(_line(turn), file=sys.stderr, flush=True)
    return turn


def _echo(load: Load, closed: tuple[str, str], workers: int) -> dict[str, Any]:
    with subprocess.Popen(
        [sys.executable, "-m", serving_load_echo.__name__, f"--workers={workers}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            address = f"127.0.0.1:{int(server.stdout.readline())}"
            return load.run(address, server.pid, load.echo, *closed)
        finally:
            server.stdin.close()


def _line(turn: dict[str, Any]) -> str:
    parts = []
    for name in ("echo", "closed", "open", "catalogue"):
        if name in turn:
            found = turn[name]
            ms = found["ms"]
            errors = sum(found["errors"].values())
            cpu = " ".join(
                f"{program} {spent:.2f}" for program, spent in found["cpu_ms_per_request"].items()
            )
            parts.append(
                f"{name} {found['per_second']:.0f}/s p50 {ms['p50']:.1f} p90 {ms['p90']:.1f} "
                f"p99 {ms['p99']:.1f} ms{f' {errors} errors' if errors else ''} (CPU ms: {cpu})"
            )
    if "share_of_echo" in turn:
        parts.append(f"share of echo {turn['share_of_echo']:.2f}")
    return "; ".join(parts)


def _medians(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    medians: dict[str, Any] = {}
    for name in ("echo", "closed", "open", "catalogue"):
        if name in turns[0]:
            medians[name] = {
                "per_second": statistics.median(turn[name]["per_second"] for turn in turns),
                **{
                    f"{share}_ms": statistics.median(turn[name]["ms"][share] for turn in turns)
                    for share in ("p50", "p90", "p99")
                },
                "errors": sum(sum(turn[name]["errors"].values()) for turn in turns),
                "fallbacks": sum(
                    kind.get("field_4", {}).get("1", 0)
                    for turn in turns
                    for kind in turn[name]["calls"].values()
                ),
            }
    if "share_of_echo" in turns[0]:
        medians["share_of_echo"] = statistics.median(turn["share_of_echo"] for turn in turns)
    return medians


def _recommend(**fields: Any) -> bytes:
    return pb.RecommendRequest(**fields).SerializeToString()


def _write(path: Path, bodies: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for body in bodies:
            file.write(struct.pack("<I", len(body)) + body)


def _compile(program: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise InputError("g++ is not installed; apt-get install g++ libgrpc++-dev")
    program.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-o", str(program), str(_SOURCE), *_LIBRARIES], check=True
    )


if __name__ == "__main__":
    main()
