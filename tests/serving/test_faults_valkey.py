"""Valkey's primary dies under a sidecar, and the replica that follows lacks the newest writes."""

import concurrent.futures

import valkey

from hiertcn.errors import ServingError
from hiertcn.serving.client import Interaction, RecommenderClient

T0 = 1_767_225_600_000_000 + 3_600_000_000


def test_a_replica_that_lacks_the_newest_writes_takes_over(shared_toy, start_sidecar, start_redis):
    primary = start_redis("--repl-diskless-sync-delay", "0")
    replica = start_redis("--replicaof", "127.0.0.1", str(primary.port))
    url = f"valkey://127.0.0.1:{primary.port},127.0.0.1:{replica.port}/0"
    running = start_sidecar(shared_toy, "", models="in-process", store=url, fsync="os")
    client = running.client
    client.record([Interaction("ada", "item-0", T0)])
    asked = valkey.Valkey(port=primary.port)
    asked.set("last", 1)
    assert asked.wait(1, 10_000) == 1
    # From here on the replica hears nothing: what is acknowledged now is in the primary alone.
    other = valkey.Valkey(port=replica.port)
    other.execute_command("REPLICAOF", "127.0.0.1", "1")
    users = [f"u{n}" for n in range(6)]
    acknowledged = {user: [] for user in users}

    def write(user):
        # Its own breaker, so that it finds out by itself when the server is back.
        with RecommenderClient(running.sidecar.address, timeout_s=1.0) as writer:
            failures = step = 0
            while len(acknowledged[user]) < 60 or not failures:
                try:
                    writer.record([Interaction(user, f"item-{step % 50}", T0 + step)])
                except ServingError:
                    failures += 1
                    if failures == 1 and user == users[0]:
                        other.execute_command("REPLICAOF", "NO", "ONE")
                    assert failures < 60
                    continue
                acknowledged[user].append(T0 + step)
                step += 1
                if len(acknowledged[user]) == 30 and user == users[0]:
                    primary.kill()

    with concurrent.futures.ThreadPoolExecutor(len(users)) as pool:
        list(pool.map(write, users))
    for user in users:
        journal = [one.timestamp_us for one in client.get_user(user).journal]
        assert journal == acknowledged[user]
        assert not client.recommend(user, timestamp_us=T0 + 10_000).fallback
    assert len(client.get_user("ada").journal) == 1
