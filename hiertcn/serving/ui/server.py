"""The web page and the JSON it asks for, on the sidecar's own event loop.

Everything the page needs is in this folder; it loads nothing from elsewhere, and its policy
(CSP) lets it load nothing. Its doors check what gRPC's check: the same field rules, tokens with
scopes, rates, bound of requests in flight and TLS. Another site's page cannot use them: there
are no CORS headers, what changes anything takes JSON only (which a browser does not send across
sites unasked), and a page on loopback answers only to loopback's names, so no foreign name can be
bound to it.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from hiertcn.errors import (
    HiertcnError,
    InputError,
    OverloadError,
    PermissionDeniedError,
    ServingError,
    UnauthenticatedError,
)
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.options import SidecarOptions
from hiertcn.serving.ranking.engine import Engine
from hiertcn.serving.rpc import validation as check
from hiertcn.serving.rpc.admission import Admission
from hiertcn.serving.rpc.status import status_of
from hiertcn.serving.security.access_control import AccessControl, server_tls
from hiertcn.serving.security.tokens import Scope
from hiertcn.serving.ui.comparison import suggested_users, user_view
from hiertcn.serving.ui.figures import live_figures

_log = logging.getLogger(__name__)

MOST_LISTED: Final = 100

_FOLDER: Final = Path(__file__).parent
_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_MAX_BODY_BYTES: Final = 64 << 10
_LOOPBACK: Final = {"127.0.0.1", "localhost", "[::1]", "::1"}
_HTTP_STATUS: Final[tuple[tuple[type[HiertcnError], int], ...]] = (
    (UnauthenticatedError, 401),
    (PermissionDeniedError, 403),
    (InputError, 400),
    (OverloadError, 429),
    (ServingError, 503),
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebPage:
    """The page's server; start it on a running event loop.

    Args:
        options: of the sidecar.
        engine: answers.
        metrics: where requests are counted, and what the live figures are of.
        access: checks tokens and rates.
        admission: bounds the requests in flight.
        metrics_ports: gives the metrics ports of the sidecar's further processes.

    Attributes:
        port: the port bound, once started.
    """

    def __init__(
        self,
        options: SidecarOptions,
        engine: Engine,
        metrics: Metrics,
        access: AccessControl,
        admission: Admission,
        metrics_ports: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self._options = options
        self._engine = engine
        self._metrics = metrics
        self._access = access
        self._admission = admission
        self._metrics_ports = metrics_ports
        self._began = time.monotonic()
        self._suggested: tuple[int, list[str]] | None = None
        self._runner: web.AppRunner | None = None
        self._files = {path: (_FOLDER / name).read_bytes() for path, (name, _) in _FILES.items()}
        self.port = options.ui_port or 0

    async def start(self) -> None:
        """Bind the port and answer.

        Raises:
            InputError: the port is in use.
        """
        application = web.Application(middlewares=[self._guard], client_max_size=_MAX_BODY_BYTES)
        for path in _FILES:
            application.router.add_get(path, self._file)
        application.router.add_get("/api/status", self._status)
        application.router.add_get("/api/users", self._users)
        application.router.add_get("/api/user", self._user)
        application.router.add_post("/api/interactions", self._record)
        # No access log: addresses of requests hold user ids.
        self._runner = web.AppRunner(
            application,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=self._options.drain_s,
        )
        await self._runner.setup()
        tls = server_tls(self._options)
        site = web.TCPSite(
            self._runner,
            self._options.host,
            self._options.ui_port,
            ssl_context=tls.ssl_context() if tls is not None else None,
        )
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise InputError(
                f"--ui-port {self._options.ui_port} on {self._options.host} cannot be bound "
                f"({error.strerror}); stop what holds it or give another"
            ) from None
        self.port = self._runner.addresses[0][1]
        _log.info("the web page is at %s", self.url)

    @property
    def url(self) -> str:
        """Where a browser finds the page."""
        scheme = "http" if self._options.tls_cert is None else "https"
        return f"{scheme}://{self._options.host}:{self.port}/"

    async def stop(self) -> None:
        """Let requests in flight finish and close the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware  # type: ignore[untyped-decorator]
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check_site(request)
            if request.path.startswith("/api/"):
                scope = Scope.WRITE if request.method == "POST" else Scope.READ
                caller = self._access.identify(request.headers.get("Authorization"), scope)
                self._access.admit(caller or request.remote)
            response = await handler(request)
        except HiertcnError as error:
            status = next((code for kind, code in _HTTP_STATUS if isinstance(error, kind)), 500)
            response = _sentence(str(error), status)
        except web.HTTPException as error:
            response = _sentence(_HTTP_SENTENCES.get(error.status, error.reason), error.status)
        except Exception:
            _log.exception("the web page's %s failed", request.path)
            response = _sentence("the sidecar failed; its log says why", 500)
        response.headers.update(_HEADERS)
        return response

    def _check_site(self, request: web.Request) -> None:
        host = request.headers.get("Host", "")
        if self._options.host in _LOOPBACK and _without_port(host) not in _LOOPBACK:
            raise PermissionDeniedError(
                "Host is another name than localhost; expected a page on loopback to be asked for "
                "by localhost or 127.0.0.1"
            )
        origin = request.headers.get("Origin")
        if origin is not None and origin.rpartition("://")[2] != host:
            raise PermissionDeniedError("Origin is another site; expected the page's own")
        if request.method == "POST" and request.content_type != "application/json":
            raise InputError(
                f"Content-Type is {request.content_type!r}; expected 'application/json'"
            )

    async def _file(self, request: web.Request) -> web.StreamResponse:
        _, kind = _FILES[request.path]
        return web.Response(body=self._files[request.path], content_type=kind, charset="utf-8")

    async def _status(self, request: web.Request) -> web.StreamResponse:
        release = self._engine.release
        ports: Sequence[int] = ()
        # While a process starts again, its port is not known.
        with contextlib.suppress(HiertcnError, OSError):
            ports = self._metrics_ports()
        return web.json_response(
            {
                "release": release.number,
                "watermark_us": release.watermark_us,
                "items": len(release.items),
                "users": len(release.snapshot.users),
                "uptime_s": time.monotonic() - self._began,
                **await live_figures(self._metrics, self._options.host, ports),
            }
        )

    async def _users(self, request: web.Request) -> web.StreamResponse:
        release = self._engine.release
        if self._suggested is None or self._suggested[0] != release.number:
            self._suggested = (
                release.number,
                await asyncio.to_thread(suggested_users, release),
            )
        return web.json_response({"users": self._suggested[1]})

    async def _user(self, request: web.Request) -> web.StreamResponse:
        user_id = check.checked_user_id(request.query.get("id", ""), "id")
        k = _whole(request.query.get("k", "20"), "k")
        with self._answering("Recommend"):
            found = await user_view(
                self._engine,
                user_id,
                k=k,
                now_us=check.wall_clock_us(),
                exclude_seen=request.query.get("seen") == "hide",
            )
        return web.json_response(found)

    async def _record(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.text())
        except (ValueError, LookupError):
            raise InputError("the body is not JSON in UTF-8; expected an object") from None
        if not isinstance(body, dict):
            raise InputError(f"the body is a JSON {type(body).__name__}; expected an object")
        interaction = pb.Interaction(
            user_id=_text(body, "user_id"),
            item_id=_text(body, "item_id"),
            event_type=_text(body, "event_type"),
        )
        interactions = check.checked_interactions([interaction])
        with self._answering("RecordInteractions"):
            recorded = await self._engine.record(interactions)
        return web.json_response(
            {
                "accepted": recorded.accepted,
                "duplicates": recorded.duplicates,
                "late": recorded.late,
                "unknown_items": recorded.unknown_items,
            }
        )

    @contextlib.contextmanager
    def _answering(self, method: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with self._admission.of(method).admitted():
                yield
        except HiertcnError as error:
            self._metrics.requests.labels(method, status_of(error).name).inc()
            raise
        self._metrics.requests.labels(method, "OK").inc()
        self._metrics.request_seconds.labels(method).observe(time.perf_counter() - began)


_HTTP_SENTENCES: Final = {
    404: "there is nothing at this address; the page is at /",
    405: "this address does not take that method",
    413: f"the body is too large; expected at most {_MAX_BODY_BYTES} bytes",
}


def _sentence(text: str, status: int) -> web.Response:
    response = web.json_response({"error": text}, status=status)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _whole(text: str, field: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MOST_LISTED:
        raise InputError(f"{field} is {text[:40]!r}; expected a whole number 1 to {MOST_LISTED}")
    return int(text)


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field, "")
    if not isinstance(value, str):
        raise InputError(f"{field} is a JSON {type(value).__name__}; expected text")
    return _encodable(value, field)


def _encodable(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{field} is not valid Unicode; expected text") from None
    return text
