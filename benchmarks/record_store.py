"""Reads and writes of user records a second, and how soon a restarted store is ready.

    python -m benchmarks.record_store [--users 1000000] [--redis redis-server] [--json PATH]

Records are those of the paper's network (4 GRU layers of 128), with 20 remembered interactions and
a journal of 5. Every figure stands beside what its database does with the same bytes and nothing
else: lmdb's own get and put, the Valkey client's own MGET and SET, and a dictionary of bytes. Kinds
take turns, so that the machine's noise meets all alike; the best of the rounds counts.
"""

import argparse
import contextlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy as np

from hiertcn.files import write_json
from hiertcn.serving.log.event_log import Position
from hiertcn.serving.records.record import EMPTY_JOURNAL, UserRecord, encode, new_record, user_key
from hiertcn.serving.stores.store import Change, RecordStore
from hiertcn.serving.stores.store_lmdb import LmdbStore
from hiertcn.serving.stores.store_valkey import ValkeyStore

_BATCH: Final = 64
_ROUND_S: Final = 0.5
_SERVER_USERS: Final = 100_000

_RESTART: Final = """
import sys, time
from pathlib import Path
from hiertcn.serving.records.record import user_key
from hiertcn.serving.stores.store_lmdb import LmdbStore
began = time.perf_counter()
store = LmdbStore(Path(sys.argv[1]))
assert store.get(user_key("user-7")) is not None and store.applied.segment == 1
print(time.perf_counter() - began)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--redis", default="redis-server", help="server to start, if on PATH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"users": arguments.users, "batch": _BATCH}
    record = _record()
    for dtype in ("float32", "float16"):
        figures[f"record_bytes_{dtype}"] = len(encode(record, dtype))
    with tempfile.TemporaryDirectory() as name:
        figures["lmdb"] = _lmdb(Path(name), record, arguments.users, arguments.rounds)
        program = shutil.which(arguments.redis)
        if program is not None:
            users = min(arguments.users, _SERVER_USERS)
            with _server(program, Path(name)) as port:
                figures["valkey"] = _valkey(port, record, users, arguments.rounds)
    for store in ("lmdb", "valkey"):
        for kind, value in figures.get(store, {}).items():
            print(f"{store:<8}{kind:<34}{value:>14,.4g}")
    if arguments.json:
        write_json(arguments.json, figures)


def _lmdb(folder: Path, record: UserRecord, users: int, rounds: int) -> dict[str, float]:
    store = LmdbStore(folder / "store")
    _fill(store, record, users)
    choose = np.random.default_rng(0)
    raw = lmdb.open(str(folder / "raw"), map_size=1 << 34, sync=False, metasync=False)
    raw_users = min(users, _SERVER_USERS)
    plain = {user_key(f"user-{n}"): encode(record) for n in range(raw_users)}
    with raw.begin(write=True) as transaction:
        for key, value in plain.items():
            transaction.put(key, value)
    picked = choose.integers(0, raw_users, (256, _BATCH))
    keys = [[user_key(f"user-{n}") for n in some] for some in picked]

    def raw_reads(some: list[bytes]) -> None:
        with raw.begin() as transaction:
            for key in some:
                transaction.get(key)

    def raw_writes(some: list[bytes]) -> None:
        with raw.begin(write=True) as transaction:
            for key in some:
                transaction.put(key, plain[key])

    found = _rates(
        {
            "reads/s, batched": store.get_many,
            "raw get/s, batched": raw_reads,
            "dictionary look-ups/s": lambda some: [plain[key] for key in some],
            "reads/s, one at a time": lambda some: [store.get(key) for key in some],
            "writes/s, batched": lambda some: _write(store, record, some),
            "raw put/s, batched": raw_writes,
        },
        keys,
        rounds,
    )
    raw.close()
    store.close()
    command = [sys.executable, "-c", _RESTART, str(folder / "store")]
    times = [float(subprocess.run(command, check=True, stdout=-1).stdout) for _ in range(3)]
    return found | {
        "restart to first read, s": statistics.median(times),
        "share of raw gets": found["reads/s, batched"] / found["raw get/s, batched"],
    }


def _valkey(port: int, record: UserRecord, users: int, rounds: int) -> dict[str, float]:
    import valkey

    store = ValkeyStore(f"valkey://127.0.0.1:{port}/0", "benchmark")
    _fill(store, record, users)
    choose = np.random.default_rng(0)
    client = valkey.Valkey(port=port)
    names = [store._record_key(user_key(f"user-{n}")) for n in range(users)]
    value = encode(record)
    picked = choose.integers(0, users, (256, _BATCH)).tolist()

    def raw_sets(some: list[int]) -> None:
        with client.pipeline(transaction=False) as pipe:
            for place in some:
                pipe.set(b"raw" + names[place], value)
            pipe.execute()

    def keys(some: list[int]) -> list[bytes]:
        return [user_key(f"user-{n}") for n in some]

    found = _rates(
        {
            "reads/s, batched": lambda some: store.get_many(keys(some)),
            "raw MGET keys/s, batched": lambda some: client.mget([names[n] for n in some]),
            "reads/s, one at a time": lambda some: [store.get(key) for key in keys(some[:8])],
            "raw GET/s, one at a time": lambda some: [client.get(names[n]) for n in some[:8]],
            "compare-and-set/s, batched": lambda some: _write(store, record, keys(some)),
            "raw SET/s, batched": raw_sets,
        },
        picked,
        rounds,
    )
    for kind in ("reads/s, one at a time", "raw GET/s, one at a time"):
        found[kind] *= 8 / _BATCH
    client.close()
    store.close()
    return found | {
        "share of raw MGET": found["reads/s, batched"] / found["raw MGET keys/s, batched"]
    }


def _rates(
    kinds: dict[str, Callable[[Any], object]], batches: list[Any], rounds: int
) -> dict[str, float]:
    best = dict.fromkeys(kinds, 0.0)
    for _ in range(rounds):
        for name, run in kinds.items():
            done, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < _ROUND_S:
                run(batches[done % len(batches)])
                done += 1
            best[name] = max(best[name], done * _BATCH / elapsed)
    return best


def _write(store: RecordStore, record: UserRecord, keys: list[bytes]) -> None:
    # The revision stays, so that every write finds its base.
    store.write({key: Change(record, record.revision) for key in keys})


def _fill(store: RecordStore, record: UserRecord, users: int) -> None:
    for first in range(0, users, 4096):
        last = min(first + 4096, users)
        changes = {user_key(f"user-{n}"): Change(record, None) for n in range(first, last)}
        store.write(changes, Position(1, 100 + last))


def _record() -> UserRecord:
    draw = np.random.default_rng(0)
    journal = EMPTY_JOURNAL
    for n in range(5):
        journal = journal.inserted(f"item-{n:06d}", n, 1_000 + n, late=False, key=0)
    start = new_record(draw.normal(size=(4, 128)).astype(np.float32))
    return UserRecord(
        **{
            **start.__dict__,
            "release": 1,
            "revision": 1,
            "history_item_rows": np.arange(20, dtype=np.int32),
            "history_timestamps_us": np.arange(20),
            "journal": journal,
        }
    )


@contextlib.contextmanager
def _server(program: str, folder: Path) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [
        program,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "Ready to accept connections" in line:
                    break
            yield port
        finally:
            process.kill()


if __name__ == "__main__":
    main()
