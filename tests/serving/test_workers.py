import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest

from hiertcn.files import read_json
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.client import Interaction
from hiertcn.serving.records.record import user_key
from hiertcn.serving.stores.store_lmdb import LmdbStore
from tests.waiting import PATIENT_SERVE, WAIT_S, patient_client, until

NUMBER = 2026010101
WORKERS = 2
CONNECTIONS = 24


class Serving:
    """``hiertcn serve --workers 2`` as a process, and one client for each of many connections."""

    def __init__(self, root, folder):
        self.state_dir = folder / "state"
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hiertcn.cli", "serve", f"--repository={root}"),
                *(f"--state-dir={self.state_dir}", "--port=0", "--metrics-port=0"),
                *(f"--workers={WORKERS}", "--models=in-process", PATIENT_SERVE),
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        ready = self.state_dir / "serving.json"
        until(lambda: ready.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, (folder / "log").read_text()
        self.about = read_json(ready)
        self.clients = []

    def connect(self):
        self.clients = [patient_client(self.about["address"]) for _ in range(CONNECTIONS)]
        return self.clients

    def stop(self):
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(WAIT_S)
        self.log.close()


@pytest.fixture(scope="module")
def toys(tmp_path_factory, shared_toy):
    return shared_toy


@pytest.fixture(scope="module")
def serving(toys, tmp_path_factory):
    """Stopped by the last test of this file."""
    serving = Serving(toys.root, tmp_path_factory.mktemp("workers"))
    yield serving
    serving.stop()


def ids(found):
    return [item.item_id for item in found.items]


def connections_by_process(serving):
    port = int(serving.about["address"].rpartition(":")[2])
    return [
        sum(
            one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED
            for one in psutil.Process(pid).net_connections("tcp")
        )
        for pid in serving.about["workers"]
    ]


def test_one_users_interactions_are_applied_in_order_and_once_whoever_receives_them(serving, toys):
    toy, clients = toys.toys[NUMBER], serving.connect()
    start = toy.watermark_us + 1_000_000
    for client in clients:
        client.get_user("nobody")
    assert len(serving.about["workers"]) == WORKERS
    assert sum(count > 0 for count in connections_by_process(serving)) >= 2
    entries = [Interaction("ada", f"item-{n % 50}", start + n) for n in range(200)]

    def record(n):
        return [
            (found.accepted, found.duplicates)
            for found in (
                clients[(n + again) % CONNECTIONS].record([entries[n]]) for again in range(2)
            )
        ]

    with ThreadPoolExecutor(16) as threads:
        outcomes = list(threads.map(record, range(200)))
    assert outcomes == [[(1, 0), (0, 1)]] * 200
    expected = [(entry.item_id, start + n) for n, entry in enumerate(entries)]
    for client in clients[::5]:
        journal = client.get_user("ada").journal
        assert [(entry.item_id, entry.timestamp_us) for entry in journal] == expected


def test_every_process_ranks_alike_and_sees_what_was_acknowledged(serving, toys):
    toy, clients = toys.toys[NUMBER], serving.clients
    start = toy.watermark_us + 1_000_000
    clients[0].record(
        [Interaction("bob", "item-3", start), Interaction("bob", "item-4", start + 1)]
    )
    expected = toy.best(toy.scores(toy.start_state, "item-3", "item-4"), 5)
    folded = toy.best(toy.scores(toy.step(toy.start_state, "item-3", "item-4")), 5)
    for client in clients:
        assert ids(client.recommend("bob", k=5, timestamp_us=start + 2)) == expected
    for client in clients:
        found = client.recommend("bob", k=5, timestamp_us=start + 7_200_000_000)
        assert ids(found) == folded


def test_errors_come_back_through_every_process(serving):
    for client in serving.clients[:8]:
        with pytest.raises(Exception, match=r"interactions\[0\].item_id is empty"):
            client.record([Interaction("eve", "")])
    with grpc.insecure_channel(serving.about["address"]) as channel:
        ask = channel.stream_stream("/hiertcn.v1.Recommender/StreamInteractions")
        one = pb.RecordInteractionsRequest(
            interactions=[pb.Interaction(user_id="stream", item_id="item-1")]
        ).SerializeToString()
        replies = [
            pb.RecordInteractionsResponse.FromString(reply) for reply in ask(iter([one] * 3))
        ]
        assert [reply.accepted for reply in replies] == [1, 1, 1]


def test_every_process_says_that_it_is_ready(serving):
    pages = [serving.about["metrics"], *serving.about["worker_metrics"]]
    assert len(pages) == WORKERS
    for page in pages:
        # An error status would raise.
        with urllib.request.urlopen(page.replace("/metrics", "/readyz"), timeout=WAIT_S) as answer:
            assert answer.read() == b"yes\n"


def test_a_process_that_dies_is_replaced(serving):
    before = serving.about["workers"]
    os.kill(before[1], signal.SIGKILL)
    parent = psutil.Process(serving.process.pid)
    until(
        lambda: any(
            child.pid not in before and child.status() != psutil.STATUS_ZOMBIE
            for child in parent.children()
        )
    )


def test_sigterm_drains_every_process_and_nothing_acknowledged_is_lost(serving, toys):
    clients = serving.clients
    start = toys.toys[NUMBER].watermark_us + 1_000_000
    acknowledged = []

    def load(n):
        for place in range(n, 1_000_000, CONNECTIONS):
            entry = Interaction(f"user-{n}", f"item-{place % 50}", start + place)
            try:
                clients[n].record([entry])
            except Exception:
                return
            acknowledged.append((n, entry.timestamp_us))

    processes = psutil.Process(serving.process.pid).children()
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        running = [threads.submit(load, n) for n in range(CONNECTIONS)]
        while len(acknowledged) < 100:
            assert serving.process.poll() is None
            time.sleep(0.01)
        serving.process.send_signal(signal.SIGTERM)
        assert serving.process.wait(WAIT_S) == 0
        for one in running:
            one.result()
    assert not any(process.is_running() for process in processes)
    store = LmdbStore(serving.state_dir / "store")
    try:
        records = store.get_many([user_key(f"user-{n}") for n in range(CONNECTIONS)])
    finally:
        store.close()
    times_us = {
        (n, time_us)
        for n, record in enumerate(records)
        if record is not None
        for time_us in record.journal.timestamps_us.tolist()
    }
    assert set(acknowledged) <= times_us
