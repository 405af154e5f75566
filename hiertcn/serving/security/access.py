"""How a client reaches a sidecar that asks for TLS or a token.

    access = Access(tls_ca=Path("ca.pem"), token_file=Path("token"))
    with RecommenderClient("recommender.example:50051", access=access) as client: ...

The token is read again when its file changes, so a rotated one is used without a restart.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from hiertcn.errors import InputError

_CHECK_EVERY_S: Final = 1.0

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a client shows and what it trusts; nothing by default, which is plain text.

    Attributes:
        tls_ca: PEM certificates of the authorities that may sign the sidecar's certificate; turns
            TLS on. A system's own bundle of them is such a file.
        tls_cert: the client's PEM certificate, where the sidecar asks for one (mutual TLS).
        tls_key: its PEM key.
        token_file: file whose first line ends in the bearer token; blank lines and lines that
            begin with ``#`` are skipped.
    """

    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    _token: "_Token | None" = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key belong together; one of them is missing")
        if self.tls_cert is not None and self.tls_ca is None:
            raise InputError(
                "--tls-cert needs --tls-ca, the authority of the sidecar's certificate"
            )
        if self.token_file is not None:
            object.__setattr__(self, "_token", _Token(self.token_file))

    def channel(self, address: str, options: list[tuple[str, Any]]) -> Any:
        """A blocking gRPC channel to ``host:port``.

        Raises:
            InputError: a file cannot be read.
        """
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, credentials, options=options)

    def aio_channel(self, address: str, options: list[tuple[str, Any]]) -> Any:
        """The same for asyncio, to be made inside a running event loop."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)

    def metadata(self) -> Metadata:
        """What every call carries.

        Raises:
            InputError: the token file cannot be read or holds none.
        """
        if self._token is None:
            return ()
        return (("authorization", f"Bearer {self._token.now()}"),)

    def _credentials(self) -> Any:
        if self.tls_ca is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=_read("--tls-ca", self.tls_ca),
            private_key=_read("--tls-key", self.tls_key) if self.tls_key else None,
            certificate_chain=_read("--tls-cert", self.tls_cert) if self.tls_cert else None,
        )


class _Token:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._read_at = time.monotonic()
        self._value = self._read()

    def now(self) -> str:
        now = time.monotonic()
        if now - self._read_at > _CHECK_EVERY_S:
            self._read_at = now
            self._value = self._read()
        return self._value

    def _read(self) -> str:
        for line in _read("--token-file", self._file).decode("ascii", "replace").splitlines():
            words = line.split()
            if words and not words[0].startswith("#"):
                if not words[-1].isprintable() or not words[-1].isascii():
                    break
                return words[-1]
        raise InputError(
            f"--token-file {self._file} holds no token; expected a line that ends in one"
        )


def _read(option: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{option} {file} cannot be read ({error.strerror})") from None
