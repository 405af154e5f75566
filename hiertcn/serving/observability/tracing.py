"""OpenTelemetry traces of requests and their stages, sent to a collector over OTLP's gRPC.

Off unless an endpoint is given; then a request costs a span if its caller's trace was sampled
(W3C ``traceparent`` in the metadata), or else at the sampling's share. Spans are sent in batches
by a thread of their own and dropped when the collector cannot keep up, so a request never waits
for it. They hold methods, stages, times and statuses, no user, item or token.

The ``OTEL_*`` environment variables that concern the exporter (headers, certificates) and the
resource are honoured.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc

from hiertcn import __version__
from hiertcn.errors import InputError
from hiertcn.serving.preflight import require
from hiertcn.serving.rpc.handlers import around
from hiertcn.serving.rpc.unknown_methods import UnknownMethod

_EXPORT_TIMEOUT_S: Final = 2
_UNTRACED: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.")


class Tracing:
    """Traces of one process, from construction to :meth:`stop`.

    Args:
        endpoint: ``http://host:port`` for plain text, ``https://host:port`` for TLS.
        sampling: share of the requests without a caller's trace that are traced, 0 to 1.

    Raises:
        InputError: the endpoint is no such address, or the extra ``tracing`` is not installed.
    """

    def __init__(self, endpoint: str, sampling: float) -> None:
        scheme, separator, address = endpoint.partition("://")
        if scheme not in ("http", "https") or not separator or not address.rpartition(":")[2]:
            raise InputError(
                f"otlp_endpoint is {endpoint!r}; expected http://host:port or https://host:port"
            )
        require("opentelemetry.exporter.otlp.proto.grpc", "tracing", "--otlp-endpoint")
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sampling)),
            resource=Resource.create({"service.name": "hiertcn", "service.version": __version__}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(
            endpoint=endpoint, insecure=scheme == "http", timeout=_EXPORT_TIMEOUT_S
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hiertcn.serving", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def interceptor(self) -> "TracingInterceptor":
        """The interceptor that begins and ends a span for each request."""
        return TracingInterceptor(self)

    @contextlib.asynccontextmanager
    async def served(self, method: str, context: Any) -> AsyncIterator[None]:
        """A server span around one call of ``/package.Service/Method``."""
        from opentelemetry import trace
        from opentelemetry.trace import SpanKind, Status, StatusCode

        carrier = {
            key: value for key, value in context.invocation_metadata() if isinstance(value, str)
        }
        service, _, name = method.lstrip("/").partition("/")
        with self._tracer.start_as_current_span(
            f"{service}/{name}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
            record_exception=False,
            set_status_on_exception=False,
        ):
            span = trace.get_current_span()
            try:
                yield
            except BaseException:
                code = context.code() or grpc.StatusCode.UNKNOWN
                number = code if isinstance(code, int) else code.value[0]
                span.set_attribute("rpc.grpc.status_code", number)
                span.set_status(Status(StatusCode.ERROR))
                raise
            span.set_attribute("rpc.grpc.status_code", grpc.StatusCode.OK.value[0])

    def request(self) -> Any:
        """The context of the request under way if it is traced, else None."""
        from opentelemetry import context, trace

        return context.get_current() if trace.get_current_span().is_recording() else None

    def stage_ended(self, stage: str, began_ns: int, ended_ns: int, request: Any) -> None:
        """Add a stage, in nanoseconds since the epoch, to a request's trace."""
        self._tracer.start_span(stage, context=request, start_time=began_ns).end(ended_ns)

    def stop(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.force_flush(_EXPORT_TIMEOUT_S * 1000)
        self._provider.shutdown()


class TracingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Puts a span around every call but those of health and reflection."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """The method's handler inside a span."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if isinstance(handler, UnknownMethod) or method.startswith(_UNTRACED):
            return handler
        return around(handler, lambda context: self._tracing.served(method, context))
