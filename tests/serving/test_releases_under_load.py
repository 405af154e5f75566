"""Publish, activate, roll back, prune and refuse releases while users are served."""

import itertools
import shutil
import threading

import numpy as np
import pytest

from hiertcn.errors import ReleaseError
from hiertcn.serving.client import Interaction
from tests.waiting import patient_client, until

FIRST = 2026010101
HOUR_US = 3_600_000_000
USERS = [f"user-{n}" for n in range(6)]


class Load:
    """Threads that ask and record without a pause, and hold every reply against one release.

    Vectors, models and states of the toy releases are all different, so the scores of a reply fit
    the release it names only if all three came from it.
    """

    def __init__(self, address, toys):
        self.toys, self.address = toys, address
        self.stop, self.failures, self.seen = threading.Event(), [], set()
        self.replies = 0
        self.threads = [threading.Thread(target=self.ask, args=(user,)) for user in USERS]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def is_sound(self):
        return self.failures == []

    def ask(self, user):
        try:
            with patient_client(self.address) as client:
                now = self.toys[FIRST].watermark_us + HOUR_US
                session = [f"item-{n}" for n in range(3)]
                client.record([Interaction(user, item, now) for item in session])
                for turn in itertools.count():
                    if self.stop.is_set():
                        return
                    candidates = [f"item-{n}" for n in range(turn % 7, 50, 2)] * (turn % 2)
                    found = client.recommend(
                        user, k=5, candidates=candidates or None, timestamp_us=now
                    )
                    toy = self.toys[found.release]
                    scores = toy.scores(toy.states[user], *session)
                    rows = toy.rows(*candidates) if candidates else slice(None)
                    assert not found.fallback
                    np.testing.assert_allclose(
                        [item.score for item in found.items],
                        np.sort(scores[rows])[::-1][:5],
                        rtol=1e-3,
                        atol=1e-4,
                    )
                    named = scores[toy.rows(*(item.item_id for item in found.items))]
                    np.testing.assert_allclose(named, [one.score for one in found.items], atol=1e-3)
                    self.seen.add(found.release)
                    self.replies += 1
                    if turn % 5 == 4:
                        client.record([Interaction(user, "item-0", now)])  # a duplicate
        except BaseException as error:
            self.failures.append(error)


def test_releases_come_and_go_under_load_without_a_failed_or_mixed_reply(
    toy_repository, triton, start_sidecar
):
    toy_repository.publish(FIRST, seed=1)
    running = start_sidecar(toy_repository, triton.grpc_url)
    client, repository = running.client, toy_repository.repository
    with Load(running.sidecar.address, toy_repository.toys) as load:
        until(lambda: FIRST in load.seen, load.is_sound)

        second = toy_repository.publish(2026010201, seed=2, activate=False).number
        assert client.activate(second) == second
        until(lambda: second in load.seen, load.is_sound)

        third = toy_repository.publish(2026010301, seed=3, activate=False).number
        damaged = repository.path(third) / "item_table" / "vectors.bin"
        kept = damaged.read_bytes()
        damaged.write_bytes(kept[:-1])
        with pytest.raises(ReleaseError, match=r"vectors\.bin"):
            client.activate(third)
        assert client.releases().serving == second
        damaged.write_bytes(kept)

        # Two at once: both are served in turn, and pointer and sidecar agree in the end.
        rivals = [threading.Thread(target=client.activate, args=(n,)) for n in (FIRST, third)]
        for rival in rivals:
            rival.start()
        for rival in rivals:
            rival.join()
        serving = client.releases().serving
        assert serving in (FIRST, third) and repository.current() == serving

        client.activate(third)
        until(lambda: third in load.seen, load.is_sound)
        assert client.roll_back() in (FIRST, second)
        client.activate(third)
        repository.prune(1)
        assert third in repository.numbers()
        fourth = toy_repository.publish(2026010401, seed=4).number
        until(lambda: fourth in load.seen, load.is_sound)
        replies = load.replies
        until(lambda: load.replies > replies + 50, load.is_sound)
    assert load.failures == []
    assert {FIRST, second, third, fourth} <= load.seen
    codes = {
        sample.labels["code"]
        for metric in running.sidecar.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "hiertcn_requests_total"
        and sample.labels["method"] == "Recommend"
        and sample.value
    }
    assert codes == {"OK"}


def test_what_a_sidecar_serves_is_not_pruned_though_the_pointer_has_moved_on(
    toy_repository, triton, start_sidecar
):
    toy_repository.publish(FIRST, seed=1)
    running = start_sidecar(toy_repository, triton.grpc_url)
    repository = toy_repository.repository
    # Two releases that the sidecar refuses, so it stays behind.
    for number in (2026010201, 2026010301):
        toy_repository.publish(number, seed=2)
        repository.model_path("tcn", number).write_bytes(b"")
    until(lambda: running.value("hiertcn_activations_total", result="refused") >= 1)
    assert repository.prune(1) == []
    assert FIRST in repository.numbers()
    good = toy_repository.publish(2026010401, seed=4)
    until(lambda: running.client.recommend("user-0").release == good.number)
    again = toy_repository.publish(2026010501, seed=5)
    until(lambda: running.client.recommend("user-0").release == again.number)
    # Neither current nor previous any more, for the repository and for the sidecar.
    assert FIRST in repository.prune(1)
    running.stop()


def test_a_sidecar_whose_release_was_deleted_still_follows_to_the_next(
    toy_repository, triton, start_sidecar
):
    toy_repository.publish(FIRST, seed=1)
    running = start_sidecar(toy_repository, triton.grpc_url)
    repository = toy_repository.repository
    shutil.rmtree(repository.path(FIRST))
    for model in ("tcn", "gru_step"):
        shutil.rmtree(repository.model_path(model, FIRST).parent)
    assert running.client.recommend("user-0").release == FIRST
    second = toy_repository.publish(2026010201, seed=2)
    until(lambda: running.client.recommend("user-0").release == second.number)
    assert not running.client.recommend("user-0").fallback
    running.run(running.sidecar.warmer.kept())
    assert running.value("hiertcn_warming") == 0
