"""TLS of the sidecar's doors: its certificate, and the authority of its clients' certificates.

The files are checked when serving starts and followed while it runs: a renewed certificate is
used by connections made after it was written, without a restart. A renewal that cannot be used
is logged, and the certificate before it stays.
"""

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hiertcn.errors import InputError

_log = logging.getLogger(__name__)


class _Pems(NamedTuple):
    certificate: bytes
    key: bytes
    client_authority: bytes | None


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """The PEM files of a TLS server.

    Attributes:
        certificate: the server's certificate, followed by those that lead to its authority.
        key: its private key, not encrypted.
        client_authority: certificates of the authorities that clients' certificates must come
            from (mutual TLS); None asks clients for none.
    """

    certificate: Path
    key: Path
    client_authority: Path | None = None

    def check(self) -> None:
        """Refuse files that cannot serve.

        Raises:
            InputError: a file cannot be read, is not PEM, or the key is not the certificate's.
        """
        self.ssl_context()

    def ssl_context(self) -> ssl.SSLContext:
        """For HTTP: a context that follows the files.

        Raises:
            InputError: as :meth:`check`.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(context)
        seen = [self._identity()]

        def follow(socket: Any, name: Any, of: ssl.SSLContext) -> None:
            if (found := self._identity()) == seen[0]:
                return
            seen[0] = found
            try:
                fresh = self.ssl_context()
            except InputError as error:
                _log.error("%s; the certificate read before stays in use", error)
                return
            socket.context = fresh

        context.sni_callback = follow
        return context

    def grpc_credentials(self) -> Any:
        """For gRPC: ``grpc.ServerCredentials`` that follow the files.

        Raises:
            InputError: as :meth:`check`.
        """
        import grpc

        self.check()
        lock = threading.Lock()
        seen = [self._identity()]

        def configuration(pems: _Pems) -> Any:
            return grpc.ssl_server_certificate_configuration(
                [(pems.key, pems.certificate)], root_certificates=pems.client_authority
            )

        def changed() -> Any:
            with lock:
                if (found := self._identity()) == seen[0]:
                    return None
                seen[0] = found
            try:
                self.check()
                fresh = configuration(self._read())
            except InputError as error:
                _log.error("%s; the certificate read before stays in use", error)
                return None
            _log.info("read the renewed certificate %s", self.certificate)
            return fresh

        return grpc.dynamic_ssl_server_credentials(
            configuration(self._read()),
            changed,
            require_client_authentication=self.client_authority is not None,
        )

    def _load(self, context: ssl.SSLContext) -> None:
        _readable("--tls-cert", self.certificate)
        _readable("--tls-key", self.key)
        try:
            # An empty password fails at once; without one OpenSSL would ask the terminal.
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (ssl.SSLError, ValueError, OSError):
            raise InputError(
                f"--tls-cert {self.certificate} and --tls-key {self.key} cannot be used together; "
                "expected a PEM certificate and its own PEM key without a password"
            ) from None
        if self.client_authority is None:
            return
        _readable("--tls-client-ca", self.client_authority)
        try:
            context.load_verify_locations(self.client_authority)
        except (ssl.SSLError, OSError):
            raise InputError(
                f"--tls-client-ca {self.client_authority} holds no PEM certificate; expected "
                "those of the authorities that sign clients' certificates"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED

    def _read(self) -> _Pems:
        return _Pems(
            _readable("--tls-cert", self.certificate),
            _readable("--tls-key", self.key),
            None
            if self.client_authority is None
            else _readable("--tls-client-ca", self.client_authority),
        )

    def _identity(self) -> tuple[object, ...]:
        files = (self.certificate, self.key, self.client_authority)
        return tuple(_stat(file) for file in files if file is not None)


def _stat(file: Path) -> object:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _readable(option: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{option} {file} cannot be read ({error.strerror})") from None
