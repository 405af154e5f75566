"""Traces as a collector gets them: a real OTLP gRPC receiver beside the sidecar."""

import concurrent.futures
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from hiertcn.errors import InputError
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving import recommender_pb2_grpc as pb_grpc
from hiertcn.serving.client import Interaction

T0 = 1_767_225_600_000_000 + 3_600_000_000
GAP_US = 1_800_000_000
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"


@pytest.fixture(scope="module", autouse=True)
def _opentelemetry(required_module):
    required_module("opentelemetry")
    required_module("opentelemetry.exporter.otlp.proto.grpc")


class Collector:
    """What has arrived."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._spans: list[Any] = []
        self.resource: dict[str, str] = {}

    def Export(self, request: Any, context: Any) -> Any:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        with self._arrived:
            for of_resource in request.resource_spans:
                for attribute in of_resource.resource.attributes:
                    self.resource[attribute.key] = attribute.value.string_value
                for of_scope in of_resource.scope_spans:
                    self._spans.extend(of_scope.spans)
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, name: str | None = None) -> list[Any]:
        with self._arrived:
            return [span for span in self._spans if name in (None, span.name)]


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    found = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(found, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield found, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def recommend(running, **request: Any) -> None:
    with grpc.insecure_channel(running.sidecar.address) as channel:
        pb_grpc.RecommenderStub(channel).Recommend(
            pb.RecommendRequest(timestamp_us=T0 + 2 * GAP_US, **request),
            timeout=30,
            metadata=[("traceparent", f"00-{TRACE_ID}-{CALLER}-01")],
        )


def attributes(span: Any) -> dict[str, Any]:
    return {
        attribute.key: attribute.value.string_value or attribute.value.int_value
        for attribute in span.attributes
    }


def test_a_request_is_a_span_of_its_callers_trace_with_its_stages_inside(
    shared_toy, shared_triton, start_sidecar, collector
):
    received, endpoint = collector
    running = start_sidecar(
        shared_toy, shared_triton.grpc_url, otlp_endpoint=endpoint, trace_sampling=0.0
    )
    running.client.record([Interaction("ada-lovelace", "item-3", T0)])
    recommend(running, user_id="ada-lovelace")
    with pytest.raises(grpc.RpcError):
        recommend(running, user_id="ada-lovelace", k=0)
    running.stop()

    requests = received.spans("hiertcn.v1.Recommender/Recommend")
    assert len(requests) == 2, "the interaction, whose caller traces nothing, is sampled away"
    good, bad = sorted(requests, key=lambda span: span.start_time_unix_nano)
    for span in requests:
        assert span.trace_id.hex() == TRACE_ID
        assert span.parent_span_id.hex() == CALLER
    assert attributes(good) == {
        "rpc.system": "grpc",
        "rpc.service": "hiertcn.v1.Recommender",
        "rpc.method": "Recommend",
        "rpc.grpc.status_code": 0,
    }
    assert attributes(bad)["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    stages = [span for span in received.spans() if span.parent_span_id == good.span_id]
    assert {span.name for span in stages} == {"wait", "read", "fold", "model", "rank"}
    for span in stages:
        assert good.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= good.end_time_unix_nano + 1_000_000
    assert received.resource["service.name"] == "hiertcn"
    assert "ada-lovelace" not in str(received.spans())


def test_sampling_is_the_share_of_requests_without_a_callers_trace(
    shared_toy, shared_triton, start_sidecar, collector
):
    received, endpoint = collector
    running = start_sidecar(
        shared_toy, shared_triton.grpc_url, otlp_endpoint=endpoint, trace_sampling=1.0
    )
    for _ in range(5):
        running.client.recommend("ada", timestamp_us=T0)
    running.stop()
    found = received.spans("hiertcn.v1.Recommender/Recommend")
    assert len({span.trace_id for span in found}) == len(found) == 5


def test_a_collector_that_is_gone_delays_nothing_and_stopping_little(
    shared_toy, shared_triton, start_sidecar
):
    running = start_sidecar(
        shared_toy,
        shared_triton.grpc_url,
        otlp_endpoint="http://127.0.0.1:1",
        trace_sampling=1.0,
    )
    assert running.client.recommend("ada", timestamp_us=T0).items
    began = time.monotonic()
    running.stop()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("endpoint", ["collector:4317", "ftp://collector:4317", "http://"])
def test_an_endpoint_that_is_none_is_refused(shared_toy, shared_triton, start_sidecar, endpoint):
    with pytest.raises(InputError, match="expected http://host:port"):
        start_sidecar(shared_toy, shared_triton.grpc_url, otlp_endpoint=endpoint)
