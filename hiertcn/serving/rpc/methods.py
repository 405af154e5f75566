"""How a method becomes a gRPC handler: parse, admit, time, count, and word the error.

Which status an error is answered with says ``status.py``.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from hiertcn.errors import DeadlineError, HiertcnError, InputError, ServingError
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.rpc.admission import Admission, MethodBound
from hiertcn.serving.rpc.malformed import malformed
from hiertcn.serving.rpc.status import status_of


def service_handler(
    service: str,
    methods: object,
    metrics: Metrics,
    admission: Admission | None = None,
) -> Any:
    """The generic gRPC handler of a service, see :func:`method_handlers`."""
    return grpc.method_handlers_generic_handler(
        service, method_handlers(service, methods, metrics, admission)
    )


def method_handlers(
    service: str,
    methods: object,
    metrics: Metrics,
    admission: Admission | None = None,
    *,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """A handler for every method of a service's descriptor, by name.

    Args:
        service: full name of the service.
        methods: has an ``async`` method ``(request, context) -> reply`` of each unary method's
            name, and of a streaming one's ``(requests, context) -> replies``, an async generator.
            ``PARSERS``, where it has them, parse the requests of the unary methods they are named
            after; they return the error for what is no such message (``malformed.py``).
        metrics: where requests are counted.
        admission: bounds the requests in flight; None for a service that is never refused.
        only: the methods wanted; None for all.
    """
    descriptor = pb.DESCRIPTOR.services_by_name[service.rpartition(".")[2]]
    handlers = {}
    for method in descriptor.methods:
        if only is not None and method.name not in only:
            continue
        make = _streaming if method.client_streaming else _unary
        handlers[method.name] = make(
            method.name,
            getattr(methods, method.name),
            getattr(pb, method.input_type.name),
            getattr(pb, method.output_type.name),
            metrics,
            admission.of(method.name) if admission is not None else None,
            getattr(methods, "PARSERS", {}).get(method.name),
        )
    return handlers


def _unary(
    name: str,
    method: Callable[[Any, Any], Awaitable[Message]],
    request_type: type[Message],
    response_type: type[Message],
    metrics: Metrics,
    bound: MethodBound | None,
    parser: Callable[[bytes], Any] | None,
) -> Any:
    seconds = metrics.request_seconds.labels(name)
    answered = metrics.requests.labels(name, "OK")

    async def handle(request: Any, context: Any) -> Message:
        began = time.perf_counter()
        try:
            left_s = context.time_remaining()
            if left_s is not None and left_s <= 0:
                raise DeadlineError("the call's deadline had passed before it was begun")
            with bound.admitted() if bound is not None else contextlib.nullcontext():
                reply = await method(_checked(request), context)
        except (InputError, ServingError) as error:
            await _abort(error, name, context, metrics)
            raise
        answered.inc()
        seconds.observe(time.perf_counter() - began)
        return reply

    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=parser or _parser(request_type),
        response_serializer=response_type.SerializeToString,
    )


def _streaming(
    name: str,
    method: Callable[[AsyncIterator[Any], Any], AsyncIterator[Message]],
    request_type: type[Message],
    response_type: type[Message],
    metrics: Metrics,
    bound: MethodBound | None,
    parser: Callable[[bytes], Any] | None,
) -> Any:
    answered = metrics.requests.labels(name, "OK")

    async def checked(requests: AsyncIterator[Message | InputError]) -> AsyncIterator[Message]:
        async for request in requests:
            yield _checked(request)

    async def handle(
        requests: AsyncIterator[Message | InputError], context: Any
    ) -> AsyncIterator[Message]:
        try:
            with bound.admitted() if bound is not None else contextlib.nullcontext():
                async for reply in method(checked(requests), context):
                    yield reply
                    answered.inc()
        except (InputError, ServingError) as error:
            await _abort(error, name, context, metrics)
            raise

    return grpc.stream_stream_rpc_method_handler(
        handle,
        request_deserializer=parser or _parser(request_type),
        response_serializer=response_type.SerializeToString,
    )


def _parser(request_type: type[Message]) -> Callable[[bytes], Message | InputError]:
    def parse(data: bytes) -> Message | InputError:
        # gRPC answers an exception here with INTERNAL, but the fault is the caller's.
        try:
            return request_type.FromString(data)
        except DecodeError:
            return malformed(data, request_type.DESCRIPTOR)

    return parse


def _checked(request: Any) -> Any:
    if isinstance(request, InputError):
        raise request
    return request


async def _abort(error: HiertcnError, method: str, context: Any, metrics: Metrics) -> None:
    code = status_of(error)
    metrics.requests.labels(method, code.name).inc()
    await context.abort(code, str(error))
