"""Nothing acknowledged is lost and nothing is applied twice; `test_faults_soak.py` kills."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hiertcn.events.ingest import ingest
from hiertcn.events.options import IngestOptions
from hiertcn.serving.client import Interaction, RecommenderClient
from tests.waiting import PATIENT_SERVE, patient_client

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
T0 = 1_767_225_600_000_000 + HOUR_US


class ServingProcess:
    """``hiertcn serve`` in a process of its own, on a Triton that already runs."""

    def __init__(self, repository: Path, triton_url: str, state_dir: Path) -> None:
        command = [sys.executable, "-m", "hiertcn.cli", "serve", "--repository", str(repository)]
        command += ["--triton-url", triton_url, "--state-dir", str(state_dir)]
        command += ["--port", "0", "--metrics-port", "-1", PATIENT_SERVE]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.serving_file = state_dir / "serving.json"
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "ready;" in line:
                break
        else:
            raise AssertionError(f"serve ended with {self.process.wait()}")
        self.address = json.loads(self.serving_file.read_text())["address"]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        self.process.communicate()
        return self.process.returncode


@pytest.fixture
def serve(shared_toy, shared_triton, tmp_path):
    started: list[ServingProcess] = []

    def start() -> ServingProcess:
        started.append(ServingProcess(shared_toy.root, shared_triton.grpc_url, tmp_path / "state"))
        return started[-1]

    yield start
    for serving in started:
        if serving.process.poll() is None:
            serving.end(signal.SIGKILL)


def journal_of(client: RecommenderClient, user_id: str) -> list[tuple[str, int]]:
    user = client.get_user(user_id)
    return [(entry.item_id, entry.timestamp_us) for entry in user.journal] if user else []


def test_sigterm_drains_exports_and_leaves_nothing(serve, tmp_path):
    serving = serve()
    with patient_client(serving.address) as client:
        client.record([Interaction("ada", "item-1", T0), Interaction("ada", "novelty", T0 + 1)])
    assert serving.end(signal.SIGTERM) == 0
    assert not serving.serving_file.exists()
    files = list((tmp_path / "state" / "events").rglob("*.parquet"))
    assert [str(path.relative_to(tmp_path / "state")) for path in files] == [
        "events/date=2026-01-01/part-1.parquet"
    ]
    assert [row["item_id"] for row in pq.ParquetFile(files[0]).read().to_pylist()] == [
        "item-1",
        "novelty",
    ]


def test_what_was_recorded_is_tomorrows_training_data(
    shared_toy, shared_triton, start_sidecar, tmp_path
):
    running = start_sidecar(shared_toy, shared_triton.grpc_url)
    interactions = [
        Interaction(f"u{n % 4}", f"item-{n % 3}", T0 + n * SECOND_US, event_type="click")
        for n in range(24)
    ]
    running.client.record(interactions)
    running.stop()
    summary = ingest(
        str(tmp_path / "state" / "events"),
        tmp_path / "ingested",
        options=IngestOptions(min_user_interactions=1, min_item_interactions=1),
    )
    assert (summary.events, summary.users, summary.items) == (24, 4, 3)


def test_a_restart_answers_as_before(shared_toy, shared_triton, start_sidecar):
    first = start_sidecar(shared_toy, shared_triton.grpc_url)
    first.client.record([Interaction("ada", "item-1", T0), Interaction("ada", "item-2", T0 + 1)])
    first.client.record([Interaction("ada", "item-3", T0 + HOUR_US)])
    before = first.client.recommend("ada", timestamp_us=T0 + HOUR_US)
    first.stop()
    second = start_sidecar(shared_toy, shared_triton.grpc_url)
    after = second.client.recommend("ada", timestamp_us=T0 + HOUR_US)
    assert [item.item_id for item in after.items] == [item.item_id for item in before.items]
    assert second.value("hiertcn_sessions_folded_total") == 0


@pytest.mark.parametrize("lost", ["whole store", "boot"])
def test_a_lost_store_is_rebuilt_from_the_log(
    shared_toy, shared_triton, start_sidecar, tmp_path, lost
):
    first = start_sidecar(shared_toy, shared_triton.grpc_url)
    first.client.record([Interaction("ada", f"item-{n}", T0 + n) for n in range(5)])
    first.client.record([Interaction("bob", "item-1", T0)])
    first.client.delete_user("bob")
    before = first.client.recommend("ada", timestamp_us=T0 + HOUR_US)
    first.stop()
    store = tmp_path / "state" / "store"
    if lost == "whole store":
        shutil.rmtree(store)
    else:
        marker = json.loads((store / "state.json").read_text())
        marker.update(boot_id="another", clean=False)
        (store / "state.json").write_text(json.dumps(marker))
    second = start_sidecar(shared_toy, shared_triton.grpc_url)
    assert len(journal_of(second.client, "ada")) == 5
    assert second.client.get_user("bob") is None
    after = second.client.recommend("ada", timestamp_us=T0 + HOUR_US)
    assert [item.item_id for item in after.items] == [item.item_id for item in before.items]


def test_a_torn_tail_costs_nothing_acknowledged(shared_toy, shared_triton, start_sidecar, tmp_path):
    first = start_sidecar(shared_toy, shared_triton.grpc_url)
    first.client.record([Interaction("ada", "item-1", T0)])
    first.stop()
    log = tmp_path / "state" / "log"
    last = max(log.glob("*.log"))
    with last.open("ab") as file:
        file.write(b"\x40\x00\x00\x00torn")
    second = start_sidecar(shared_toy, shared_triton.grpc_url)
    second.client.record([Interaction("ada", "item-2", T0 + 1)])
    assert [item for item, _ in journal_of(second.client, "ada")] == ["item-1", "item-2"]
    assert last.with_suffix(".torn").read_bytes() == b"\x40\x00\x00\x00torn"
