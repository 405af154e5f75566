"""Opens the store of user records that the options name."""

from hiertcn.serving.log.event_log import EventLog
from hiertcn.serving.log.segments import log_identity
from hiertcn.serving.options import STORE_FOLDER, SidecarOptions
from hiertcn.serving.stores.store import RecordStore
from hiertcn.serving.stores.store_lmdb import LmdbStore
from hiertcn.serving.stores.store_valkey import ValkeyStore


def open_to_read(options: SidecarOptions) -> RecordStore:
    """The store of a sidecar whose writing process has opened it before.

    Raises:
        InputError: there is none, or the server refuses the login.
        ServingError: the server cannot be reached.
    """
    if not options.store:
        return LmdbStore(options.state_dir / STORE_FOLDER, read_only=True)
    return ValkeyStore(
        options.store,
        log_identity(options.state_dir / "log"),
        state_dtype=options.state_dtype,
        user_ttl_s=options.user_ttl_s,
    )


def open_store(options: SidecarOptions, log: EventLog) -> RecordStore:
    """LMDB in the state folder, or the server that ``options.store`` names.

    Args:
        options: the sidecar's.
        log: its event log, whose name the server keeps the applied position under.

    Raises:
        InputError: the URL is none, the folder is in use, or the server refuses the login.
        ServingError: the server cannot be reached.
    """
    if not options.store:
        return LmdbStore(options.state_dir / STORE_FOLDER, state_dtype=options.state_dtype)
    return ValkeyStore(
        options.store,
        log.identity,
        state_dtype=options.state_dtype,
        user_ttl_s=options.user_ttl_s,
    )
