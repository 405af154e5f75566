import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from hiertcn.errors import InputError
from hiertcn.serving.log.event_log import BEGINNING, Position
from hiertcn.serving.records.record import new_record, user_key
from hiertcn.serving.stores.store import Change
from hiertcn.serving.stores.store_lmdb import LmdbStore


def record(revision=1, layers=2, hidden=6):
    return dataclasses.replace(
        new_record(np.full((layers, hidden), revision, np.float32)), revision=revision
    )


def put(store, records, applied=None):
    """Store records whatever is stored, as a test's beginning."""
    stored = store.get_many(list(records))
    changes = {
        key: Change(one, before.revision if before else None)
        for (key, one), before in zip(records.items(), stored, strict=True)
    }
    assert store.write(changes, applied) == set()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def test_the_map_grows_with_the_data(folder):
    store = LmdbStore(folder, map_bytes=1 << 18)
    for block in range(8):
        put(store, {user_key(f"{block}-{n}"): record(n, 4, 128) for n in range(200)})
    assert len(store) == 1600
    assert store.get(user_key("7-199")).revision == 199
    store.close()


def test_one_process_at_a_time(folder):
    store = LmdbStore(folder)
    with pytest.raises(InputError, match="in use by another sidecar"):
        LmdbStore(folder)
    store.close()
    LmdbStore(folder).close()


def test_a_crash_of_the_machine_empties_the_store(folder):
    store = LmdbStore(folder)
    put(store, {user_key("ada"): record()}, Position(1, 9))
    store.sync()
    marker = json.loads((folder / "state.json").read_text())
    store.close()
    (folder / "state.json").write_text(json.dumps({**marker, "boot_id": "before the crash"}))
    store = LmdbStore(folder)
    assert store.was_emptied
    assert store.applied == BEGINNING
    assert len(store) == 0
    store.close()


@pytest.mark.parametrize("marker", ["", "nonsense", "[]", "3", '{"format": 99}'])
def test_a_store_that_another_version_left_is_emptied(folder, marker, caplog):
    store = LmdbStore(folder)
    put(store, {user_key("ada"): record()}, Position(1, 9))
    store.close()
    (folder / "state.json").write_text(marker)
    store = LmdbStore(folder)
    assert store.was_emptied
    assert (store.applied, len(store)) == (BEGINNING, 0)
    store.close()
    assert "state.json is not what this version writes" in caplog.text


def test_a_clean_stop_outlives_a_reboot(folder):
    store = LmdbStore(folder)
    put(store, {user_key("ada"): record()}, Position(1, 9))
    store.close()
    marker = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**marker, "boot_id": "another boot"}))
    store = LmdbStore(folder)
    assert store.get(user_key("ada")) is not None
    store.close()


def test_a_damaged_record_reads_as_none_and_empties_the_store_at_the_next_start(folder):
    store = LmdbStore(folder)
    put(store, {user_key("ada"): record(), user_key("bob"): record()}, Position(1, 9))
    with store._environment.begin(write=True) as transaction:
        transaction.put(user_key("ada"), b"rubbish")
    assert store.get(user_key("ada")) is None
    assert store.get(user_key("bob")) is not None
    store.close()
    store = LmdbStore(folder)
    assert store.was_emptied
    store.close()


def test_other_processes_read_what_one_writes(folder):
    with pytest.raises(InputError, match="start the process that writes it first"):
        LmdbStore(folder, read_only=True)
    store = LmdbStore(folder, map_bytes=1 << 18)
    put(store, {user_key("ada"): record(1)}, Position(1, 5))
    reading = (
        "import sys; from pathlib import Path; from hiertcn.serving.records.record import user_key;"
        "from hiertcn.serving.stores.store_lmdb import LmdbStore;"
        "store = LmdbStore(Path(sys.argv[1]), map_bytes=1 << 18, read_only=True)\n"
        "for line in sys.stdin: print(store.get(user_key(line.strip())).revision, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", reading, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:

        def revision_of(user):
            other.stdin.write(f"{user}\n")
            other.stdin.flush()
            return int(other.stdout.readline())

        assert revision_of("ada") == 1
        put(store, {user_key("ada"): record(2)})
        assert revision_of("ada") == 2
        # The file outgrows the map that the other process has.
        put(store, {user_key(f"u{n}"): record(n, 4, 128) for n in range(400)})
        assert revision_of("u399") == 399
        other.stdin.close()
        assert other.wait() == 0
    store.close()


def test_a_reader_that_was_killed_does_not_let_the_file_grow(folder):
    store = LmdbStore(folder)
    put(store, {user_key("ada"): record(1)})
    (data,) = folder.rglob("data.mdb")
    reading = (
        "import sys, lmdb\n"
        "held = lmdb.open(sys.argv[1], readonly=True).begin()\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", reading, str(data.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        other.kill()
    store.sync()
    put(store, {user_key("ada"): record(2, 4, 128)})
    size = data.stat().st_size
    for revision in range(3, 40):
        put(store, {user_key("ada"): record(revision, 4, 128)})
    assert data.stat().st_size <= size + (32 << 10)
    store.close()


def test_a_file_that_is_mostly_free_is_compacted_when_opened(folder):
    store = LmdbStore(folder)
    users = [user_key(f"u{n}") for n in range(17_000)]
    put(store, {key: record(1, 4, 128) for key in users})
    store.write({key: Change(None, 1) for key in users[10:]})
    store.close()
    before = (folder / "records" / "data.mdb").stat().st_size
    store = LmdbStore(folder)
    assert (folder / "records" / "data.mdb").stat().st_size < before / 10
    assert store.get_many(users[:11]).count(None) == 1
    put(store, {users[20]: record(2)})
    store.close()
