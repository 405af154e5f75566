"""Several sidecars on one Valkey, and one whose server dies, on the models in this process."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from hiertcn.errors import ServingError
from hiertcn.serving.client import Interaction
from hiertcn.serving.log.event_log import LoggedDeletion, read_segment
from tests.waiting import until

SECOND_US = 1_000_000
T0 = 1_767_225_600_000_000 + 3600 * SECOND_US


@pytest.fixture(scope="module")
def server(start_redis):
    return start_redis("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture
def two(shared_toy, start_sidecar, server, tmp_path):
    url = f"{server.url}?prefix={tmp_path.name}"
    return [
        start_sidecar(
            shared_toy, "", models="in-process", store=url, state_dir=tmp_path / name, fsync="os"
        )
        for name in ("a", "b")
    ]


def test_one_users_interactions_meet_whichever_sidecar_took_them(two):
    def record(n):
        sidecar = two[n % 2]
        return sidecar.client.record([Interaction("ada", f"item-{n % 50}", T0 + n)]).accepted

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(record, range(80))) == 80
    for sidecar in two:
        journal = sidecar.client.get_user("ada").journal
        assert [entry.timestamp_us for entry in journal] == [T0 + n for n in range(80)]
        assert sidecar.client.record([Interaction("ada", "item-7", T0 + 7)]).duplicates == 1
    found = [sidecar.client.recommend("ada", timestamp_us=T0 + 90) for sidecar in two]
    assert found[0].items == found[1].items


def test_live_counts_and_deletions_reach_the_other_sidecar(two):
    first, second = two
    second.client.record([Interaction("eve", "item-1", T0)])
    first.client.record(
        [Interaction("eve", "item-2", T0 + 1), Interaction("bob", "item-2", T0 + 2)]
    )
    # Three interactions at each: the own ones once, the other's told of.
    for sidecar in two:
        until(lambda sidecar=sidecar: sidecar.sidecar.sweeper._recent.end == 3)
    assert first.client.delete_user("eve")
    assert second.client.get_user("eve") is None
    log = second.options.state_dir / "log"
    (segment,) = log.glob("*.log")
    until(lambda: any(isinstance(entry, LoggedDeletion) for _, entry in read_segment(segment)))
    second.client.record([Interaction("eve", "item-5", T0 + 9)])
    second.stop()
    kept = b"".join(path.read_bytes() for path in log.glob("*.log"))
    assert b"item-1" not in kept
    assert b"item-5" in kept
    assert [entry.item_id for entry in first.client.get_user("eve").journal] == ["item-5"]


def test_a_damaged_record_is_made_again_from_the_own_log(shared_toy, start_sidecar, start_redis):
    import valkey

    server = start_redis()
    running = start_sidecar(shared_toy, "", models="in-process", store=server.url, fsync="os")
    running.client.record([Interaction("ada", f"item-{n}", T0 + n) for n in range(5)])
    before = running.client.recommend("ada", timestamp_us=T0 + 9)
    with valkey.Valkey(port=server.port) as client:
        for touch in ("recommend", "record"):
            (name,) = client.scan_iter(match="hiertcn:*:u:*")
            stored = client.get(name)
            client.set(name, stored[:-1] + bytes([stored[-1] ^ 1]))
            if touch == "recommend":
                found = running.client.recommend("ada", timestamp_us=T0 + 9)
                assert found.items == before.items
            else:
                assert running.client.record([Interaction("ada", "item-1", T0 + 1)]).duplicates
            assert len(running.client.get_user("ada").journal) == 5
    assert running.value("hiertcn_records_repaired_total") == 2


def test_a_server_that_dies_and_forgets_gets_everything_back(
    shared_toy, start_sidecar, start_redis
):
    server = start_redis()
    running = start_sidecar(shared_toy, "", models="in-process", store=server.url, fsync="os")
    running.client.record([Interaction("ada", f"item-{n}", T0 + n) for n in range(5)])
    server.kill()
    with pytest.raises(ServingError, match="cannot be reached"):
        running.client.record([Interaction("ada", "item-5", T0 + 5)])
    with pytest.raises(ServingError, match="cannot be reached"):
        running.client.recommend("ada", timestamp_us=T0)
    server.start()
    # The first write after the server is back finds out what it forgot.
    assert running.client.record([Interaction("bob", "item-1", T0)]).accepted == 1
    journal = running.client.get_user("ada").journal
    assert [entry.timestamp_us for entry in journal] == [T0 + n for n in range(5)]
    server.kill()
    server.start()
    assert running.client.record([Interaction("bob", "item-2", T0 + 1)]).accepted == 1
    assert len(running.client.get_user("ada").journal) == 5
    assert len(running.client.get_user("bob").journal) == 2
    # What was applied again is live once.
    assert running.sidecar.sweeper._recent.end == 7
