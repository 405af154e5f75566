"""Filters, seen items, deadlines, streams and refusals over real gRPC on the real Triton."""

import concurrent.futures
import contextlib
import datetime
import itertools
import os
import signal
import socket
import time

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiertcn.cli.filters import read_filters
from hiertcn.errors import DeadlineError, InputError, OverloadError, ServingError
from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.client import Filter, Interaction, RecommenderClient
from hiertcn.serving.inference.breaker import CircuitBreaker
from hiertcn.serving.releases.serving_release import ServingRelease
from tests.waiting import WAIT_S, patient_async_client, patient_client, until

NUMBER = 2026010101
T0 = 1_767_225_600_000_000 + 3600 * 1_000_000
ITEMS = 50
COLOURS = ("red", "blue", None)


@pytest.fixture(scope="module")
def shared_toy(new_toys, tmp_path_factory):
    """A release whose items have attributes; the last two are not in the items file."""
    folder = tmp_path_factory.mktemp("filtered")
    rows = np.arange(ITEMS - 2)
    items = pa.table(
        {
            "item_id": [f"item-{row}" for row in rows],
            "title": [f"The item {row}" for row in rows],
            "colour": [COLOURS[row % 3] for row in rows],
            "price": rows / 2,
            "new": rows % 2 == 0,
            "added": [datetime.date(2026, 1, 1 + row % 10) for row in rows],
        }
    )
    pq.write_table(items, folder / "items.parquet")
    toys = new_toys(folder / "repository")
    toys.publish(NUMBER, items_file=folder / "items.parquet")
    return toys


@pytest.fixture
def running(shared_toy, shared_triton, start_sidecar):
    return start_sidecar(shared_toy, shared_triton.grpc_url)


@pytest.fixture
def client(running):
    return running.client


@pytest.fixture
def toy(shared_toy):
    return shared_toy.toys[NUMBER]


def ids(found):
    return [item.item_id for item in found.items]


def passing(*conditions):
    """Ids of the items for which all conditions on (row, in the items file) hold."""
    return {
        f"item-{row}"
        for row in range(ITEMS)
        if all(condition(row, row < ITEMS - 2) for condition in conditions)
    }


CASES = [
    ([Filter(column="colour", any_of=["red"])], lambda row, has: has and row % 3 == 0),
    ([Filter(column="colour", any_of=["red", "blue"])], lambda row, has: has and row % 3 < 2),
    ([Filter(column="colour", none_of=["red"])], lambda row, has: not (has and row % 3 == 0)),
    ([Filter(column="price", min=5, max=7.5)], lambda row, has: 10 <= row <= 15),
    (
        [Filter(column="new", any_of=[True]), Filter(column="price", max=10)],
        lambda row, has: row % 2 == 0 and row <= 20,
    ),
    (
        [Filter(column="added", min=datetime.date(2026, 1, 3), max=datetime.date(2026, 1, 4))],
        lambda row, has: has and row % 10 in (2, 3),
    ),
    ([Filter(column="title", any_of=["The item 7"])], lambda row, has: row == 7),
]


@pytest.mark.parametrize(("filters", "condition"), CASES)
def test_filters_hold_for_catalogue_and_candidates(client, toy, filters, condition):
    allowed = passing(condition)
    order = toy.best(toy.scores(toy.states["user-1"]), ITEMS)
    found = client.recommend("user-1", k=ITEMS, filters=filters, timestamp_us=T0)
    assert ids(found) == [item for item in order if item in allowed]
    assert not found.fallback and found.unknown_items == []
    candidates = order[10:40]
    found = client.recommend(
        "user-1", k=ITEMS, filters=filters, candidates=candidates, timestamp_us=T0
    )
    assert ids(found) == [item for item in candidates if item in allowed]


def test_filters_fill_k_and_may_leave_nothing(client, toy):
    order = toy.best(toy.scores(toy.states["user-2"]), ITEMS)
    is_third = passing(lambda row, has: has and row % 3 == 0)
    red = [item for item in order if item in is_third]
    is_red = Filter(column="colour", any_of=["red"])
    found = client.recommend("user-2", k=5, filters=[is_red], exclude=red[:4], timestamp_us=T0)
    assert ids(found) == red[4:9]
    nothing = client.recommend("user-2", filters=[Filter(column="price", min=1000)])
    assert (nothing.items, nothing.release) == ([], NUMBER)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (
            [pb.Filter(column="new", any_of=["true"]), pb.Filter(column="size", any_of=["1"])],
            r"filters\[1\]\.column is 'size'; the columns to filter by are title, colour, price",
        ),
        ([pb.Filter(column="price", min="cheap")], r"filters\[0\]\.min is 'cheap'; expected a de"),
        ([pb.Filter(column="colour", max="red")], r"filters\[0\]\.max is 'red' but the column"),
        ([pb.Filter(column="colour")], r"filters\[0\] has no condition on 'colour'"),
        ([pb.Filter(any_of=["red"])], r"filters\[0\]\.column is empty"),
        ([pb.Filter(column="price", min="")], r"filters\[0\]\.min is empty"),
        ([pb.Filter(column="colour", any_of=["a"] * 1001)], r"filters\[0\]\.any_of lists 1001 va"),
        ([pb.Filter(column="colour", none_of=["a" * 600])], r"filters\[0\]\.none_of\[0\] has 600"),
        ([pb.Filter(column="new", any_of=["true"])] * 17, "filters lists 17; expected at most 16"),
    ],
)
def test_bad_filters_name_their_place(client, filters, message):
    request = pb.RecommendRequest(user_id="ada", filters=filters)
    with pytest.raises(grpc.RpcError, match=message) as caught:
        client._recommender.Recommend(request, timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_release_without_attributes_refuses_filters(toy_repository):
    toy_repository.publish(NUMBER)
    release = ServingRelease(toy_repository.repository, NUMBER)
    with pytest.raises(InputError, match="the serving release has no item attributes"):
        release.filters.allowed([AttributeFilter(column="colour", any_of=("red",))])


def test_seen_items_are_left_out_when_asked(client, toy):
    last = "user-7"  # the snapshot holds item-1 and item-2 of its history
    client.record([Interaction(last, "item-9", T0), Interaction(last, "novelty", T0 + 1)])
    seen = {"item-1", "item-2", "item-9"}
    plain = client.recommend(last, k=ITEMS, timestamp_us=T0 + 2)
    assert seen <= set(ids(plain))
    found = client.recommend(last, k=ITEMS, exclude_seen=True, timestamp_us=T0 + 2)
    assert ids(found) == [item for item in ids(plain) if item not in seen]
    found = client.recommend(
        last, candidates=["item-9", "item-3"], exclude_seen=True, timestamp_us=T0 + 2
    )
    assert ids(found) == ["item-3"]
    stranger = client.recommend("nobody", k=ITEMS, exclude_seen=True)
    assert len(stranger.items) == ITEMS


def test_the_filter_option_reads_conditions():
    texts = ["colour=red", "colour=dark blue", "price>=5", "price<=7.5", "title!=a=b"]
    assert read_filters(texts) == [
        Filter(column="colour", any_of=["red", "dark blue"]),
        Filter(column="price", any_of=(), min="5", max="7.5"),
        Filter(column="title", none_of=["a=b"]),
    ]
    for text in ("colour", "=red", "price>5", "colour="):
        with pytest.raises(InputError, match=r"--filter .* was not understood"):
            read_filters([text])
    with pytest.raises(InputError, match="bounds 'price' by both '1' and '2'"):
        read_filters(["price>=1", "price>=2"])


def batches(user, count, size=10):
    places = itertools.count()
    for _ in range(count):
        yield [Interaction(user, f"item-{n % 50}", T0 + n) for n in itertools.islice(places, size)]


def test_a_stream_records_every_batch_once_and_answers_in_order(running):
    client = running.client
    client.record(list(batches("ada", 3))[1])
    results = list(client.record_stream(batches("ada", 40)))
    assert [(one.accepted, one.duplicates) for one in results] == [
        (0, 10) if n == 1 else (10, 0) for n in range(40)
    ]
    assert len(client.get_user("ada").journal) == 400

    async def record():
        async with patient_async_client(running.sidecar.address) as asyncio_client:
            return [one async for one in asyncio_client.record_stream(batches("bob", 40))]

    assert sum(one.accepted for one in running.run(record())) == 400


def test_each_streamed_batch_is_answered_before_the_next_is_sent(running):
    answered = []

    def lockstep():
        for n, batch in enumerate(batches("eve", 5)):
            until(lambda n=n: len(answered) >= n)
            yield batch

    for result in running.client.record_stream(lockstep(), timeout_s=WAIT_S):
        answered.append(result)
    assert len(answered) == 5


def test_a_bad_batch_ends_the_stream_and_names_the_field(client):
    good = list(batches("ada", 2))
    bad = [Interaction("ada", "", T0)]
    results = []
    with pytest.raises(InputError, match=r"interactions\[0\]\.item_id is empty"):
        results.extend(client.record_stream([*good, bad]))
    assert len(client.get_user("ada").journal) == 20
    with pytest.raises(InputError, match="cannot be sent"):
        list(client.record_stream([*good, [Interaction(7, "item-1", T0)]]))


def test_a_broken_stream_goes_on_where_it_was(shared_toy, shared_triton, start_sidecar):
    """The sidecar is stopped and started on the same port and state in the middle of a stream."""
    running = start_sidecar(shared_toy, shared_triton.grpc_url, drain_s=0.0)

    def interrupted():
        for n, batch in enumerate(batches("ada", 30)):
            if n == 15:
                running.stop()
                start_sidecar(shared_toy, shared_triton.grpc_url, port=running.sidecar.port)
            yield batch

    patient = CircuitBreaker(failures=1000)
    with patient_client(running.sidecar.address, breaker=patient) as client:
        results = list(client.record_stream(interrupted(), timeout_s=60))
        assert len(results) == 30
        assert sum(one.accepted + one.duplicates for one in results) == 300
        journal = client.get_user("ada").journal
    assert [entry.timestamp_us for entry in journal] == [T0 + n for n in range(300)]


def test_a_caller_out_of_time_is_told_so(running):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            RecommenderClient(address, timeout_s=0.1) as client,
            pytest.raises(DeadlineError, match="did not answer in time"),
        ):
            client.recommend("ada")
    with pytest.raises(InputError, match="deadline_ms is -1"):
        running.client.recommend("ada", deadline_ms=-1)


def test_the_clients_breaker_fails_fast_and_lets_one_call_try_again(running):
    class Clock:
        now = 0.0

    breaker = CircuitBreaker(failures=2, open_s=1.0, clock=lambda: Clock.now)
    for _ in range(2):
        with (
            RecommenderClient("127.0.0.1:1", timeout_s=0.2, breaker=breaker) as client,
            pytest.raises(ServingError, match="did not answer"),
        ):
            client.recommend("ada")
    with patient_client(running.sidecar.address, breaker=breaker) as client:
        with pytest.raises(ServingError, match="is not asked for a moment"):
            client.recommend("ada")
        Clock.now = 1.5
        assert client.recommend("ada").items
        assert client.recommend("ada").items

    async def ask():
        breaker.failed()
        breaker.failed()
        async with patient_async_client(running.sidecar.address, breaker=breaker) as client:
            with pytest.raises(ServingError, match="is not asked for a moment"):
                await client.recommend("ada")

    running.run(ask())


@contextlib.contextmanager
def stopped(triton):
    """Triton's processes, its models' too, as if they hung."""
    os.killpg(triton.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(triton.pid, signal.SIGCONT)


def test_a_hung_triton_is_not_waited_for_beyond_the_deadline(
    shared_toy, shared_triton, start_sidecar, toy
):
    running = start_sidecar(shared_toy, shared_triton.grpc_url, model_deadline_s=WAIT_S)
    client = running.client
    client.record([Interaction("ada", "item-1", T0)])
    expected = client.recommend("ada", timestamp_us=T0)
    with stopped(shared_triton):
        # The last embedding ranks, though it has not seen the newest interaction.
        client.record([Interaction("ada", "item-5", T0 + 1)])
        began = time.monotonic()
        found = client.recommend("ada", deadline_ms=100, timestamp_us=T0 + 1)
        assert found.fallback and found.items == expected.items
        by_session = client.recommend("user-7", deadline_ms=100, timestamp_us=T0)
        assert by_session.fallback
        stranger = client.recommend(
            "nobody", deadline_ms=100, filters=[Filter(column="colour", any_of=["red"])]
        )
        assert time.monotonic() - began < WAIT_S, "the model's own deadline"
        red = passing(lambda row, has: has and row % 3 == 0)
        order = [item for item in toy.best(toy.popularity, ITEMS) if item in red]
        assert stranger.fallback and ids(stranger) == order[:10]
    for ranking, count in (("embedding", 1), ("popularity", 1)):
        assert running.value("hiertcn_fallbacks_total", ranking=ranking) == count


def test_the_breaker_opens_on_a_hung_triton_and_closes_when_it_is_back(
    shared_toy, shared_triton, start_sidecar
):
    running = start_sidecar(shared_toy, shared_triton.grpc_url, model_deadline_s=0.15)
    client = running.client
    until(lambda: not client.recommend("ada").fallback)
    with stopped(shared_triton), concurrent.futures.ThreadPoolExecutor(8) as pool:
        users = (f"user-{n % 8}" for n in itertools.count())
        until(
            lambda: (
                all(one.fallback for one in pool.map(client.recommend, itertools.islice(users, 8)))
                and running.value("hiertcn_breaker_open", model="tcn") == 1
            )
        )
        asked = running.value("hiertcn_model_errors_total", model="tcn")
        for _ in range(20):
            assert client.recommend("ada").fallback
        # Twenty waits of 0.15 s would have made at least twenty more errors.
        assert running.value("hiertcn_model_errors_total", model="tcn") - asked < 10
    until(lambda: not client.recommend("ada").fallback)
    assert running.value("hiertcn_breaker_open", model="tcn") == 0
    for state in ("open", "closed"):
        assert running.value("hiertcn_breaker_changes_total", model="tcn", state=state) >= 1


def test_requests_over_the_bound_are_refused_and_those_within_it_answered(
    shared_toy, shared_triton, start_sidecar
):
    running = start_sidecar(shared_toy, shared_triton.grpc_url, max_in_flight=4)
    warm = running.client.recommend("ada", timestamp_us=T0)
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        with stopped(shared_triton):
            asked = [
                pool.submit(running.client.recommend, "ada", timestamp_us=T0) for _ in range(40)
            ]
            # All but the four admitted are answered while Triton hangs.
            ended = concurrent.futures.as_completed(asked, timeout=WAIT_S)
            refused = list(itertools.islice(ended, 36))
            assert {type(one.exception()) for one in refused} == {OverloadError}
            assert running.value("hiertcn_requests_in_flight", method="Recommend") == 4
            with pytest.raises(OverloadError, match="4 requests are in flight, the most"):
                running.client.recommend("ada")
            # What needs no model is not in their way.
            assert running.client.record([Interaction("bob", "item-1", T0)]).accepted == 1
            # Operators get in nevertheless.
            assert running.client.releases().serving == NUMBER
        answered = [one.result() for one in asked if one not in refused]
    assert len(answered) == 4
    for found in answered:
        assert found.fallback or found.items == warm.items
    until(lambda: running.value("hiertcn_requests_in_flight", method="Recommend") == 0)
    count = running.value("hiertcn_requests_total", method="Recommend", code="RESOURCE_EXHAUSTED")
    assert count == 37


def test_a_large_catalogue_is_searched_among_what_passes(
    shared_triton, shared_toy, start_sidecar, tmp_path
):
    """Above 20,000 items the search leaves the event loop; few and many items that pass."""
    count = 40_000
    items = pa.table(
        {
            "item_id": [f"item-{row}" for row in range(count)],
            "rare": [str(row % 1000) for row in range(count)],
            "odd": [row % 2 == 1 for row in range(count)],
        }
    )
    pq.write_table(items, tmp_path / "items.parquet")
    # Beside the running Triton's release, so that it serves the models of both.
    toy = shared_toy.publish(
        2026010102, seed=3, items=count, items_file=tmp_path / "items.parquet", activate=False
    )
    running = start_sidecar(shared_toy, shared_triton.grpc_url)
    client = running.client
    client.activate(toy.number)
    try:
        scores = toy.scores(toy.states["user-1"])
        order = np.argsort(-scores, kind="stable")
        for filters, passes in (
            ([Filter(column="rare", any_of=["7"])], order % 1000 == 7),
            ([Filter(column="odd", any_of=[True])], order % 2 == 1),
        ):
            excluded = [toy.item_ids[row] for row in order[passes][:3]]
            found = client.recommend("user-1", filters=filters, exclude=excluded, timestamp_us=T0)
            best = scores[order[passes][3:13]]
            np.testing.assert_allclose([one.score for one in found.items], best, atol=1e-4)
            assert not found.fallback and not set(excluded) & set(ids(found))
        nobody = client.recommend("user-1", filters=[Filter(column="rare", any_of=["none"])])
        assert nobody.items == []
    finally:
        client.roll_back()
