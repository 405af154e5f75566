"""A damaged store costs a rebuild from the log, whichever page it is, and no interaction.

A damaged record costs its own, at its next touch and while the sidecar serves; so does a page that
LMDB itself finds damaged, and all of the store.
"""

import os
import random
import shutil
import signal

import pytest

from hiertcn.serving.client import Interaction
from hiertcn.serving.records.record import user_key
from pipelines.serving_process import ServingProcess
from tests.waiting import until

PAGE = 4096
T0 = 1_767_225_600_000_000 + 3_600_000_000
USERS = [f"u{n}" for n in range(60)]
EACH = dict.fromkeys(USERS, 5)


@pytest.fixture
def recorded(shared_toy, start_sidecar, tmp_path):
    """A state folder with a few hundred interactions in many small commits, cleanly closed."""
    state = tmp_path / "recorded"
    running = start_sidecar(shared_toy, "", models="in-process", fsync="os", state_dir=state)
    for step in range(5):
        for user in USERS:
            running.client.record([Interaction(user, f"item-{step}", T0 + step)])
    running.stop()
    return state


def last_page_zero(data, draw):
    return data[:-PAGE] + bytes(PAGE)


def last_page_random(data, draw):
    return data[:-PAGE] + draw.randbytes(PAGE)


def half_a_page_short(data, draw):
    return data[: -PAGE // 2]


def half_gone(data, draw):
    return data[: len(data) // 2 // PAGE * PAGE]


def beginning_random(data, draw):
    return draw.randbytes(2 * PAGE) + data[2 * PAGE :]


def any_pages_random(data, draw):
    damaged = bytearray(data)
    for page in draw.sample(range(2, len(data) // PAGE), 10):
        damaged[page * PAGE : (page + 1) * PAGE] = draw.randbytes(PAGE)
    return bytes(damaged)


DAMAGES = [
    *(last_page_zero, last_page_random, half_a_page_short, half_gone, beginning_random),
    any_pages_random,
]


def test_a_damaged_store_is_rebuilt_from_the_log(recorded, shared_toy, start_sidecar, tmp_path):
    for damage in DAMAGES:
        state = tmp_path / damage.__name__
        shutil.copytree(recorded, state)
        file = state / "store" / "records" / "data.mdb"
        file.write_bytes(damage(file.read_bytes(), random.Random(0)))
        # What only shows once it is read is repaired by the start after that.
        for _ in range(2):
            running = start_sidecar(
                shared_toy, "", models="in-process", fsync="os", state_dir=state
            )
            found = {user: running.client.get_user(user) for user in USERS}
            running.stop()
        assert {user: len(one.journal) for user, one in found.items()} == EACH, damage


def test_a_crash_in_native_code_leaves_a_note_and_the_next_start_a_new_store(
    recorded, shared_toy, start_sidecar, tmp_path
):
    """What touching a damaged page of a mapped file does to a process, at every start."""
    state = tmp_path / "state"
    shutil.copytree(recorded, state)
    serving = ServingProcess(
        shared_toy.root, state, state / "printed", options=["--models=in-process"]
    )
    os.kill(serving.pid, signal.SIGBUS)
    serving.stop()
    assert b"Bus error" in (state / "store" / "crash").read_bytes()
    file = state / "store" / "records" / "data.mdb"
    file.write_bytes(any_pages_random(file.read_bytes(), random.Random(0)))
    running = start_sidecar(shared_toy, "", models="in-process", state_dir=state)
    assert {user: len(running.client.get_user(user).journal) for user in USERS} == EACH
    assert running.client.record([Interaction("u1", "item-9", T0 + 9)]).accepted == 1
    assert (state / "store" / "crash").read_bytes() == b""


@pytest.fixture
def served(shared_toy, start_sidecar, tmp_path):
    """A sidecar that has recorded sessions of all users: a closed one, and one that is open."""
    running = start_sidecar(shared_toy, "", models="in-process", fsync="os")
    for step in (0, 1, 2, 7_200_000_000, 7_200_000_001):
        running.client.record([Interaction(user, f"item-{step % 50}", T0 + step) for user in USERS])
    return running


def journal_of(client, user):
    return [(one.item_id, one.timestamp_us) for one in client.get_user(user).journal]


NOW = T0 + 7_200_000_002
TOUCHES = {
    "recommend": lambda client, user: client.recommend(user, k=5, timestamp_us=NOW),
    "get_user": lambda client, user: journal_of(client, user),
    "repeat": lambda client, user: client.record([Interaction(user, "item-1", T0 + 1)]),
}


def flip_a_bit(served, users):
    """In the stored records of some users. LMDB must not be opened twice by one process."""
    with served.sidecar.store._environment.begin(write=True) as transaction:
        for user in users:
            stored = transaction.get(user_key(user))
            transaction.put(user_key(user), stored[:-1] + bytes([stored[-1] ^ 1]))


def test_a_record_damaged_while_serving_is_made_again_at_its_next_touch(served):
    client, users = served.client, USERS[:9]
    before = {
        name: {user: touch(client, user) for user in users} for name, touch in TOUCHES.items()
    }
    for name, touch in TOUCHES.items():
        repaired = served.value("hiertcn_records_repaired_total")
        flip_a_bit(served, users)
        assert {user: touch(client, user) for user in users} == before[name]
        assert served.value("hiertcn_records_repaired_total") == repaired + len(users)
        assert {user: journal_of(client, user) for user in users} == before["get_user"]


def test_a_damaged_record_neither_hides_nor_brings_back_a_deleted_user(served):
    client = served.client
    flip_a_bit(served, ["u1"])
    assert client.delete_user("u1")
    client.record([Interaction("user-0", "item-1", NOW)])
    assert client.delete_user("user-0")
    flip_a_bit(served, ["u1", "user-0"])
    for user in ("u1", "user-0"):
        assert client.get_user(user) is None
        client.record([Interaction(user, "item-2", NOW + 1)])
        flip_a_bit(served, [user])
        assert journal_of(client, user) == [("item-2", NOW + 1)]


@pytest.mark.parametrize("touch", [*TOUCHES, "record", "sweep"])
def test_damaged_pages_are_found_while_serving_and_the_store_is_filled_again(served, touch):
    client, user = served.client, USERS[0]
    client.delete_user("u59")
    expected = {one: journal_of(client, one) for one in USERS[:59]}
    before = {name: ask(client, user) for name, ask in TOUCHES.items()}
    counted = served.sidecar.sweeper._recent.end
    file = served.options.state_dir / "store" / "records" / "data.mdb"
    # The pages of metadata stay. No other is of any kind, which LMDB looks at before it follows.
    with file.open("r+b") as pages:
        pages.seek(2 * PAGE)
        pages.write(bytes(file.stat().st_size - 2 * PAGE))
    if touch == "record":
        assert client.record([Interaction(user, "item-9", NOW)]).accepted == 1
        expected[user] = [*expected[user], ("item-9", NOW)]
        counted += 1
    elif touch == "sweep":
        served.run(served.sidecar.sweeper.step(NOW))
    else:
        assert TOUCHES[touch](client, user) == before[touch]
    until(lambda: {one: journal_of(client, one) for one in expected} == expected)
    assert client.get_user("u59") is None
    # What was counted as live is not counted again.
    assert served.sidecar.sweeper._recent.end == counted
    assert client.record([Interaction("u1", "item-9", NOW)]).accepted == 1
    served.stop()
