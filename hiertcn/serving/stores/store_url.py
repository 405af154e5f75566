"""Where a shared store is: ``valkey://[user[:password]@]host[:port][,host[:port]...][/db][?...]``.

``valkeys://`` is the same over TLS; ``redis://`` and ``rediss://`` are understood alike. After
``?``, joined by ``&``:

- ``prefix``: what every key begins with (``hiertcn``), so several services may share a server.
- ``password_file``: a file whose first line is the password, read again at every connection.
- ``ca``: PEM certificates of the authorities that may sign the server's.
- ``cert``, ``key``: PEM certificate and key of this client.
- ``timeout_ms``: longest wait for one answer (500).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote

from hiertcn.errors import InputError

_PLAIN: Final = ("valkey", "redis")
_TLS: Final = ("valkeys", "rediss")
_PORT: Final = 6379
_EXPECTED: Final = "expected valkey://host:port[,host:port]/db"
_OPTIONS: Final = ("prefix", "password_file", "ca", "cert", "key", "timeout_ms")


@dataclass(frozen=True, kw_only=True)
class StoreUrl:
    """A parsed URL; ``repr`` shows no password."""

    hosts: tuple[tuple[str, int], ...]
    database: int
    tls: bool
    user: str | None
    password: str | None = field(repr=False)
    password_file: Path | None
    prefix: str
    ca: Path | None
    cert: Path | None
    key: Path | None
    timeout_s: float

    @classmethod
    def parse(cls, url: str) -> "StoreUrl":
        """Parse a URL as the module describes.

        Raises:
            InputError: it is none, naming what is wrong but never the password.
        """
        scheme, found, rest = url.partition("://")
        if not found or scheme not in (*_PLAIN, *_TLS):
            raise InputError(f"--store begins with {scheme[:20]!r}; {_EXPECTED}")
        address, _, query = rest.partition("?")
        authority, _, database = address.partition("/")
        login, _, hosts = authority.rpartition("@")
        user, _, password = login.partition(":")
        options = dict(parse_qsl(query, keep_blank_values=True))
        for name in options:
            if name not in _OPTIONS:
                raise InputError(f"--store has option {name!r}; expected {', '.join(_OPTIONS)}")
        prefix = options.get("prefix", "hiertcn")
        if not re.fullmatch(r"[\w.:-]{1,64}", prefix, re.ASCII):
            raise InputError(
                f"--store has prefix {prefix!r}; expected 1 to 64 letters, digits or _ . : -"
            )
        password_file = _path(options, "password_file")
        if password and password_file:
            raise InputError("--store has a password and a password_file; give one of the two")
        if not database.isdecimal() and database:
            raise InputError(f"--store has database {database!r}; expected a number")
        try:
            timeout_s = float(options.get("timeout_ms", "500")) / 1000
        except ValueError:
            timeout_s = 0.0
        if not 0 < timeout_s < 60:
            raise InputError(f"--store has timeout_ms={options['timeout_ms']}; expected 1 to 60000")
        return cls(
            hosts=tuple(_host(text) for text in hosts.split(",")),
            database=int(database or 0),
            tls=scheme in _TLS,
            user=unquote(user) or None,
            password=unquote(password) or None,
            password_file=password_file,
            prefix=prefix,
            ca=_path(options, "ca"),
            cert=_path(options, "cert"),
            key=_path(options, "key"),
            timeout_s=timeout_s,
        )

    @property
    def place(self) -> str:
        """Hosts and database, for messages."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"valkey://{hosts}/{self.database}"

    def secret(self) -> str | None:
        """The password now.

        Raises:
            InputError: the password file cannot be read.
        """
        if self.password_file is None:
            return self.password
        try:
            return self.password_file.read_text().partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the password file {self.password_file} of --store cannot be read ({error})"
            ) from None


def _path(options: dict[str, str], name: str) -> Path | None:
    return Path(options[name]) if options.get(name) else None


def _host(text: str) -> tuple[str, int]:
    # An IPv6 address stands in brackets.
    host, _, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not host:
        host, port = port, ""
    host = host.strip("[]")
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise InputError(f"--store names the host {text!r}; {_EXPECTED}")
    return host, int(port or _PORT)
