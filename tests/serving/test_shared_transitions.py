"""What somebody just went on to ranks alike in all sidecars of a Valkey, whichever recorded it."""

import numpy as np
import pytest

from hiertcn.export.scoring_terms import export_terms
from hiertcn.serving.client import Interaction
from hiertcn.serving.live.recent_interactions import BEGAN, RecentInteractions
from hiertcn.serving.live.shared_arrivals import SharedArrivals
from hiertcn.serving.log.event_log import Position
from hiertcn.serving.stores.store_valkey import ValkeyStore
from hiertcn.sessions.live_transitions import START
from hiertcn.sessions.transitions import TransitionOptions, TransitionTable
from models.scoring_terms import ScoringTerms
from tests.waiting import until

NUMBER = 2026010101
SECOND_US = 1_000_000
T0 = 1_767_225_600_000_000 + 3600 * SECOND_US
ITEMS, USERS, MOVES = 12, 8, 12


@pytest.fixture(scope="module")
def server(start_redis):
    return start_redis()


@pytest.fixture
def start(toy_repository, start_sidecar, tmp_path):
    """Starts sidecars on a release that adds nothing but live transitions to its dot products."""

    one_pair = TransitionTable(
        options=TransitionOptions(),
        offsets=np.minimum(np.arange(ITEMS + 1), 1),
        followers=np.ones(1, np.int32),
        weights=np.ones(1, np.float32),
        totals=np.eye(1, ITEMS, dtype=np.float32)[0],
    )

    def extend(parts):
        export_terms(ScoringTerms(("live_transitions",)), parts / "scoring_terms.safetensors")
        one_pair.save(parts / "user_states" / "transitions")
        return {}

    toy_repository.publish(NUMBER, items=ITEMS, extend=extend)

    def started(name, **options):
        folder = tmp_path / name
        return start_sidecar(
            toy_repository, "", models="in-process", state_dir=folder, fsync="os", **options
        )

    return started


def walks():
    """Everybody goes from item to item, a second apart; in the order of time."""
    items = np.random.default_rng(0).integers(ITEMS, size=USERS * MOVES).tolist()
    return [
        Interaction(f"user-{n % USERS}", f"item-{item}", T0 + n * SECOND_US)
        for n, item in enumerate(items)
    ]


def begun():
    """For every item somebody whose session has it alone, so it asks for what follows that."""
    return [Interaction(f"at-{n}", f"item-{n}", T0 + 900 * SECOND_US) for n in range(ITEMS)]


def ranked(sidecar):
    """Every item's score for everybody who has just begun."""
    found = [
        sidecar.client.recommend(one.user_id, k=ITEMS, timestamp_us=one.timestamp_us + 1)
        for one in begun()
    ]
    assert not any(one.fallback for one in found)
    return np.array(
        [[dict(_pairs(one))[f"item-{n}"] for n in range(ITEMS)] for one in found], np.float32
    )


def _pairs(found):
    return [(one.item_id, one.score) for one in found.items]


def test_sidecars_that_share_users_rank_as_one_that_recorded_everything(start, server, tmp_path):
    url = f"{server.url}?prefix={tmp_path.name}"
    alone, *both = start("alone"), start("a", store=url), start("b", store=url)
    alone.client.record(begun())
    both[0].client.record(begun())
    before = ranked(alone)
    for place, one in enumerate(walks()):
        # Neighbors in a session come to different sidecars.
        both[place // USERS % 2].client.record([one])
        alone.client.record([one])
    wanted = ranked(alone)
    assert (np.abs(wanted - before) > 0.1).sum() > ITEMS
    for sidecar in both:
        until(lambda sidecar=sidecar: np.allclose(ranked(sidecar), wanted, atol=1e-4))


def test_a_sidecar_that_was_away_ranks_like_the_one_that_was_not(start, server, tmp_path):
    """More than the newest 128 from an item, so that the order tells which ones count."""
    url = f"{server.url}?prefix={tmp_path.name}"
    both = [start("a", store=url), start("b", store=url)]
    both[0].client.record(begun())
    for group in range(6):
        began = T0 + group * 100 * SECOND_US
        moves = [
            Interaction(f"user-{group}-{n}", f"item-{item}", began + n * SECOND_US)
            for n in range(50)
            for item in (0, group + 1)
        ]
        both[group % 2].client.record(moves)
        until(lambda: np.allclose(ranked(both[0]), ranked(both[1]), atol=1e-4))
    wanted = ranked(both[0])
    both[1].stop()
    again = start("b", store=url)
    np.testing.assert_allclose(ranked(again), wanted, atol=1e-4)


def test_long_groups_arrive_whole_and_own_ones_from_a_place_in_the_log_on(server, tmp_path):
    store = ValkeyStore(f"{server.url}?prefix={tmp_path.name}", "a")
    others, started_later = RecentInteractions(), RecentInteractions()
    told = [(f"item-{n}", T0 + n) for n in range(200)]
    previous = [(None, BEGAN, f"ïtem-{n}")[n % 3] for n in range(200)]
    SharedArrivals(store, "a", RecentInteractions()).tell(told, previous, [], Position(1, 90))
    SharedArrivals(store, "a", RecentInteractions()).tell([("x", T0)], ["y"], [], Position(2, 8))
    every = SharedArrivals(store, "b", others)
    late = SharedArrivals(store, "a", started_later, own_after=Position(1, 90))
    for listener in (every, late):
        listener.start()
        listener.stop()
    store.close()
    assert arrivals(others) == [*zip(told, previous, strict=True), (("x", T0), "y")]
    assert arrivals(started_later) == [(("x", T0), "y")]


def arrivals(recent):
    found, _ = recent.since(0)
    return [
        (
            (one.item_ids[code], time_us),
            one.item_ids[before] if before >= 0 else BEGAN if before == START else None,
        )
        for one in found
        for code, time_us, before in zip(
            one.codes.tolist(), one.timestamps_us.tolist(), one.previous.tolist(), strict=True
        )
    ]
