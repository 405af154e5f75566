"""The HTTP port of Prometheus and of probes that cannot speak gRPC or TLS.

    GET /metrics   the metrics, in Prometheus' text format
    GET /healthz   200 while the event loop turns, 503 when it has stood still for two seconds
    GET /readyz    200 while a release is active and requests are taken, 503 before and after

Plain HTTP on threads of its own, so it answers when the event loop does not.
"""

import asyncio
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from hiertcn.errors import InputError

_ALIVE_WITHIN_S: Final = 2.0


class Probes:
    """What the probes are answered by.

    Args:
        loop: the event loop that must turn; None where there is none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop
        self.is_ready = False

    def is_alive(self) -> bool:
        """Whether the event loop ran a task within two seconds."""
        if self._loop is None:
            return True
        try:
            turned = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop)
            turned.result(_ALIVE_WITHIN_S)
        except (TimeoutError, RuntimeError):
            return False
        return True


class MetricsServer:
    """The running endpoint.

    Raises:
        InputError: the port is in use.
    """

    def __init__(self, registry: CollectorRegistry, probes: Probes, host: str, port: int) -> None:
        try:
            self._server: WSGIServer = make_server(
                host,
                port,
                _application(make_wsgi_app(registry), probes),
                ThreadingWSGIServer,
                handler_class=_Quiet,
            )
        except OSError as error:
            raise InputError(
                f"--metrics-port {port} on {host} cannot be used ({error.strerror}); stop what "
                "holds it or give another"
            ) from error
        self._thread = Thread(target=self._server.serve_forever, daemon=True, name="metrics")
        self._thread.start()

    @property
    def port(self) -> int:
        """The port bound."""
        return int(self._server.server_port)

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _application(metrics: Callable[..., Any], probes: Probes) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO")
        if path in ("/healthz", "/readyz"):
            holds = probes.is_alive() if path == "/healthz" else probes.is_ready
            start_response(
                "200 OK" if holds else "503 Service Unavailable", [("Content-Type", "text/plain")]
            )
            return [b"yes\n" if holds else b"no\n"]
        found: Iterable[bytes] = metrics(environ, start_response)
        return found

    return answer


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Scrapes and probes are not worth a line each."""
