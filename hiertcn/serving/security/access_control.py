"""Who may call what: bearer tokens, scopes and rate limits, before a request is even parsed.

Every method needs one scope. The standard health service needs none, because probes carry no
tokens and it tells nothing but a state; reflection needs ``read``. A method that is not listed
here needs ``admin``. The web page's doors ask the same :class:`AccessControl`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

import grpc

from hiertcn.errors import HiertcnError
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.options import SidecarOptions
from hiertcn.serving.rpc.handlers import around
from hiertcn.serving.rpc.status import status_of
from hiertcn.serving.rpc.unknown_methods import UnknownMethod
from hiertcn.serving.security.rate_limit import Caller, RateLimiter
from hiertcn.serving.security.shared_rate_limit import SharedRateLimiter
from hiertcn.serving.security.tls import ServerTls
from hiertcn.serving.security.tokens import Scope, TokenFile

METHOD_SCOPES: Final = {
    "/hiertcn.v1.Recommender/Recommend": Scope.READ,
    "/hiertcn.v1.Recommender/GetUser": Scope.READ,
    "/hiertcn.v1.Recommender/RecordInteractions": Scope.WRITE,
    "/hiertcn.v1.Recommender/StreamInteractions": Scope.WRITE,
    "/hiertcn.v1.Recommender/UpsertItems": Scope.WRITE,
    "/hiertcn.v1.Recommender/DeleteUser": Scope.ADMIN,
    "/hiertcn.v1.Releases/ListReleases": Scope.READ,
    "/hiertcn.v1.Releases/ActivateRelease": Scope.ADMIN,
    "/hiertcn.v1.Releases/RollBackRelease": Scope.ADMIN,
}
"""The scope that each method needs."""

_OPEN: Final = "/grpc.health.v1.Health/"
_REFLECTION: Final = "/grpc.reflection."


def server_tls(options: SidecarOptions) -> ServerTls | None:
    """The TLS files that the options name, None for plain text."""
    if options.tls_cert is None or options.tls_key is None:
        return None
    return ServerTls(
        certificate=options.tls_cert,
        key=options.tls_key,
        client_authority=options.tls_client_ca,
    )


class AccessControl:
    """Decides on a request by its token and its caller's rate; made once a process.

    Args:
        options: the sidecar's.
        rate_table: the callers' buckets, where they are shared with other processes
            (``shared_rate_limit.py``).

    Raises:
        InputError: the token file cannot be used.
    """

    def __init__(self, options: SidecarOptions, rate_table: Path | None = None) -> None:
        self._limiter: RateLimiter | None = None
        key = None
        if options.rate_limit and rate_table is not None:
            self._limiter = shared = SharedRateLimiter(options.rate_limit, rate_table)
            key = shared.key
        elif options.rate_limit:
            self._limiter = RateLimiter(options.rate_limit)
        self._tokens = TokenFile(options.token_file, key=key) if options.token_file else None

    @property
    def needs_token(self) -> bool:
        """Whether callers must show a token."""
        return self._tokens is not None

    @property
    def limits_rate(self) -> bool:
        """Whether callers have a rate."""
        return self._limiter is not None

    def identify(self, authorization: str | None, scope: Scope) -> bytes | None:
        """The caller that the token names, None where none is needed.

        Raises:
            UnauthenticatedError: the token is missing or unknown.
            PermissionDeniedError: it lacks ``scope``.
        """
        if self._tokens is None:
            return None
        return self._tokens.caller(authorization, scope).key

    def admit(self, caller: Caller) -> None:
        """Count a request of the caller.

        Raises:
            OverloadError: the caller has used up its rate.
        """
        if self._limiter is not None:
            self._limiter.admit(caller)

    async def pace(self, caller: Caller) -> None:
        """Count a message of the caller's stream, once its rate allows it.

        A stream that is not read makes its sender wait, so it is slowed and not refused.
        """
        if self._limiter is not None:
            while wait_s := self._limiter.wait_s(caller):
                await asyncio.sleep(wait_s)


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses what :class:`AccessControl` refuses; the caller is its token, else its certificate's
    name, else its address. Needless, and so not to be installed, where nothing is asked for.
    """

    def __init__(self, access: AccessControl, metrics: Metrics) -> None:
        self._access = access
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """The method's handler, or one that refuses."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if isinstance(handler, UnknownMethod) or method.startswith(_OPEN):
            return handler
        try:
            caller = self._access.identify(
                _authorization(handler_call_details.invocation_metadata), scope_of(method)
            )
        except HiertcnError as error:
            self._count(method, error)
            return around(handler, _refusing(error), parses=False)
        if not self._access.limits_rate:
            return handler
        if handler.request_streaming:

            async def paced(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
                async for request in requests:
                    await self._access.pace(caller or _peer(context))
                    yield request

            return around(handler, _nothing, requests_through=paced)

        @contextlib.asynccontextmanager
        async def admit(context: Any) -> AsyncIterator[None]:
            try:
                self._access.admit(caller or _peer(context))
            except HiertcnError as error:
                self._count(method, error)
                await context.abort(status_of(error), str(error))
            yield

        return around(handler, admit)

    def _count(self, method: str, error: HiertcnError) -> None:
        self._metrics.requests.labels(method.rpartition("/")[2], status_of(error).name).inc()


def scope_of(method: str) -> Scope:
    """The scope that the method ``/package.Service/Method`` needs."""
    if method.startswith(_REFLECTION):
        return Scope.READ
    return METHOD_SCOPES.get(method, Scope.ADMIN)


@contextlib.asynccontextmanager
async def _nothing(context: Any) -> AsyncIterator[None]:
    yield


def _refusing(error: HiertcnError) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def refuse(context: Any) -> AsyncIterator[None]:
        await context.abort(status_of(error), str(error))
        yield

    return refuse


def _authorization(metadata: Any) -> str | None:
    for key, value in metadata or ():
        if key == "authorization":
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None


def _peer(context: Any) -> str:
    names = context.auth_context().get("x509_common_name")
    if names:
        return str(names[0])
    # "ipv4:127.0.0.1:40312": every connection of a host counts for the host.
    return str(context.peer().rpartition(":")[0])
