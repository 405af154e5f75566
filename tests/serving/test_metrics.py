"""The metrics and probes over real HTTP, and the dashboard that is drawn from them."""

import asyncio
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from hiertcn.serving.client import Interaction
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.observability.metrics_server import Probes
from hiertcn.serving.observability.stages import STAGES, Stages
from tests.waiting import WAIT_S

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "hiertcn.json"
T0 = 1_767_225_600_000_000 + 3_600_000_000
GAP_US = 1_800_000_000


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT_S) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def expressions() -> Iterator[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["expr"]


def samples_and_labels() -> dict[str, set[str]]:
    """Each sample's name as Prometheus stores it, and its labels."""
    found: dict[str, set[str]] = {}
    metrics = Metrics()
    for value in vars(metrics).values():
        labels = set(getattr(value, "_labelnames", ()))
        for family in value.collect() if hasattr(value, "collect") else ():
            if not family.name.startswith("hiertcn_"):
                continue
            if isinstance(value, Stages):
                labels = {"stage"}
            suffixes = {
                "counter": {"_total": set()},
                "gauge": {"": set()},
                "histogram": {"_bucket": {"le"}, "_sum": set(), "_count": set()},
            }[family.type]
            for suffix, more in suffixes.items():
                found[family.name + suffix] = labels | more
    return found


def test_the_dashboard_asks_only_for_metrics_and_labels_that_exist():
    known = samples_and_labels()
    for expression in expressions():
        names = set(re.findall(r"\bhiertcn_\w+", expression))
        assert names, expression
        for name in names:
            assert name in known, f"{name} in {expression}"
        labels = {
            label.strip()
            for group in re.findall(r"by \(([^)]*)\)", expression)
            for label in group.split(",")
        } | set(re.findall(r"(\w+)\s*=~?\"", expression))
        for name in names:
            assert labels - known[name] <= {"instance", "le"}, expression


def test_panels_of_the_dashboard_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    ids = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        assert panel["id"] not in ids
        taken |= cells
        ids.add(panel["id"])


def test_a_request_leaves_its_times_its_states_age_and_no_one_waiting(
    shared_toy, shared_triton, start_sidecar
):
    running = start_sidecar(shared_toy, shared_triton.grpc_url, metrics_port=0)
    running.client.record([Interaction("ada", "item-3", T0)])
    running.client.recommend("ada", timestamp_us=T0 + 2 * GAP_US)
    text = get(running.sidecar.metrics_port, "/metrics")[1]
    for stage in ("wait", "read", "fold", "model", "rank", "commit"):
        assert f'hiertcn_stage_seconds_count{{stage="{stage}"}} 1.0' in text, stage
    assert 'hiertcn_state_age_seconds_bucket{le="3600.0"} 1.0' in text
    assert 'hiertcn_state_age_seconds_bucket{le="600.0"} 0.0' in text
    for queue in ("recommend", "gru_step", "commit"):
        assert f'hiertcn_queue_depth{{queue="{queue}"}} 0.0' in text
    toy = shared_toy.toys[2026010101]
    assert running.value("hiertcn_release_watermark_timestamp_seconds") == toy.watermark_us / 1e6


def test_readiness_is_the_active_release_and_liveness_the_event_loop(
    shared_toy, shared_triton, start_sidecar
):
    running = start_sidecar(shared_toy, shared_triton.grpc_url, metrics_port=0)
    port = running.sidecar.metrics_port
    assert get(port, "/readyz") == (200, "yes\n")
    assert get(port, "/healthz") == (200, "yes\n")
    released = threading.Event()

    async def block() -> None:
        released.wait(60)

    blocking = asyncio.run_coroutine_threadsafe(block(), running._loop)
    try:
        assert get(port, "/healthz") == (503, "no\n")
    finally:
        released.set()
    blocking.result(30)
    assert get(port, "/healthz") == (200, "yes\n")


def test_a_sidecar_is_not_ready_before_its_release_is():
    metrics = Metrics()
    server = metrics.serve("127.0.0.1", 0, Probes())
    try:
        assert get(server.port, "/readyz") == (503, "no\n")
        assert get(server.port, "/metrics")[0] == 200
    finally:
        server.stop()


@given(
    observed=st.lists(st.tuples(st.sampled_from(STAGES), st.floats(0, 10)), max_size=50),
    bounds=st.lists(st.floats(0.001, 5), min_size=1, max_size=5, unique=True).map(sorted),
)
def test_stages_count_as_prometheus_clients_own_histogram(observed, bounds):
    stages = Stages(bounds)
    reference = Histogram(
        "hiertcn_stage_seconds", "-", ["stage"], buckets=bounds, registry=CollectorRegistry()
    )
    for stage in STAGES:
        reference.labels(stage)
    for stage, seconds in observed:
        stages.add(stage, seconds)
        reference.labels(stage).observe(seconds)

    def samples(collector: Any) -> dict[tuple[str, ...], float]:
        return {
            (sample.name, sample.labels["stage"], sample.labels.get("le", "")): sample.value
            for family in collector.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    assert samples(stages) == pytest.approx(samples(reference))
