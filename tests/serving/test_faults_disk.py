"""A full disk, a slow disk, a damaged log tail and damaged releases, under a serving sidecar."""

import concurrent.futures
import contextlib
import os
import resource
import shutil
import threading

import grpc
import pytest

from hiertcn.errors import ReleaseError
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.client import Interaction
from tests.waiting import WAIT_S, patient_client, until

FIRST, SECOND = 2026010101, 2026010201
HOUR_US = 3_600_000_000
T0 = 1_767_225_600_000_000 + HOUR_US


@pytest.fixture
def start(shared_toy, start_sidecar):
    def started(**options):
        return start_sidecar(shared_toy, "", models="in-process", **options)

    return started


@contextlib.contextmanager
def no_file_beyond(size):
    """Every file of this process ends at ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def open_segment(running):
    return max((running.options.state_dir / "log").glob("*.log"))


def journal(client, user):
    return [(one.item_id, one.timestamp_us - T0) for one in client.get_user(user).journal]


def ids(found):
    return [item.item_id for item in found.items]


@pytest.mark.parametrize("room", [20, 4096], ids=["for nothing", "for the log alone"])
def test_on_a_full_disk_recommendations_go_on_and_nothing_is_acknowledged(start, shared_toy, room):
    running = start()
    toy = shared_toy.toys[FIRST]
    running.client.record([Interaction("ada", "item-1", T0)])
    size = open_segment(running).stat().st_size
    assert size + room < (running.options.state_dir / "store/records/data.mdb").stat().st_size
    client = running.client
    request = pb.RecordInteractionsRequest(
        interactions=[pb.Interaction(user_id="ada", item_id="item-2", timestamp_us=T0 + 1)]
    ).SerializeToString()
    with grpc.insecure_channel(running.sidecar.address) as channel:
        without_retries = channel.unary_unary("/hiertcn.v1.Recommender/RecordInteractions")
        with no_file_beyond(size + room):
            for _ in range(2):
                with pytest.raises(grpc.RpcError) as caught:
                    without_retries(request, timeout=30)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "free some space" in caught.value.details()
            for user, at_us, scores in (
                ("ada", T0, toy.scores(toy.start_state, "item-1")),
                ("ada", T0 + HOUR_US, toy.scores(toy.step(toy.start_state, "item-1"))),
                ("nobody", T0, toy.scores(toy.start_state)),
            ):
                found = client.recommend(user, timestamp_us=at_us)
                assert ids(found) == toy.best(scores, 10)
                assert not found.fallback
        again = client.record([Interaction("ada", "item-2", T0 + 1)])
        assert again.accepted + again.duplicates == 1
        assert journal(client, "ada") == [("item-1", 0), ("item-2", 1)]
        assert client.record([Interaction("bob", "item-3", T0)]).accepted == 1
    running.stop()
    running = start()
    assert journal(running.client, "ada") == [("item-1", 0), ("item-2", 1)]
    assert journal(running.client, "bob") == [("item-3", 0)]


def test_a_slow_disk_holds_up_recordings_together_and_recommendations_never(
    start, shared_toy, monkeypatch
):
    running = start()
    client, toy = running.client, shared_toy.toys[FIRST]
    client.record([Interaction("ada", "item-1", T0)])
    is_fast, is_syncing = threading.Event(), threading.Event()
    sync, synced = os.fdatasync, []

    def slow(descriptor):
        synced.append(descriptor)
        is_syncing.set()
        assert is_fast.wait(WAIT_S)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    writers = 40
    with (
        patient_client(running.sidecar.address) as patient,
        concurrent.futures.ThreadPoolExecutor(writers) as pool,
    ):
        recording = [
            pool.submit(patient.record, [Interaction(f"w{n}", "item-2", T0)])
            for n in range(writers)
        ]
        try:
            assert is_syncing.wait(WAIT_S)
            until(
                lambda: (
                    running.value("hiertcn_requests_in_flight", method="RecordInteractions")
                    == writers
                )
            )
            for _ in range(5):
                found = client.recommend("ada", timestamp_us=T0)
                assert ids(found) == toy.best(toy.scores(toy.start_state, "item-1"), 10)
            assert client.get_user("w0") is None
            assert not any(one.done() for one in recording)
        finally:
            is_fast.set()
        assert sum(one.result().accepted for one in recording) == writers
    # The first one's, that of all who came meanwhile, and what little came in between.
    assert len(synced) <= 5


@pytest.mark.parametrize("damage", ["a bit", "the end"])
@pytest.mark.parametrize("store", ["there", "lost"])
def test_a_damaged_log_tail_costs_at_most_its_last_entry(start, store, damage):
    running = start()
    for n in range(5):
        running.client.record([Interaction("ada", f"item-{n}", T0 + n)])
    segment, state = open_segment(running), running.options.state_dir
    data = bytearray(segment.read_bytes())
    running.stop()
    # As a killed process leaves it: not sealed, not exported.
    segment.with_suffix(".exported.json").unlink()
    for later in (state / "log").glob("*.log"):
        if later > segment:
            later.unlink()
    if damage == "a bit":
        data[-3] ^= 4
    segment.write_bytes(data if damage == "a bit" else data[:-3])
    if store == "lost":
        shutil.rmtree(state / "store")
    running = start()
    kept = 5 if store == "there" else 4
    assert len(journal(running.client, "ada")) == kept
    assert running.client.record([Interaction("ada", "item-9", T0 + 9)]).accepted == 1
    running.stop()
    running = start()
    assert len(journal(running.client, "ada")) == kept + 1
    assert running.client.record([Interaction("ada", "item-9", T0 + 9)]).duplicates == 1


def test_whichever_file_of_a_release_is_damaged_it_is_named_and_the_old_one_serves(
    toy_repository, start_sidecar
):
    old = toy_repository.publish(FIRST, seed=1)
    toy_repository.publish(SECOND, seed=2, activate=False)
    repository = toy_repository.repository
    running = start_sidecar(toy_repository, "", models="in-process")
    files = [path for path in repository.path(SECOND).rglob("*") if path.is_file()]
    files = [path for path in files if path.name != "manifest.json" and path.stat().st_size]
    files += [repository.model_path(model, SECOND) for model in ("tcn", "gru_step")]
    assert {"states.npy", "model.onnx", "vectors.bin"} <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        for damaged in (bytes([data[0] ^ 1]) + data[1:], data[:-1]):
            path.write_bytes(damaged)
            with pytest.raises(ReleaseError, match=path.name.replace(".", r"\.")):
                running.client.activate(SECOND)
        path.write_bytes(data)
        found = running.client.recommend("user-0")
        assert (found.release, found.fallback) == (FIRST, False)
        assert ids(found) == old.best(old.scores(old.states["user-0"]), 10)
    assert running.client.activate(SECOND) == SECOND
    running.stop()
    repository.model_path("tcn", SECOND).write_bytes(b"")
    with pytest.raises(ReleaseError, match=r"model\.onnx"):
        start_sidecar(toy_repository, "", models="in-process")
