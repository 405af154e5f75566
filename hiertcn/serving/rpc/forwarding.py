"""Passes calls on to another process of the same sidecar, byte for byte.

Replies, streams and errors come back as they are; a call's remaining time goes with it. Whoever
calls has been let in by then, so nothing of the caller's credentials does.
"""

from collections.abc import AsyncIterator, Collection
from typing import Any

import grpc

from hiertcn.serving import recommender_pb2 as pb


def forwarding_handlers(service: str, channel: Any, *, but: Collection[str] = ()) -> dict[str, Any]:
    """A handler for each method of a service, by name, that asks the other end of a channel.

    Args:
        service: full name of the service.
        channel: a ``grpc.aio`` channel.
        but: methods that are not passed on.
    """
    descriptor = pb.DESCRIPTOR.services_by_name[service.rpartition(".")[2]]
    return {
        method.name: (_stream if method.client_streaming else _unary)(
            channel, f"/{service}/{method.name}"
        )
        for method in descriptor.methods
        if method.name not in but
    }


def _unary(channel: Any, path: str) -> Any:
    ask = channel.unary_unary(path)

    async def handle(request: bytes, context: Any) -> bytes:
        try:
            reply: bytes = await ask(request, timeout=context.time_remaining())
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details())
            raise
        return reply

    return grpc.unary_unary_rpc_method_handler(handle)


def _stream(channel: Any, path: str) -> Any:
    ask = channel.stream_stream(path)

    async def handle(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            async for reply in ask(requests, timeout=context.time_remaining()):
                yield reply
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details())

    return grpc.stream_stream_rpc_method_handler(handle)
