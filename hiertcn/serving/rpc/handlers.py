"""gRPC handlers with something around them, for interceptors."""

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import grpc

_KINDS: Final = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def around(
    handler: Any,
    manager: Callable[[Any], AbstractAsyncContextManager[None]],
    *,
    parses: bool = True,
    requests_through: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """The same ``grpc.RpcMethodHandler``, run inside ``manager(context)``.

    Args:
        handler: of a method of any kind.
        manager: an asynchronous context manager; what it raises or aborts ends the call.
        parses: whether the request is parsed; else the method gets its bytes.
        requests_through: ``(requests, context) -> requests``, for a stream of requests.
    """
    kind = _KINDS[handler.request_streaming, handler.response_streaming]
    inner = getattr(handler, kind)
    wrapped: Any
    if inspect.isasyncgenfunction(inner):

        async def generator(request: Any, context: Any) -> AsyncIterator[Any]:
            async with manager(context):
                if requests_through is not None:
                    request = requests_through(request, context)
                async for reply in inner(request, context):
                    yield reply

        wrapped = generator
    else:

        async def call(request: Any, context: Any) -> Any:
            async with manager(context):
                if requests_through is not None:
                    request = requests_through(request, context)
                return await inner(request, context)

        wrapped = call
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        wrapped,
        request_deserializer=handler.request_deserializer if parses else None,
        response_serializer=handler.response_serializer,
    )
