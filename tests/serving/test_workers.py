import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import lmdb
import psutil
import pytest

from hiertcn.errors import OverloadError
from hiertcn.files import read_json
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.client import Interaction
from hiertcn.serving.records.record import user_key
from hiertcn.serving.security.access import Access
from hiertcn.serving.stores.store_lmdb import LmdbStore
from tests.waiting import PATIENT_SERVE, WAIT_S, patient_client, until

NUMBER = 2026010101
WORKERS = 2
CONNECTIONS = 24


class Serving:
    """``hiertcn serve --workers 2`` as a process, and one client for each of many connections."""

    def __init__(self, root, folder, *options):
        self.state_dir = folder / "state"
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hiertcn.cli", "serve", f"--repository={root}"),
                *(f"--state-dir={self.state_dir}", "--port=0", "--metrics-port=0"),
                *(f"--workers={WORKERS}", "--models=in-process", PATIENT_SERVE),
                *options,
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        ready = self.state_dir / "serving.json"
        until(lambda: ready.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, (folder / "log").read_text()
        self.about = read_json(ready)
        self.clients = []

    def connect(self, **options):
        more = [patient_client(self.about["address"], **options) for _ in range(CONNECTIONS)]
        self.clients += more
        return more

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


def replacements(serving):
    """Processes that were not there when serving began."""
    return [
        child.pid
        for child in psutil.Process(serving.process.pid).children()
        if child.pid not in serving.about["workers"] and child.status() != psutil.STATUS_ZOMBIE
    ]


def connections_by_process(serving, status=psutil.CONN_ESTABLISHED):
    port = int(serving.about["address"].rpartition(":")[2])
    return [
        sum(
            one.laddr.port == port and one.status == status
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
    toy, clients = toys.toys[NUMBER], serving.connect()
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


def test_a_caller_has_one_rate_over_all_processes_and_their_replacements(toys, tmp_path):
    tokens, access = tmp_path / "tokens", []
    for name in ("first", "second"):
        (tmp_path / name).write_text(f"read {name * 4}\n")
        access.append(Access(token_file=tmp_path / name))
    tokens.write_text("".join((tmp_path / name).read_text() for name in ("first", "second")))
    # A bucket holds one request, and nobody waits 1,000 s for the next.
    serving = Serving(toys.root, tmp_path, f"--token-file={tokens}", "--rate-limit=0.001")

    def admitted(clients):
        def ask(client):
            try:
                return len(client.recommend("ada", k=1).items)
            except OverloadError as error:
                assert "rate limit" in str(error)
                return 0

        with ThreadPoolExecutor(len(clients)) as threads:
            return sum(threads.map(ask, clients))

    try:
        first = serving.connect(access=access[0])
        assert admitted(first) == 1
        assert sum(count > 0 for count in connections_by_process(serving)) == WORKERS
        assert admitted(serving.connect(access=access[1])) == 1
        os.kill(serving.about["workers"][1], signal.SIGKILL)
        until(lambda: replacements(serving))
        serving.about["workers"][1] = replacements(serving)[0]
        until(lambda: connections_by_process(serving, psutil.CONN_LISTEN)[1])
        again = serving.connect(access=access[0])
        assert admitted(again) == 0
        assert connections_by_process(serving)[1] > 0
    finally:
        serving.stop()


def test_every_process_counts_what_other_sidecars_of_one_valkey_record_and_the_own_once(
    toy_repository, triton, start_sidecar, start_redis, tmp_path
):
    """Seen through the ranking without the model: Triton is gone by then."""
    store, toy = start_redis().url, toy_repository.publish(NUMBER)
    other = start_sidecar(
        toy_repository, "", models="in-process", store=store, state_dir=tmp_path / "other"
    )
    serving = Serving(
        toy_repository.root,
        tmp_path,
        *("--models=triton", f"--triton-url={triton.grpc_url}", f"--store={store}"),
    )
    live_us = toy.watermark_us + 1_000_000
    try:
        clients = serving.connect()
        other.client.record([Interaction(f"u{n}", "item-7", live_us) for n in range(3)])
        clients[0].record([Interaction(f"v{n}", "item-8", live_us) for n in range(2)])
        # The stream keeps its order, so who has this has all that came before.
        other.client.record([Interaction("w", "item-9", live_us)])
        triton.stop()

        def ranked(client):
            found = client.recommend("nobody", k=3, timestamp_us=live_us + 120_000_000)
            assert found.fallback
            return ids(found)

        for client in clients:
            until(lambda client=client: ranked(client) == ["item-7", "item-8", "item-9"])
        assert sum(count > 0 for count in connections_by_process(serving)) == WORKERS
    finally:
        serving.stop()


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


def test_damaged_records_and_pages_are_made_again_whichever_process_meets_them(toys, tmp_path):
    serving = Serving(toys.root, tmp_path)
    try:
        clients = serving.connect()
        start = toys.toys[NUMBER].watermark_us + 1_000_000
        users = [f"u{n}" for n in range(CONNECTIONS)]
        clients[0].record(
            [Interaction(user, f"item-{n}", start + n) for user in users for n in range(3)]
        )

        def ranked():
            return [
                ids(client.recommend(user, k=5, timestamp_us=start + 3))
                for client, user in zip(clients, users, strict=True)
            ]

        before = ranked()
        records = str(serving.state_dir / "store" / "records")
        with (
            lmdb.open(records, map_size=1 << 30) as environment,
            environment.begin(write=True) as transaction,
        ):
            for user in users:
                stored = transaction.get(user_key(user))
                transaction.put(user_key(user), stored[:-1] + bytes([stored[-1] ^ 1]))
        assert ranked() == before
        assert sum(count > 0 for count in connections_by_process(serving)) == WORKERS
        with urllib.request.urlopen(serving.about["metrics"], timeout=WAIT_S) as page:
            assert f"hiertcn_records_repaired_total {float(len(users))}" in page.read().decode()
        # All pages but those of metadata: the process that writes begins another file.
        file = serving.state_dir / "store" / "records" / "data.mdb"
        begun = file.stat().st_ino
        with file.open("r+b") as pages:
            pages.seek(8192)
            pages.write(bytes(file.stat().st_size - 8192))
        for _ in range(2):
            assert ranked() == before
        assert file.stat().st_ino != begun
        assert sum(count > 0 for count in connections_by_process(serving)) == WORKERS
        for client, user in zip(clients, users, strict=True):
            assert [one.timestamp_us - start for one in client.get_user(user).journal] == [0, 1, 2]
    finally:
        serving.stop()


def test_a_process_that_dies_is_replaced(serving):
    os.kill(serving.about["workers"][1], signal.SIGKILL)
    until(lambda: replacements(serving))


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
