"""What only a shared store does: two writers, a server that dies, forgets, or asks for a login."""

import dataclasses
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hiertcn.errors import InputError, ServingError
from hiertcn.serving.log.event_log import BEGINNING, Position
from hiertcn.serving.records.record import new_record, user_key
from hiertcn.serving.stores.store import Change, StoreBehindError
from hiertcn.serving.stores.store_url import StoreUrl
from hiertcn.serving.stores.store_valkey import ValkeyStore

ADA, BOB = user_key("ada"), user_key("bob")


def record(revision=1, **fields):
    start = new_record(np.full((2, 6), revision, np.float32))
    return dataclasses.replace(start, revision=revision, **fields)


@pytest.fixture(scope="module")
def server(start_redis):
    return start_redis()


def test_urls_are_parsed():
    url = StoreUrl.parse(
        "valkeys://eve:p%40ss@a.example:7000,[::1]:7001,b/3?prefix=shop&timeout_ms=250&ca=/ca.pem"
    )
    assert url.hosts == (("a.example", 7000), ("::1", 7001), ("b", 6379))
    assert (url.database, url.tls, url.user, url.secret()) == (3, True, "eve", "p@ss")
    assert (url.prefix, url.timeout_s, str(url.ca)) == ("shop", 0.25, "/ca.pem")
    assert "p@ss" not in repr(url) + url.place
    assert StoreUrl.parse("redis://localhost").hosts == (("localhost", 6379),)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://a", "begins with 'http'"),
        ("valkey://", "names the host ''"),
        ("valkey://a:0", "names the host 'a:0'"),
        ("valkey://a:b", "names the host 'a:b'"),
        ("valkey://a/x", "database 'x'"),
        ("valkey://a?colour=red", "option 'colour'"),
        ("valkey://a?prefix={x}", "prefix '{x}'"),
        ("valkey://a?timeout_ms=no", "timeout_ms=no"),
        ("valkey://:secret@a?password_file=/f", "give one of the two"),
    ],
)
def test_bad_urls_are_refused_without_their_password(url, says):
    with pytest.raises(InputError) as caught:
        StoreUrl.parse(url)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


def test_two_writers_of_one_user_lose_no_update(server):
    def add_200(writer):
        store = ValkeyStore(f"{server.url}?prefix=race", writer)
        for n in range(200):
            position = Position(1, n + 9)
            while True:
                before = store.get(ADA)
                base = before.revision if before else None
                if not store.write({ADA: Change(record((base or 0) + 1), base)}, position):
                    break
        store.close()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add_200, ["first log", "second log"]))
    store = ValkeyStore(f"{server.url}?prefix=race", "first log")
    assert store.get(ADA).revision == 400
    assert store.applied < store.newest_applied
    assert store.applied_for(ADA) == Position(1, 208)
    store.close()


def test_a_server_that_is_away_is_an_error_and_comes_back(start_redis, tmp_path):
    server = start_redis("--appendonly", "yes", "--appendfsync", "always")
    store = ValkeyStore(server.url, "log")
    store.write({ADA: Change(record(1), None)}, Position(1, 20))
    server.kill()
    with pytest.raises(ServingError, match="cannot be reached"):
        store.get(ADA)
    with pytest.raises(ServingError, match="cannot be reached"):
        store.write({ADA: Change(record(2), 1)})
    server.start()
    assert store.get(ADA).revision == 1
    assert store.write({ADA: Change(record(2), 1)}, Position(1, 30)) == set()
    assert store.applied_for(ADA) == Position(1, 30)
    store.close()
    with pytest.raises(ServingError, match=r"127\.0\.0\.1:1/0 cannot be reached"):
        ValkeyStore("valkey://127.0.0.1:1", "log")


def test_a_server_that_forgot_says_so_before_anything_is_written(start_redis):
    server = start_redis()
    store = ValkeyStore(server.url, "log")
    store.write({ADA: Change(record(1), None), BOB: Change(record(1), None)}, Position(1, 20))
    server.kill()
    server.start()
    with pytest.raises(StoreBehindError):
        store.write({ADA: Change(record(1), None)}, Position(1, 30))
    assert store.get(ADA) is None
    assert store.applied == BEGINNING
    assert store.write({ADA: Change(record(1), None)}, Position(1, 30)) == set()
    store.close()


def test_the_primary_is_found_among_the_hosts(start_redis):
    primary = start_redis("--repl-diskless-sync-delay", "0")
    replica = start_redis("--replicaof", "127.0.0.1", str(primary.port))
    url = f"valkey://127.0.0.1:{replica.port},127.0.0.1:{primary.port}/0"
    store = ValkeyStore(url, "log")
    store.write({ADA: Change(record(1), None)}, Position(1, 20))
    import valkey

    # The replica has all up to here before its primary dies.
    client = valkey.Valkey(port=primary.port)
    client.set("last", 1)
    assert client.wait(1, 10_000) == 1
    primary.kill()
    valkey.Valkey(port=replica.port).execute_command("REPLICAOF", "NO", "ONE")
    assert store.get(ADA).revision == 1
    assert store.write({ADA: Change(record(2), 1)}, Position(1, 30)) == set()
    store.close()


def test_passwords_come_from_the_url_or_a_file(start_redis, tmp_path):
    server = start_redis("--requirepass", "sesame street")
    host = f"127.0.0.1:{server.port}"
    ValkeyStore(f"valkey://:sesame%20street@{host}", "log").close()
    (tmp_path / "password").write_text("sesame street\nignored\n")
    ValkeyStore(f"valkey://{host}?password_file={tmp_path / 'password'}", "log").close()
    for url in (f"valkey://{host}", f"valkey://:wrong@{host}"):
        with pytest.raises(InputError, match="refuses the login") as caught:
            ValkeyStore(url, "log")
        assert "wrong" not in str(caught.value)


def test_tls(start_redis, tmp_path, required_program):
    openssl = required_program("openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *[openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
            *["-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
            *["-keyout", str(key), "-out", str(cert), "-days", "2"],
        ],
        check=True,
        capture_output=True,
    )
    server = start_redis(
        *["--tls-cert-file", str(cert), "--tls-key-file", str(key), "--tls-auth-clients", "no"],
        tls=True,
    )
    store = ValkeyStore(f"valkeys://127.0.0.1:{server.port}?ca={cert}", "log")
    store.write({ADA: Change(record(1), None)})
    assert store.get(ADA).revision == 1
    store.close()
    with pytest.raises(ServingError, match="cannot be reached"):
        ValkeyStore(f"valkeys://127.0.0.1:{server.port}", "log")


def test_a_server_out_of_memory_is_an_error(start_redis):
    server = start_redis("--maxmemory", "3mb")
    store = ValkeyStore(server.url, "log")
    keys = [user_key(f"u{n}") for n in range(200)]
    big = dataclasses.replace(record(), state=np.zeros((64, 64), np.float32))
    with pytest.raises(ServingError, match="refuses a command"):
        for key in keys:
            store.write({key: Change(big, None)})
    store.close()


def test_idle_records_expire_but_deletions_stay(server):
    import valkey

    store = ValkeyStore(f"{server.url}?prefix=ttl", "log", user_ttl_s=3600)
    store.write({ADA: Change(record(1), None), BOB: Change(record(1, erased_us=5), None)})
    client = valkey.Valkey(port=server.port)
    lives = {name[-16:]: client.ttl(name) for name in client.scan_iter(match="ttl:*:u:*")}
    assert 3500 < lives[ADA] <= 3600
    assert lives[BOB] == -1
    client.delete(next(name for name in client.scan_iter(match="ttl:*:u:*") if name[-16:] == ADA))
    assert store.write({ADA: Change(record(2), 1)}) == {ADA}
    store.close()
