"""What every store of user records does, on LMDB, on a real server, and on a cluster of one."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiertcn.serving.log.event_log import BEGINNING, Position
from hiertcn.serving.records.record import DAMAGED, new_record, user_key
from hiertcn.serving.stores.store import Change
from hiertcn.serving.stores.store_lmdb import LmdbStore
from hiertcn.serving.stores.store_valkey import ValkeyStore
from tests.waiting import until

ADA, BOB, EVE = (user_key(user) for user in ("ada", "bob", "eve"))


def record(revision=1, layers=2, hidden=6):
    return dataclasses.replace(
        new_record(np.full((layers, hidden), revision, np.float32)), revision=revision
    )


def revisions(store, *keys):
    return [one.revision if one else None for one in store.get_many(keys)]


@pytest.fixture(scope="module")
def server(start_redis):
    return start_redis()


@pytest.fixture(scope="module")
def cluster(start_redis):
    server = start_redis("--cluster-enabled", "yes")
    cover_all_slots(server)
    return server


@pytest.fixture(params=["lmdb", "server", "cluster"])
def open_store(request, tmp_path):
    """Opens the same store again and again."""
    opened = []
    if request.param == "lmdb":

        def open_again(**options):
            opened.append(LmdbStore(tmp_path / "store", **options))
            return opened[-1]

    else:
        url = f"{request.getfixturevalue(request.param).url}?prefix={tmp_path.name}"

        def open_again(**options):
            opened.append(ValkeyStore(url, "one log", **options))
            return opened[-1]

    yield open_again
    for store in opened:
        store.close()


def cover_all_slots(server):
    import valkey

    client = valkey.Valkey(port=server.port)
    client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    until(lambda: b"state:ok" in client.execute_command("CLUSTER", "INFO"))
    client.close()


def test_records_and_position_are_kept_together(open_store):
    store = open_store()
    assert store.applied == store.newest_applied == BEGINNING
    assert store.get(ADA) is None
    assert store.write({ADA: Change(record(3), None)}, Position(2, 77)) == set()
    assert store.write({BOB: Change(record(4), None)}) == set()
    assert len(store) == 2
    assert store.applied_for(ADA) == Position(2, 77)
    assert store.write({}, Position(2, 80)) == set()
    store.close()
    store = open_store()
    assert store.applied == store.applied_for(EVE) == Position(2, 80)
    assert revisions(store, BOB, EVE, ADA) == [4, None, 3]
    np.testing.assert_array_equal(store.get(BOB).state, record(4).state)


def test_a_change_whose_base_is_gone_is_refused_and_its_position_stays(open_store):
    store = open_store()
    assert store.write({ADA: Change(record(1), None)}, Position(1, 5)) == set()
    refused = store.write({ADA: Change(record(2), 7), BOB: Change(record(1), None)}, Position(1, 9))
    assert refused == {ADA}
    assert revisions(store, ADA, BOB) == [1, 1]
    assert store.applied_for(ADA) == Position(1, 5)
    assert store.write({ADA: Change(None, 1), BOB: Change(record(2), None)}) == {BOB}
    assert revisions(store, ADA, BOB) == [None, 1]


def test_a_refused_change_does_not_refuse_others(open_store):
    store = open_store()
    # Of one bucket, so that a server meets them in one script.
    keys = [bytes([7, n]) + bytes(14) for n in range(4)]
    store.write({key: Change(record(1), None) for key in keys})
    refused = store.write({key: Change(record(2), 1 + (n == 2)) for n, key in enumerate(keys)})
    assert refused == {keys[2]}
    assert revisions(store, *keys) == [2, 2, 1, 2]


def damage(store, key):
    """Flip a bit of a stored record behind the store's back."""
    if isinstance(store, LmdbStore):
        with store._environment.begin(write=True) as transaction:
            stored = transaction.get(key)
            transaction.put(key, stored[:-1] + bytes([stored[-1] ^ 1]))
    else:
        name = store._record_key(key)
        stored = store.execute("GET", name)
        store.execute("SET", name, stored[:-1] + bytes([stored[-1] ^ 1]))


def test_a_damaged_record_reads_as_none_and_gives_way_only_to_its_repair(open_store):
    store = open_store()
    store.write({ADA: Change(record(1), None), BOB: Change(record(1), None)})
    assert not store.damaged()
    damage(store, ADA)
    assert revisions(store, ADA, BOB) == [None, 1]
    assert set(store.damaged()) == {ADA}
    assert store.write({ADA: Change(record(1), None)}) == {ADA}
    assert store.write({ADA: Change(record(9), DAMAGED), BOB: Change(record(9), DAMAGED)}) == {BOB}
    assert revisions(store, ADA, BOB) == [9, 1]
    assert not store.damaged()
    damage(store, ADA)
    assert store.get(ADA) is None
    assert store.write({ADA: Change(None, DAMAGED)}) == set()
    assert store.get(ADA) is None
    assert not store.damaged()


def test_many_records_are_read_written_and_scanned(open_store):
    store = open_store()
    keys = [user_key(f"u{n}") for n in range(2500)]
    store.write({key: Change(record(n + 1), None) for n, key in enumerate(keys)}, Position(1, 9))
    assert revisions(store, *keys[::-1]) == list(range(2500, 0, -1))
    found, after = store.scan(b"", 700)
    while after:
        more, after = store.scan(after, 700)
        found += more
    assert sorted(set(found)) == sorted(keys)
    assert len(store) == 2500


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(st.sampled_from([ADA, BOB, EVE]), st.none() | st.integers(1, 3), st.booleans()),
        max_size=12,
    )
)
def test_any_changes_end_as_in_a_dictionary(open_store, changes):
    store = open_store()
    held = {
        key: revision
        for key, revision in zip((ADA, BOB, EVE), revisions(store, ADA, BOB, EVE), strict=True)
        if revision is not None
    }
    for key, base, removes in changes:
        change = Change(None if removes else record((base or 0) + 1), base)
        refused = held.get(key) != base
        assert store.write({key: change}) == ({key} if refused else set())
        if not refused:
            held.pop(key, None)
            if not removes:
                held[key] = (base or 0) + 1
        assert revisions(store, ADA, BOB, EVE) == [held.get(one) for one in (ADA, BOB, EVE)]
    store.close()


def test_half_precision_states_are_read_as_float32_by_any_store(open_store):
    store = open_store(state_dtype="float16")
    exact = dataclasses.replace(record(), state=np.float32([[0.1, -0.75], [1e-3, 0.999]]))
    store.write({ADA: Change(exact, None)})
    store.close()
    store = open_store()
    found = store.get(ADA)
    assert found.state.dtype == np.float32
    np.testing.assert_array_equal(found.state, exact.state.astype(np.float16))
    store.write({ADA: Change(dataclasses.replace(exact, revision=2), 1)})
    np.testing.assert_array_equal(store.get(ADA).state, exact.state)
