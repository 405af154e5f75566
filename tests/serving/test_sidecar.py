"""The sidecar over real gRPC on the real Triton: what a caller may rely on."""

import concurrent.futures
import time
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hiertcn.errors import InputError, ServingError
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.client import Interaction, RecommenderClient
from tests.waiting import WAIT_S, patient_async_client

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
T0 = 1_767_225_600_000_000 + HOUR_US  # an hour after the toy releases' watermark
GAP_US = 1800 * SECOND_US


@pytest.fixture
def running(shared_toy, shared_triton, start_sidecar):
    return start_sidecar(shared_toy, shared_triton.grpc_url)


@pytest.fixture
def client(running) -> RecommenderClient:
    return running.client


@pytest.fixture
def toy(shared_toy):
    return shared_toy.toys[2026010101]


def assert_ranked(found, toy, expected_scores, k=10):
    assert [item.item_id for item in found.items] == toy.best(expected_scores, k)
    by_id = dict(zip(toy.item_ids, expected_scores.tolist(), strict=True))
    for item in found.items:
        assert item.score == pytest.approx(by_id[item.item_id], abs=1e-4)
    assert found.release == toy.number
    assert not found.fallback


def test_an_unknown_user_is_ranked_from_the_start_state(client, toy):
    found = client.recommend("nobody", timestamp_us=T0)
    assert_ranked(found, toy, toy.scores(toy.start_state))


def test_a_known_user_is_ranked_from_the_snapshot(client, toy):
    found = client.recommend("user-0", k=20, timestamp_us=T0)
    assert_ranked(found, toy, toy.scores(toy.states["user-0"]), k=20)


def test_recorded_interactions_enter_the_open_session(client, toy):
    client.record([Interaction("ada", "item-3", T0), Interaction("ada", "item-4", T0 + SECOND_US)])
    found = client.recommend("ada", timestamp_us=T0 + 2 * SECOND_US)
    assert_ranked(found, toy, toy.scores(toy.start_state, "item-3", "item-4"))


def test_an_idle_session_is_folded_once_and_stays_folded(running, toy):
    client = running.client
    client.record([Interaction("ada", "item-3", T0), Interaction("ada", "item-4", T0 + 1)])
    expected = toy.scores(toy.step(toy.start_state, "item-3", "item-4"))
    for _ in range(3):
        found = client.recommend("ada", timestamp_us=T0 + 2 * GAP_US)
        assert_ranked(found, toy, expected)
    user = client.get_user("ada")
    assert user.folded_until_us == T0 + 1
    assert user.open_session == []
    assert running.value("hiertcn_sessions_folded_total") == 1


def test_sessions_recorded_at_once_are_cut_by_the_gap(client, toy):
    client.record(
        [
            Interaction("ada", "item-1", T0),
            Interaction("ada", "item-2", T0 + GAP_US),
            Interaction("ada", "item-3", T0 + 2 * GAP_US + 1),
            Interaction("ada", "item-4", T0 + 4 * GAP_US),
        ]
    )
    state = toy.step(toy.start_state, "item-1", "item-2")
    state = toy.step(state, "item-3")
    found = client.recommend("ada", timestamp_us=T0 + 4 * GAP_US)
    assert_ranked(found, toy, toy.scores(state, "item-4"))


def test_the_snapshots_open_session_goes_on(client, toy):
    last = "user-7"
    client.record([Interaction(last, "item-9", toy.watermark_us + SECOND_US)])
    found = client.recommend(last, timestamp_us=toy.watermark_us + 2 * SECOND_US)
    assert_ranked(found, toy, toy.scores(toy.states[last], "item-1", "item-2", "item-9"))


def test_an_interaction_out_of_order_is_put_in_its_place(client, toy):
    client.record([Interaction("ada", "item-1", T0), Interaction("ada", "item-3", T0 + 2 * GAP_US)])
    client.record([Interaction("ada", "item-2", T0 + GAP_US)])
    found = client.recommend("ada", timestamp_us=T0 + 2 * GAP_US)
    assert_ranked(found, toy, toy.scores(toy.start_state, "item-1", "item-2", "item-3"))


def test_an_interaction_that_joins_a_folded_session_folds_it_again(client, toy):
    client.record([Interaction("ada", "item-1", T0)])
    client.recommend("ada", timestamp_us=T0 + 3 * GAP_US)
    assert client.record([Interaction("ada", "item-2", T0 + GAP_US)]).late == 0
    found = client.recommend("ada", timestamp_us=T0 + 3 * GAP_US)
    assert_ranked(found, toy, toy.scores(toy.step(toy.start_state, "item-1", "item-2")))


def test_a_late_interaction_is_kept_but_not_folded(running, toy):
    client = running.client
    client.record([Interaction("ada", "item-1", T0 + SECOND_US)])
    before = client.recommend("ada", timestamp_us=T0 + 3 * GAP_US)
    result = client.record([Interaction("ada", "item-2", T0)])
    assert (result.accepted, result.late) == (1, 1)
    assert client.recommend("ada", timestamp_us=T0 + 3 * GAP_US).items == before.items
    journal = client.get_user("ada").journal
    assert [(entry.item_id, entry.late) for entry in journal] == [
        ("item-2", True),
        ("item-1", False),
    ]
    assert running.value("hiertcn_interactions_total", outcome="late") == 1


def test_an_interaction_before_the_watermark_is_late(client, toy):
    result = client.record([Interaction("ada", "item-2", toy.watermark_us)])
    assert (result.accepted, result.late) == (1, 1)
    found = client.recommend("ada", timestamp_us=T0)
    assert_ranked(found, toy, toy.scores(toy.start_state))


def test_duplicates_are_acknowledged_once(client):
    interaction = Interaction("ada", "item-1", T0)
    assert client.record([interaction, interaction]).accepted == 1
    again = client.record([interaction, Interaction("ada", "item-2", T0)])
    assert (again.accepted, again.duplicates) == (1, 1)
    assert len(client.get_user("ada").journal) == 2


def test_an_idempotency_key_counts_once_per_user(client):
    first = client.record([Interaction("ada", "item-1", T0, "order-7")])
    retry = client.record([Interaction("ada", "item-1", T0 + 5, "order-7")])
    other = client.record([Interaction("bob", "item-1", T0, "order-7")])
    assert (first.accepted, retry.accepted, retry.duplicates, other.accepted) == (1, 0, 1, 1)


def test_unknown_items_are_reported_logged_and_skipped(running, toy):
    client = running.client
    result = client.record([Interaction("ada", "novelty", T0), Interaction("ada", "item-1", T0)])
    assert (result.accepted, result.unknown_items) == (2, ["novelty"])
    found = client.recommend(
        "ada", candidates=["item-2", "nothing", "item-3"], exclude=["nil"], timestamp_us=T0
    )
    assert set(found.unknown_items) == {"nothing", "nil"}
    scores = toy.scores(toy.start_state, "item-1")
    assert found.items[0].score == pytest.approx(scores[toy.rows("item-2", "item-3")].max())
    assert [entry.known_item for entry in client.get_user("ada").journal] == [False, True]


def test_candidates_are_ranked_and_excluded_ones_left_out(client, toy):
    candidates = [f"item-{n}" for n in range(20, 40)]
    found = client.recommend("user-1", k=1000, candidates=candidates, exclude=["item-25"])
    scores = toy.scores(toy.states["user-1"])
    expected = sorted(
        (item for item in candidates if item != "item-25"),
        key=lambda item: -scores[toy.rows(item)[0]],
    )
    assert [item.item_id for item in found.items] == expected


def test_no_candidate_left_gives_an_empty_reply(client, toy):
    for candidates in ([], ["nothing"], ["item-1"]):
        found = client.recommend("user-1", candidates=candidates, exclude=["item-1"])
        assert found.items == []
        assert found.release == toy.number


def test_repeated_candidates_are_returned_once(client):
    found = client.recommend("user-1", candidates=["item-1", "item-2", "item-1"])
    assert sorted(item.item_id for item in found.items) == ["item-1", "item-2"]


def test_retrieval_fills_k_beyond_the_excluded(client, toy):
    scores = toy.scores(toy.states["user-2"])
    best = toy.best(scores, 30)
    found = client.recommend("user-2", k=10, exclude=best[:20])
    assert [item.item_id for item in found.items] == best[20:]
    everything = client.recommend("user-2", k=1000)
    assert len(everything.items) == len(toy.item_ids)


def test_long_sessions_send_their_newest_part(client, toy):
    interactions = [Interaction("ada", f"item-{n % 50}", T0 + n) for n in range(300)]
    client.record(interactions)
    found = client.recommend("ada", timestamp_us=T0 + 300)
    newest = [interaction.item_id for interaction in interactions[-128:]]
    assert_ranked(found, toy, toy.scores(toy.start_state, *newest))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.RecommendRequest(user_id=""), "user_id"),
        (pb.RecommendRequest(user_id="x" * 513), "user_id"),
        (pb.RecommendRequest(user_id="a", k=0), "k "),
        (pb.RecommendRequest(user_id="a", k=1001), "k "),
        (pb.RecommendRequest(user_id="a", k=-1), "k "),
        (pb.RecommendRequest(user_id="a", candidates=["b", ""]), "candidates[1]"),
        (pb.RecommendRequest(user_id="a", candidates=["b"] * 10001), "candidates"),
        (pb.RecommendRequest(user_id="a", exclude=["\N{SNOWMAN}" * 171]), "exclude[0]"),
        (pb.RecommendRequest(user_id="a", timestamp_us=-1), "timestamp_us"),
        (pb.RecommendRequest(user_id="a", timestamp_us=2**62), "timestamp_us"),
    ],
)
def test_bad_recommend_requests_name_the_field(client, request_, field):
    with pytest.raises(grpc.RpcError) as caught:
        client._recommender.Recommend(request_, timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(field)


@pytest.mark.parametrize(
    ("interaction", "field"),
    [
        (Interaction("", "item-1", T0), "interactions[1].user_id"),
        (Interaction("ada", "", T0), "interactions[1].item_id"),
        (Interaction("ada", "item-1", -5), "interactions[1].timestamp_us"),
        (Interaction("ada", "item-1", T0, "k" * 600), "interactions[1].idempotency_key"),
        (Interaction("ada", "item-1", T0, "", "t" * 600), "interactions[1].event_type"),
    ],
)
def test_one_bad_interaction_refuses_the_whole_request(client, interaction, field):
    with pytest.raises(InputError) as caught:
        client.record([Interaction("ada", "item-1", T0), interaction])
    assert str(caught.value).startswith(field)
    assert client.get_user("ada") is None


def test_a_future_interaction_is_refused_and_a_soon_one_is_not(client):
    day_us = 24 * HOUR_US
    now_us = time.time_ns() // 1000
    with pytest.raises(InputError, match=r"interactions\[0\]\.timestamp_us .* one day"):
        client.record([Interaction("ada", "item-1", now_us + day_us + HOUR_US)])
    assert client.record([Interaction("ada", "item-1", now_us + day_us - HOUR_US)]).accepted == 1
    with pytest.raises(InputError, match="interactions is empty"):
        client.record([])


def test_a_deleted_user_starts_afresh(client, toy):
    client.record([Interaction("user-3", "item-1", T0)])
    assert client.delete_user("user-3")
    assert client.get_user("user-3") is None
    assert not client.delete_user("user-3")
    assert not client.delete_user("never seen")
    assert_ranked(client.recommend("user-3", timestamp_us=T0), toy, toy.scores(toy.start_state))
    client.record([Interaction("user-3", "item-5", T0 + SECOND_US)])
    found = client.recommend("user-3", timestamp_us=T0 + SECOND_US)
    assert_ranked(found, toy, toy.scores(toy.start_state, "item-5"))


def test_concurrent_requests_share_model_calls_and_stay_apart(running, toy):
    client = running.client
    users = [f"c{n}" for n in range(64)]
    sessions = {
        user: [f"item-{(n * 7 + step) % 50}" for step in range(n % 11)]
        for n, user in enumerate(users)
    }
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda user: [
                    client.record([Interaction(user, item, T0 + step)])
                    for step, item in enumerate(sessions[user])
                ],
                users,
            )
        )
        found = list(pool.map(lambda user: client.recommend(user, timestamp_us=T0 + 20), users))
    for user, reply in zip(users, found, strict=True):
        assert_ranked(reply, toy, toy.scores(toy.start_state, *sessions[user]))
    calls = running.value("hiertcn_model_batch_count", model="tcn")
    assert calls < running.value("hiertcn_model_batch_sum", model="tcn") == len(users)
    groups = running.value("hiertcn_commit_batch_count")
    assert groups < running.value("hiertcn_commit_batch_sum")


def test_one_users_concurrent_interactions_are_each_recorded_once(client):
    interactions = [Interaction("ada", f"item-{n % 50}", T0 + n // 2) for n in range(100)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda one: client.record([one]), interactions * 2))
    assert sum(result.accepted for result in results) == 100
    assert sum(result.duplicates for result in results) == 100
    journal = client.get_user("ada").journal
    assert len(journal) == 100
    assert [entry.timestamp_us for entry in journal] == sorted(T0 + n // 2 for n in range(100))


def test_health_reflection_and_metrics(shared_toy, shared_triton, start_sidecar):
    running = start_sidecar(shared_toy, shared_triton.grpc_url, metrics_port=0)
    running.client.recommend("ada")
    with grpc.insecure_channel(running.sidecar.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        reply = health.Check(health_pb2.HealthCheckRequest(service="hiertcn.v1.Recommender"))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        listed = next(
            reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
        )
        names = {service.name for service in listed.list_services_response.service}
        assert {"hiertcn.v1.Recommender", "hiertcn.v1.Releases"} <= names
    url = f"http://127.0.0.1:{running.sidecar.metrics_port}/metrics"
    with urllib.request.urlopen(url) as page:
        text = page.read().decode()
    assert 'hiertcn_requests_total{code="OK",method="Recommend"} 1.0' in text
    assert "hiertcn_release 2.026010101e+09" in text


def test_the_asyncio_client_answers_alike(running, toy):
    async def ask():
        async with patient_async_client(running.sidecar.address) as client:
            await client.record([Interaction("eve", "item-8", T0)])
            return (
                await client.recommend("eve", timestamp_us=T0),
                await client.get_user("eve"),
                await client.releases(),
            )

    found, user, releases = running.run(ask())
    assert_ranked(found, toy, toy.scores(toy.start_state, "item-8"))
    assert [entry.item_id for entry in user.open_session] == ["item-8"]
    assert releases.serving == toy.number


def test_a_port_in_use_is_named(running, shared_toy, shared_triton, tmp_path):
    from hiertcn.serving.options import SidecarOptions
    from hiertcn.serving.sidecar import Sidecar

    async def start_on_the_same_port():
        await Sidecar(
            SidecarOptions(
                repository=shared_toy.root,
                triton_url=shared_triton.grpc_url,
                state_dir=tmp_path / "other",
                port=running.sidecar.port,
            )
        ).start()

    with pytest.raises(InputError, match=f"--port {running.sidecar.port} "):
        running.run(start_on_the_same_port())


def test_a_state_folder_in_use_is_named(running, shared_toy, shared_triton, start_sidecar):
    with pytest.raises(InputError, match="in use by another sidecar"):
        start_sidecar(shared_toy, shared_triton.grpc_url)


@pytest.mark.parametrize(
    "interaction",
    [
        Interaction(7, "item-1", T0),
        Interaction("ada", "\ud800", T0),
        Interaction("ada", "item-1", 2**70),
        Interaction("ada", "item-1", 0.5),
    ],
)
def test_what_cannot_be_sent_is_an_input_error(interaction):
    with RecommenderClient() as client:
        with pytest.raises(InputError, match=r"interactions\[1\] cannot be sent"):
            client.record([Interaction("ada", "item-1", T0), interaction])
        with pytest.raises(InputError, match="recommend request cannot be sent"):
            client.recommend("ada", k=2**40)


def test_no_sidecar_is_a_serving_error():
    with (
        RecommenderClient("127.0.0.1:1", timeout_s=1.0) as client,
        pytest.raises(ServingError, match=r"127\.0\.0\.1:1"),
    ):
        client.recommend("ada")
