import dataclasses
import json

import numpy as np
import pytest

from hiertcn.errors import InputError
from hiertcn.serving.event_log import BEGINNING, Position
from hiertcn.serving.record import new_record, user_key
from hiertcn.serving.store import RecordStore


def record(revision=1, layers=2, hidden=6):
    return dataclasses.replace(
        new_record(np.full((layers, hidden), revision, np.float32)), revision=revision
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def test_records_and_position_are_kept_together(folder):
    store = RecordStore(folder)
    assert store.applied == BEGINNING
    assert store.get(user_key("ada")) is None
    store.write({user_key("ada"): record(3)}, Position(2, 77))
    store.write({user_key("bob"): record(4)})
    assert len(store) == 2
    store.close()
    store = RecordStore(folder)
    assert not store.was_emptied
    assert store.applied == Position(2, 77)
    found = store.get_many([user_key("bob"), user_key("eve"), user_key("ada")])
    assert [one.revision if one else None for one in found] == [4, None, 3]
    store.close()


def test_the_map_grows_with_the_data(folder):
    store = RecordStore(folder, map_bytes=1 << 18)
    for block in range(8):
        store.write({user_key(f"{block}-{n}"): record(n, 4, 128) for n in range(200)})
    assert len(store) == 1600
    assert store.get(user_key("7-199")).revision == 199
    store.close()


def test_one_process_at_a_time(folder):
    store = RecordStore(folder)
    with pytest.raises(InputError, match="in use by another sidecar"):
        RecordStore(folder)
    store.close()
    RecordStore(folder).close()


def test_a_crash_of_the_machine_empties_the_store(folder):
    store = RecordStore(folder)
    store.write({user_key("ada"): record()}, Position(1, 9))
    store.sync()
    marker = json.loads((folder / "state.json").read_text())
    store.close()
    (folder / "state.json").write_text(json.dumps({**marker, "boot_id": "before the crash"}))
    store = RecordStore(folder)
    assert store.was_emptied
    assert store.applied == BEGINNING
    assert len(store) == 0
    store.close()


def test_a_clean_stop_outlives_a_reboot(folder):
    store = RecordStore(folder)
    store.write({user_key("ada"): record()}, Position(1, 9))
    store.close()
    marker = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**marker, "boot_id": "another boot"}))
    store = RecordStore(folder)
    assert store.get(user_key("ada")) is not None
    store.close()


def test_a_damaged_record_reads_as_none_and_empties_the_store_at_the_next_start(folder):
    store = RecordStore(folder)
    store.write({user_key("ada"): record(), user_key("bob"): record()}, Position(1, 9))
    with store._environment.begin(write=True) as transaction:
        transaction.put(user_key("ada"), b"rubbish")
    assert store.get(user_key("ada")) is None
    assert store.get(user_key("bob")) is not None
    store.close()
    store = RecordStore(folder)
    assert store.was_emptied
    store.close()
