"""Answers calls of methods that the sidecar has not, which gRPC only says were not found."""

from collections.abc import Collection
from typing import Any

import grpc


class UnknownMethod(grpc.RpcMethodHandler):  # type: ignore[misc]
    """Refuses a call with ``UNIMPLEMENTED``, however many messages it sends."""

    request_streaming = response_streaming = True
    request_deserializer = response_serializer = None
    unary_unary = unary_stream = stream_unary = None

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence

    async def stream_stream(self, requests: Any, context: Any) -> None:
        """Abort the call."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, self._sentence)


class UnknownMethods(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handles whatever method is left; to be added to a server last.

    Args:
        services: full names of the services that the sidecar has.
    """

    def __init__(self, services: Collection[str]) -> None:
        self._services = services

    def service(self, handler_call_details: Any) -> UnknownMethod:
        """The handler of a method that nobody else handles."""
        return UnknownMethod(
            f"the method {handler_call_details.method!r} is unknown; expected /SERVICE/METHOD of "
            f"{', '.join(self._services)}, as recommender.proto names them"
        )
