"""The connection to Valkey or Redis: finds the primary or the cluster, and calls again what failed.

A lost connection is tried again a few times with growing pauses, then it is a ServingError, and the
next call begins anew; of several hosts that are no cluster, the one that says it is the primary is
used.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from hiertcn.errors import InputError, ServingError
from hiertcn.serving.stores.store_url import StoreUrl

Result = TypeVar("Result")

_RETRIES: Final = 3


class ValkeyConnection:
    """Connects when it is called first, and again whenever the server was away; any thread calls.

    Args:
        url: where.

    Attributes:
        is_cluster: whether the server is one; known once it has been called.
        connected_at: when the connection began, in seconds of ``time.monotonic``.
        errors: the client library's exceptions.

    Raises:
        InputError: the client library is missing.
    """

    def __init__(self, url: StoreUrl) -> None:
        try:
            import valkey
        except ImportError:
            raise InputError(
                "--store valkey://… needs the Valkey client; install hiertcn[valkey]"
            ) from None
        self._valkey: Any = valkey
        self._url = url
        self._connecting = threading.Lock()
        self._client: Any = None
        self.errors: Any = valkey.exceptions
        self.is_cluster = False
        self.connected_at = 0.0

    def call(self, run: Callable[[Any], Result]) -> Result:
        """Return what ``run`` returns for a connected client; it may be run more than once.

        Raises:
            InputError: the server refuses the login.
            ServingError: no server answers, or it refuses a command.
        """
        errors = self.errors
        for attempt in range(_RETRIES + 1):
            client = None
            try:
                client = self._connected()
                return run(client)
            except (errors.AuthenticationError, errors.NoPermissionError) as error:
                raise InputError(
                    f"{self._url.place} refuses the login ({error}); check user and password"
                ) from None
            except (
                errors.ConnectionError,
                errors.TimeoutError,
                errors.ReadOnlyError,
                errors.ClusterDownError,
                errors.ValkeyClusterException,
                OSError,
            ) as error:
                self._forget(client)
                reason = error
            except errors.ValkeyError as error:
                raise ServingError(
                    f"the record store {self._url.place} refuses a command ({error})"
                ) from error
            if attempt < _RETRIES:
                time.sleep(0.01 * 4**attempt)
        raise ServingError(
            f"the record store {self._url.place} cannot be reached ({reason}); check that it runs"
        ) from reason

    def close(self) -> None:
        """Close the connections."""
        with self._connecting:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _forget(self, client: Any) -> None:
        # Not closed: other threads may be waiting on its connections, and find out themselves.
        with self._connecting:
            if self._client is client:
                self._client = None

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is None:
                self._client = self._connect()
                self.connected_at = time.monotonic()
            return self._client

    def _connect(self) -> Any:
        url, errors = self._url, self.errors
        settings: dict[str, Any] = {
            "username": url.user,
            "password": url.secret(),
            "socket_timeout": url.timeout_s,
            "socket_connect_timeout": url.timeout_s,
        }
        if url.tls:
            settings |= {
                "ssl": True,
                "ssl_ca_certs": str(url.ca) if url.ca else None,
                "ssl_certfile": str(url.cert) if url.cert else None,
                "ssl_keyfile": str(url.key) if url.key else None,
            }
        problem: Exception = errors.ConnectionError("none of the hosts is a primary")
        for host, port in url.hosts:
            client = self._valkey.Valkey(host=host, port=port, db=url.database, **settings)
            try:
                self.is_cluster = bool(client.info("cluster").get("cluster_enabled"))
                if self.is_cluster:
                    client.close()
                    return self._connect_cluster(settings)
                if client.execute_command("ROLE")[0] == b"master":
                    return client
            except (errors.ConnectionError, errors.TimeoutError) as error:
                if isinstance(error, errors.AuthenticationError):
                    raise
                problem = error
            client.close()
        raise problem

    def _connect_cluster(self, settings: dict[str, Any]) -> Any:
        from valkey.cluster import ClusterNode, ValkeyCluster

        if self._url.database:
            raise InputError(f"{self._url.place} is a cluster, which has no database but 0")
        return ValkeyCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in self._url.hosts], **settings
        )


def piped(client: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Run commands in one round trip; return what each came to, an exception where it failed."""
    with client.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)
        results: list[Any] = pipe.execute(raise_on_error=False)
    return results
