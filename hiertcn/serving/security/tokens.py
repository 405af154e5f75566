"""Bearer tokens (RFC 6750) and what each may do, read from a file.

One token a line, ``scope[,scope...] token``; the scopes are ``read``, ``write`` and ``admin``, and
none implies another. Blank lines and lines that begin with ``#`` are skipped. The file is read
again when it changes. Tokens are held as digests under a key that is drawn at start: they are
found in a time that says nothing of how much of one was right, and no message or log shows one.
"""

import enum
import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hiertcn.errors import InputError, PermissionDeniedError, UnauthenticatedError

_log = logging.getLogger(__name__)

MIN_TOKEN_LENGTH: Final = 16
CHECK_EVERY_S: Final = 1.0

_TOKEN: Final = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_DIGEST_BYTES: Final = 32


class Scope(enum.StrEnum):
    """What a token may do."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


@dataclass(frozen=True)
class Caller:
    """Who holds a token: ``key`` is the token's keyed digest, of use only inside this sidecar."""

    key: bytes
    scopes: frozenset[Scope]

    def __repr__(self) -> str:
        return f"Caller(scopes={sorted(self.scopes)})"


class TokenFile:
    """The tokens of a file, as it is now.

    Args:
        path: the file.
        check_every_s: least time between two looks at whether it changed, in seconds.
        key: secret of the digests, where several processes must give a token the same; else drawn.

    Raises:
        InputError: it cannot be read, holds no token, or a line of it is wrong; the line's number
            is named, never its token.
    """

    def __init__(
        self, path: Path, *, check_every_s: float = CHECK_EVERY_S, key: bytes | None = None
    ) -> None:
        self._path = path
        self._check_every_s = check_every_s
        self._key = key or secrets.token_bytes(_DIGEST_BYTES)
        self._lock = threading.Lock()
        self._seen = _identity(path)
        self._looked_at = time.monotonic()
        self._callers = self._read()
        if not self._callers:
            raise InputError(f"{path} holds no token; expected lines 'scope[,scope] token'")

    def caller(self, authorization: str | None, scope: Scope) -> Caller:
        """Who sent the header or metadata ``authorization``, if they may do ``scope``.

        Raises:
            UnauthenticatedError: there is no token, or it is none of the file's.
            PermissionDeniedError: the token lacks the scope.
        """
        self._follow()
        if authorization is None:
            raise UnauthenticatedError(
                "authorization is missing; expected 'Bearer TOKEN' with one of the tokens of the "
                "server's --token-file"
            )
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise UnauthenticatedError(
                "authorization has another scheme; expected 'Bearer TOKEN' (RFC 6750)"
            )
        key = self._digest(token.strip())
        caller = self._callers.get(key)
        if caller is None or not hmac.compare_digest(caller.key, key):
            raise UnauthenticatedError(
                "the bearer token in authorization is not one of the server's --token-file"
            )
        if scope not in caller.scopes:
            raise PermissionDeniedError(
                f"the bearer token may {', '.join(sorted(caller.scopes))}; this call needs the "
                f"scope {scope}"
            )
        return caller

    def _follow(self) -> None:
        if time.monotonic() - self._looked_at < self._check_every_s:
            return
        with self._lock:
            self._looked_at = time.monotonic()
            try:
                found = _identity(self._path)
                if found == self._seen:
                    return
                self._callers = self._read()
            except InputError as error:
                _log.error("%s; the tokens read before stay valid", error)
                return
            self._seen = found
            _log.info("read %d tokens from %s", len(self._callers), self._path)

    def _read(self) -> dict[bytes, Caller]:
        try:
            lines = self._path.read_text(encoding="ascii").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{self._path} is not ASCII text; expected tokens") from None
        except OSError as error:
            raise InputError(
                f"--token-file {self._path} cannot be read ({error.strerror})"
            ) from None
        callers: dict[bytes, Caller] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            where = f"{self._path} line {number}"
            if len(words) != 2:
                raise InputError(f"{where} has {len(words)} words; expected 'scope[,scope] token'")
            scopes = _scopes(words[0], where)
            key = self._digest(_checked(words[1], where))
            if key in callers:
                raise InputError(f"{where} repeats a token; expected each once")
            callers[key] = Caller(key, scopes)
        return callers

    def _digest(self, token: str) -> bytes:
        return hashlib.blake2b(
            token.encode("utf-8", "surrogateescape"), key=self._key, digest_size=_DIGEST_BYTES
        ).digest()


def _scopes(text: str, where: str) -> frozenset[Scope]:
    names = text.split(",")
    unknown = [name for name in names if name not in set(Scope)]
    if unknown:
        # The unknown word may be a token at the wrong place, so it is not repeated.
        raise InputError(f"{where} begins with no scopes; expected some of {', '.join(Scope)}")
    return frozenset(Scope(name) for name in names)


def _checked(token: str, where: str) -> str:
    if len(token) < MIN_TOKEN_LENGTH or not _TOKEN.fullmatch(token):
        raise InputError(
            f"the token in {where} has {len(token)} characters; expected at least "
            f"{MIN_TOKEN_LENGTH} of A-Z a-z 0-9 - . _ ~ + / and = at the end, such as "
            "'openssl rand -hex 32' prints"
        )
    return token


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"--token-file {path} cannot be read ({error.strerror})") from None
    return found.st_mtime_ns, found.st_size, found.st_ino
