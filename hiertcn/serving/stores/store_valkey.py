"""User records in Valkey or Redis, alone or as a cluster, shared by several sidecars.

Every user's keys lie in one of 256 buckets (the first byte of the key's digest), each a hash tag
and so in one slot of a cluster::

    hiertcn:{a3}:u:<16 bytes>     the record, as record.py encodes it
    hiertcn:{a3}:p:<log>          up to where that sidecar's log is applied to this bucket

One Lua script compares the revision that each record has with the one that its change was made
from, compares the position, and writes records and position together: a bucket's entries are
applied once and whole, and two writers never lose an update. A bucket whose position is not the
expected one has lost its newest writes (a failover to a replica that lagged, a restart without
persistence): :class:`~.store.StoreBehindError` then has the log applied again from
there. Positions of buckets that nobody wrote to follow every ten seconds and at every rotation.

Reads and writes are pipelined over a connection that comes back (``valkey_connection.py``). The
server's own persistence, ``maxmemory`` and eviction policy apply; records of idle users expire by
themselves.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Final

from hiertcn.serving.log.event_log import BEGINNING, Position
from hiertcn.serving.records.record import (
    DAMAGED,
    NEVER_US,
    REVISION_AT,
    CorruptRecordError,
    UserRecord,
    decode,
    encode,
)
from hiertcn.serving.stores.store import Change, StoreBehindError
from hiertcn.serving.stores.store_url import StoreUrl
from hiertcn.serving.stores.valkey_connection import ValkeyConnection, piped

_log = logging.getLogger(__name__)

_BUCKETS: Final = 256
_READ_KEYS: Final = 512
_FOLLOW_S: Final = 10.0
_POSITION_TTL_S: Final = 90 * 86_400
_SCRIPT: Final = f"""
local function put(i)
  local value, ttl = ARGV[3 * i - 2], ARGV[3 * i - 1]
  if value == '' then redis.call('DEL', KEYS[i])
  elseif ttl == '0' then redis.call('SET', KEYS[i], value)
  else redis.call('SET', KEYS[i], value, 'EX', ttl) end
end
local moves = ARGV[2] ~= ''
if moves and (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return {{-1}} end
local refused = {{}}
for i = 2, #KEYS do
  local held = redis.call('GETRANGE', KEYS[i], {REVISION_AT}, {REVISION_AT + 3})
  if held ~= ARGV[3 * i - 3] then refused[#refused + 1] = i - 2
  elseif not moves then put(i) end
end
if moves and #refused == 0 then
  for i = 2, #KEYS do put(i) end
  redis.call('SET', KEYS[1], ARGV[2], 'EX', {_POSITION_TTL_S})
end
return refused
"""
_SCRIPT_SHA1: Final = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()
_BEHIND: Final = [-1]


class ValkeyStore:
    """A :class:`~.store.RecordStore` on a server that several processes share.

    Args:
        url: where, see ``store_url.py``.
        writer: a name of this process's event log that no other has.
        state_dtype: of the states written, float32 or float16; either is read.
        user_ttl_s: seconds after its last write at which a record expires, 0 for never. Records of
            deleted users stay, or an older snapshot would bring the users back.

    Raises:
        InputError: the client library is missing, or the server refuses the login.
        ServingError: no server answers.
    """

    is_local: Final = False

    def __init__(
        self,
        url: str,
        writer: str,
        *,
        state_dtype: str = "float32",
        user_ttl_s: float = 0.0,
    ) -> None:
        self._url = StoreUrl.parse(url)
        self._connection = ValkeyConnection(self._url)
        self._writer = writer.encode()
        self._state_dtype = state_dtype
        self._ttl_s = b"%d" % (max(1, int(user_ttl_s)) if user_ttl_s else 0)
        self._applied: list[Position] = [BEGINNING] * _BUCKETS
        # With what is found where their revision should be, by which the server knows them.
        self._damaged: dict[bytes, bytes] = {}
        self._followed_at = 0.0
        self._connection.call(lambda client: client.ping())

    @property
    def applied(self) -> Position:
        """The log position up to which every bucket has this log's entries."""
        keys = [self._position_key(bucket) for bucket in range(_BUCKETS)]
        found = self._connection.call(lambda client: self._fetched(client, keys))
        self._applied = [_position(stored) for stored in found]
        return min(self._applied)

    @property
    def newest_applied(self) -> Position:
        """The newest position of any bucket."""
        _ = self.applied
        return max(self._applied)

    def applied_for(self, key: bytes) -> Position:
        """The position of the user's bucket."""
        return self._applied[key[0]]

    def get(self, key: bytes) -> UserRecord | None:
        """The user's record, or None; a damaged one counts as None."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[bytes]) -> list[UserRecord | None]:
        """The users' records ``[n]``, in as few round trips as there are 512 keys."""
        names = [self._record_key(key) for key in keys]
        found = self._connection.call(lambda client: self._fetched(client, names))
        return [self._decoded(key, stored) for key, stored in zip(keys, found, strict=True)]

    def damaged(self) -> Set[bytes]:
        """Users whose record was found damaged here, and has not been read whole since."""
        return self._damaged.keys()

    def write(self, changes: Mapping[bytes, Change], applied: Position | None = None) -> set[bytes]:
        """Make the changes bucket by bucket, each whole or, with a position, not at all.

        Raises:
            StoreBehindError: a bucket lost its newest writes.
            ServingError: the server cannot be reached or is out of memory.
        """
        by_bucket: dict[int, list[bytes]] = {}
        for key in changes:
            by_bucket.setdefault(key[0], []).append(key)
        if applied is not None and (not changes or self._has_to_follow()):
            by_bucket = {
                bucket: by_bucket.get(bucket, [])
                for bucket in range(_BUCKETS)
                if bucket in by_bucket or self._applied[bucket] <= applied
            }
            self._followed_at = time.monotonic()
        calls = [
            self._arguments(bucket, keys, changes, applied) for bucket, keys in by_bucket.items()
        ]
        if not calls:
            return set()
        results = self._connection.call(lambda client: self._run_script(client, calls))
        refused: set[bytes] = set()
        is_behind = False
        for (bucket, keys), result in zip(by_bucket.items(), results, strict=True):
            if result == _BEHIND:
                is_behind = True
            elif applied is None:
                refused.update(keys[place] for place in result)
            elif result:
                refused.update(keys)
            else:
                self._applied[bucket] = applied
        if is_behind:
            raise StoreBehindError(f"{self._url.place} lost its newest writes")
        return refused

    def scan(self, after: bytes, count: int) -> tuple[list[bytes], bytes]:
        """About ``count`` users' keys and what to go on from; ``b""`` begins and ends."""
        bucket, cursor = (int(part) for part in after.split(b":")) if after else (0, 0)
        match = self._prefix(b"*") + b"u:*"

        def scanned(client: Any) -> tuple[int, int, list[bytes]]:
            if not self._connection.is_cluster:
                following, names = client.scan(cursor, match=match, count=count)
                return (0, following, names) if following else (1, 0, names)
            nodes = sorted(client.get_primaries(), key=lambda node: str(node.name))
            if bucket >= len(nodes):
                return len(nodes), 0, []
            found, names = client.scan(cursor, match=match, count=count, target_nodes=nodes[bucket])
            following = next(iter(found.values()))
            more = (bucket, following) if following else (bucket + 1, 0)
            return (*more, names) if more[0] < len(nodes) else (-1, 0, names)

        node, following, names = self._connection.call(scanned)
        keys = [bytes(name[-16:]) for name in names]
        is_end = node == -1 or (not self._connection.is_cluster and node == 1)
        return keys, b"" if is_end else b"%d:%d" % (node, following)

    @property
    def live_bytes(self) -> int:
        """Not for us to bound: the server has ``maxmemory``."""
        return 0

    def __len__(self) -> int:
        return sum(1 for _ in self._all_keys())

    def sync(self) -> None:
        """Nothing to wait for: how durable a write is, the server's configuration says."""

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def execute(self, *command: Any) -> Any:
        """Run one command that has a single key, for what is shared beside the records.

        Raises:
            ServingError: the server cannot be reached.
        """
        return self._connection.call(lambda client: client.execute_command(*command))

    def key(self, name: str) -> bytes:
        """The key of something shared beside the records."""
        return f"{self._url.prefix}:{name}".encode()

    def _all_keys(self) -> Iterator[bytes]:
        keys, after = self.scan(b"", 10_000)
        yield from keys
        while after:
            keys, after = self.scan(after, 10_000)
            yield from keys

    def _has_to_follow(self) -> bool:
        # Whoever was away may have forgotten, so the next write looks at every bucket.
        is_new = self._connection.connected_at > self._followed_at
        return is_new or time.monotonic() - self._followed_at > _FOLLOW_S

    def _prefix(self, bucket: bytes) -> bytes:
        return b"%s:{%s}:" % (self._url.prefix.encode(), bucket)

    def _record_key(self, key: bytes) -> bytes:
        return self._prefix(b"%02x" % key[0]) + b"u:" + key

    def _position_key(self, bucket: int) -> bytes:
        return self._prefix(b"%02x" % bucket) + b"p:" + self._writer

    def _decoded(self, key: bytes, stored: bytes | None) -> UserRecord | None:
        try:
            record = None if stored is None else decode(stored)
        except CorruptRecordError as error:
            _log.error("%s: record %s is damaged: %s", self._url.place, key.hex(), error)
            self._damaged[key] = (stored or b"")[REVISION_AT : REVISION_AT + 4]
            return None
        if self._damaged:
            self._damaged.pop(key, None)
        return record

    def _arguments(
        self,
        bucket: int,
        keys: Sequence[bytes],
        changes: Mapping[bytes, Change],
        applied: Position | None,
    ) -> list[Any]:
        names = [self._position_key(bucket), *(self._record_key(key) for key in keys)]
        positions = [b"", b""]
        if applied is not None:
            positions = [_text(self._applied[bucket]), _text(applied)]
        values: list[bytes] = []
        for key in keys:
            record, base = changes[key]
            held = b"" if base is None else base.to_bytes(4, "little", signed=base < 0)
            if base == DAMAGED:
                held = self._damaged.get(key, held)
            lives = b"0" if record is None or record.erased_us != NEVER_US else self._ttl_s
            values += [
                held,
                b"" if record is None else encode(record, self._state_dtype),
                lives,
            ]
        return [len(names), *names, *positions, *values]

    def _run_script(self, client: Any, calls: list[list[Any]]) -> list[Any]:
        results = piped(client, [("EVALSHA", _SCRIPT_SHA1, *call) for call in calls])
        missing = [
            place
            for place, result in enumerate(results)
            if isinstance(result, self._connection.errors.NoScriptError)
        ]
        if missing:
            # Nothing of these was done: the server has not seen the script since it started.
            again = piped(client, [("EVAL", _SCRIPT, *calls[place]) for place in missing])
            for place, result in zip(missing, again, strict=True):
                results[place] = result
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _fetched(self, client: Any, names: Sequence[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for first in range(0, len(names), _READ_KEYS):
            part = names[first : first + _READ_KEYS]
            if self._connection.is_cluster:
                results = piped(client, [("GET", name) for name in part])
                for result in results:
                    if isinstance(result, Exception):
                        raise result
                found += results
            else:
                found += client.mget(part)
        return found


def _text(position: Position) -> bytes:
    return b"" if position == BEGINNING else b"%d:%d" % position


def _position(stored: bytes | None) -> Position:
    if not stored:
        return BEGINNING
    segment, _, offset = stored.partition(b":")
    return Position(int(segment), int(offset))
