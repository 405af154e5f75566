"""Kills a loaded sidecar again and again, then loads one for hours: nothing is lost, nothing grows.

    python -m benchmarks.soak --folder .serving_load [--kills 50] [--minutes 120] [--rate 500]

**Kills.** Users interact and ask for recommendations, so that sessions close and are folded, until
``kill -9`` comes at a random moment; the next life begins with what the last one left unanswered.
At the end every acknowledged interaction must be in its user's journal once and in the exported
events, and everyone's recommendations must be those of a store that is rebuilt from the log alone.

**Steady load.** The mix of benchmarks/serving_load.py at a fixed rate (planned: half of what the
machine sustains), with a reading of the memory every half minute: of all processes, resident and
anonymous (what is no file's page; LMDB's and the item table's pages come and go with the kernel's
cache). The slope is a line through the second half's readings. The newest 8 million interactions
are kept on purpose, 12 bytes each, so the slope may be that much above 0 until then; so are the
last embeddings of 32,768 users, 25 MB.

Prints JSON; the exit code is 1 if anything was lost, repeated or folded otherwise.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import psutil
import pyarrow.parquet as pq

from benchmarks.serving_load import Load, load_parser, prepared_release
from benchmarks.serving_load_release import item_ids
from hiertcn.errors import InputError
from hiertcn.files import write_json
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving import recommender_pb2_grpc as pb_grpc
from hiertcn.serving.client import Interaction, RecommenderClient
from hiertcn.serving.options import STORE_FOLDER
from pipelines.serving_process import ServingProcess

Event = tuple[str, str, int]
"""User, item, time in microseconds."""

_WRITERS: Final = 6
_SESSION: Final = 20
_GAP_US: Final = 1_860_000_000
_STEPS: Final = 900
"""Interactions of one user in one life: 45 sessions, so less than a day."""
_MOST_ACKNOWLEDGED: Final = 400
_CALL_S: Final = 30.0
_WRONG: Final = (
    *("lost", "repeated", "never_sent", "missing_in_events", "accepted_again"),
    "states_unlike_a_rebuild",
)


def main() -> None:
    """Kill, load and print."""
    parser = load_parser(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=120.0, help="of steady load")
    parser.add_argument("--rate", type=float, default=500.0, help="requests/s of it")
    parser.add_argument("--reading", type=float, default=30.0, help="seconds between readings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    root = prepared_release(arguments.folder, arguments)
    options = [f"--models={arguments.models}"]
    if arguments.workers > 1:
        options.append(f"--workers={arguments.workers}")
    figures: dict[str, Any] = {"workers": arguments.workers, "models": arguments.models}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.kills:
            figures["kills"] = killed(
                root,
                Path(scratch, "killed"),
                item_ids(arguments.items),
                kills=arguments.kills,
                options=options,
                seed=arguments.seed,
            )
        if arguments.minutes:
            figures["steady"] = _steady_at_rate(root, Path(scratch, "steady"), options, arguments)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        write_json(arguments.json, figures)
    sys.exit(0 if is_sound(figures.get("kills", {})) else 1)


def is_sound(kills: dict[str, Any]) -> bool:
    """Whether what :func:`killed` found is no loss, no repetition and no other state."""
    return not any(kills.get(name) for name in _WRONG)


class _Life:
    """Writers on one life of the sidecar, which end when it does."""

    def __init__(self, address: str, number: int, begin_us: int, items: Sequence[str]) -> None:
        self.acknowledged: list[Event] = []
        self.sent: list[Event] = []
        self._address = address
        self._number = number
        self._begin_us = begin_us
        self._items = items
        self._changed = threading.Condition()
        self._threads = ThreadPoolExecutor(_WRITERS)
        self._writing = [self._threads.submit(self._write, n) for n in range(_WRITERS)]

    def wait_for(self, acknowledged: int) -> None:
        """Wait for that many acknowledgements, or until the writers are done."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    len(self.acknowledged) >= acknowledged
                    or all(one.done() for one in self._writing)
                ),
                timeout=60,
            )

    def end(self) -> list[Event]:
        """Wait for the writers; what was sent and not acknowledged."""
        self._threads.shutdown(wait=True)
        for one in self._writing:
            one.result()
        return sorted(set(self.sent) - set(self.acknowledged))

    def _write(self, number: int) -> None:
        user = f"life-{self._number}-{number}"
        # Without the client's retries, a writer hears of the kill at once.
        with grpc.insecure_channel(self._address) as channel:
            stub: Any = pb_grpc.RecommenderStub(channel)  # type: ignore[no-untyped-call]
            try:
                for step in range(_STEPS):
                    at_us = self._begin_us + step * 1000 + step // _SESSION * _GAP_US
                    event = (user, self._items[(step * 7 + number) % len(self._items)], at_us)
                    self.sent.append(event)
                    stub.RecordInteractions(
                        pb.RecordInteractionsRequest(interactions=[_interaction(event)]),
                        timeout=_CALL_S,
                    )
                    with self._changed:
                        self.acknowledged.append(event)
                        self._changed.notify_all()
                    if step % 5 == 4:
                        stub.Recommend(
                            pb.RecommendRequest(user_id=user, timestamp_us=at_us), timeout=_CALL_S
                        )
            except grpc.RpcError:
                # It was killed; what was under way is nobody's knowledge.
                with self._changed:
                    self._changed.notify_all()


def _interaction(event: Event) -> pb.Interaction:
    user, item, at_us = event
    return pb.Interaction(user_id=user, item_id=item, timestamp_us=at_us)


def killed(
    root: Path,
    folder: Path,
    items: Sequence[str],
    *,
    kills: int,
    options: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Kill a sidecar under load ``kills`` times, and count what is there afterwards.

    Args:
        root: release repository.
        folder: for its state and log; made.
        items: ids that the release knows.
        kills: how often.
        options: of ``hiertcn serve``.
        seed: of the moments.

    Returns:
        ``acknowledged`` interactions, those ``found`` in journals after the last start, and how
        many were ``lost``, ``repeated``, ``never_sent``, ``missing_in_events`` (the parquet for the
        next daily run), ``accepted_again`` (each life's newest, sent once more) and users whose
        ``states_unlike_a_rebuild`` from the log are; ``unanswered_but_there`` were retried.
    """
    draw = random.Random(seed)
    state = folder / "state"
    folder.mkdir(parents=True)
    began = time.monotonic()
    acknowledged: set[Event] = set()
    sent: set[Event] = set()
    newest: dict[str, Event] = {}
    unanswered: list[Event] = []
    accepted_again = unanswered_but_there = 0
    begin_us = 0
    for number in range(kills):
        serving = _served(root, state, folder, options)
        try:
            with RecommenderClient(serving.address) as client:
                begin_us = begin_us or _watermark_us(client) + 1_000_000
                for event in newest.values():
                    accepted_again += client.record([Interaction(*event)]).accepted
                for event in unanswered:
                    unanswered_but_there += client.record([Interaction(*event)]).duplicates
                acknowledged.update(unanswered)
            life = _Life(serving.address, number, begin_us, items)
            life.wait_for(draw.randrange(_MOST_ACKNOWLEDGED))
        finally:
            os.kill(serving.pid, signal.SIGKILL)
            serving.stop()
        unanswered = life.end()
        acknowledged.update(life.acknowledged)
        newest = {event[0]: event for event in life.acknowledged}
        sent.update(life.sent)
    users = sorted({user for user, _, _ in sent})
    journals, ranked = _served_state(root, state, folder, options, users)
    events = _exported(state / "events")
    shutil.rmtree(state / STORE_FOLDER)
    _, rebuilt = _served_state(root, state, folder, options, users)
    return {
        "kills": kills,
        "acknowledged": len(acknowledged),
        "found": sum(event in journals for event in acknowledged),
        "lost": sum(event not in journals for event in acknowledged),
        "repeated": sum(count - 1 for count in journals.values()),
        "never_sent": sum(event not in sent for event in journals),
        "missing_in_events": sum(event not in events for event in acknowledged),
        "accepted_again": accepted_again,
        "unanswered_but_there": unanswered_but_there,
        "states_unlike_a_rebuild": sum(
            not _alike(one, other) for one, other in zip(ranked, rebuilt, strict=True)
        ),
        "seconds": time.monotonic() - began,
    }


def _served(root: Path, state: Path, folder: Path, options: Sequence[str]) -> ServingProcess:
    return ServingProcess(
        root, state, folder / "log", model_deadline_ms=10_000, options=list(options)
    )


def _served_state(
    root: Path, state: Path, folder: Path, options: Sequence[str], users: Sequence[str]
) -> tuple[Counter[Event], list[list[tuple[str, float]]]]:
    """Everyone's journal, and recommendations when every session has closed."""
    journals: Counter[Event] = Counter()
    serving = _served(root, state, folder, options)
    try:
        with RecommenderClient(serving.address, timeout_s=30.0) as client:
            for user in users:
                found = client.get_user(user)
                journal = found.journal if found is not None else []
                journals.update((user, entry.item_id, entry.timestamp_us) for entry in journal)
            # Only then is it the same whether the sweeper has been there or not.
            at_us = max((at_us for _, _, at_us in journals), default=0) + _GAP_US
            found_for = [client.recommend(user, timestamp_us=at_us) for user in users]
    finally:
        serving.stop()
    return journals, [[(item.item_id, item.score) for item in one.items] for one in found_for]


def _alike(one: list[tuple[str, float]], other: list[tuple[str, float]]) -> bool:
    return [item for item, _ in one] == [item for item, _ in other] and np.allclose(
        [score for _, score in one], [score for _, score in other], rtol=1e-3, atol=1e-4
    )


def _exported(events: Path) -> set[Event]:
    found: set[Event] = set()
    for path in events.rglob("*.parquet"):
        table = pq.ParquetFile(path).read(["user_id", "item_id", "timestamp"])
        times_us = table.column("timestamp").cast("int64").to_pylist()
        users, items = (table.column(name).to_pylist() for name in ("user_id", "item_id"))
        found.update(zip(users, items, times_us, strict=True))
    return found


def _watermark_us(client: RecommenderClient) -> int:
    releases = client.releases()
    return next(
        release.watermark_us for release in releases.releases if release.number == releases.serving
    )


def _steady_at_rate(
    root: Path, folder: Path, options: Sequence[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    arguments.seconds, arguments.warm_up = arguments.reading, 0.0
    load = Load(arguments.folder, arguments)
    folder.mkdir(parents=True)
    serving = _served(root, folder / "state", folder, options)
    try:

        def turn() -> dict[str, int]:
            found = load.run(serving.address, serving.pid, load.mix, "--rate", str(arguments.rate))
            errors = {f"errors_{code}": count for code, count in found["errors"].items()}
            return {"answered": found["ok"], **errors}

        return steady(turn, serving.pid, turns=int(arguments.minutes * 60 / arguments.reading))
    finally:
        serving.stop()


def steady(turn: Callable[[], dict[str, int]], pid: int, *, turns: int) -> dict[str, Any]:
    """Load a sidecar ``turns`` times and say what its memory did meanwhile.

    Args:
        turn: loads it for a while; returns how much was ``answered``, and what else to sum.
        pid: its first process.
        turns: at least 4.

    Returns:
        sums of what ``turn`` returned; ``rss_mib`` and ``anonymous_mib`` of all processes at the
        ``start`` (after the first turn), at the ``end``, and their ``slope_per_hour`` and
        ``growth_per_request_bytes`` over the second half.

    Raises:
        InputError: too few turns.
    """
    if turns < 4:
        raise InputError(f"{turns} turns are too few for a slope; expected 4 or more")
    totals: Counter[str] = Counter()
    began = time.monotonic()
    readings = []
    for _ in range(turns):
        totals.update(turn())
        memory = _memory_bytes(pid)
        readings.append((time.monotonic() - began, totals["answered"], *memory))
        print(
            f"{readings[-1][0]:.0f} s: {dict(totals)}, {memory[0] >> 20} MiB resident, "
            f"{memory[1] >> 20} MiB anonymous",
            file=sys.stderr,
            flush=True,
        )
    seconds, answered, *kinds = np.array(readings, np.float64).T
    half = turns // 2
    figures: dict[str, Any] = {"seconds": float(seconds[-1]), **totals}
    for name, found in zip(("rss_mib", "anonymous_mib"), kinds, strict=True):
        mib = found / 2**20
        by_second = np.polyfit(seconds[half:], mib[half:], 1)[0]
        by_request = np.polyfit(answered[half:], found[half:], 1)[0]
        figures[name] = {
            "start": float(mib[0]),
            "end": float(mib[-1]),
            "slope_per_hour": float(3600 * by_second),
            "growth_per_request_bytes": float(by_request),
        }
    return figures


def _memory_bytes(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and its descendants."""
    first = psutil.Process(pid)
    resident = anonymous = 0
    for process in itertools.chain([first], first.children(recursive=True)):
        try:
            resident += process.memory_info().rss
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Anonymous:"):
                    anonymous += int(line.split()[1]) * 1024
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
    return resident, anonymous


if __name__ == "__main__":
    main()
