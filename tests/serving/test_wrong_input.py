"""What is sent wrongly is refused in one sentence: the field, what it was and what was expected."""

import grpc
import pytest

from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.security.access import Access
from tests.waiting import WAIT_S, patient_client

RECOMMENDER, READER = "/hiertcn.v1.Recommender", "r" * 32
T0_S = 1_767_225_600


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"read,write {READER}\n")
    return path


@pytest.fixture
def refusal(shared_toy, start_sidecar, token_file):
    """Sends bytes to a method of a sidecar; returns the status and the sentence that come back."""
    running = start_sidecar(shared_toy, "", models="in-process", token_file=token_file)
    with grpc.insecure_channel(running.sidecar.address) as channel:

        def refused(method, data, token=READER):
            metadata = [("authorization", f"Bearer {token}")] if token else []
            call = channel.unary_unary(method)
            with pytest.raises(grpc.RpcError) as caught:
                call(data, timeout=WAIT_S, metadata=metadata)
            return caught.value.code(), caught.value.details()

        yield refused
    # Whatever was sent, it still answers.
    with patient_client(running.sidecar.address, access=Access(token_file=token_file)) as client:
        assert client.recommend("ada").items


def test_times_in_another_unit_are_refused(refusal):
    for unit in (1, 1000):
        time_us = T0_S * unit
        said = f"timestamp_us is {time_us}, before March 1973 and so rather seconds or milliseconds"
        request = pb.RecommendRequest(user_id="ada", timestamp_us=time_us).SerializeToString()
        code, found = refusal(f"{RECOMMENDER}/Recommend", request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert found.startswith(f"{said}; expected microseconds since 1970-01-01 UTC (now is ")
        interaction = pb.Interaction(user_id="ada", item_id="item-1", timestamp_us=time_us)
        request = pb.RecordInteractionsRequest(interactions=[interaction]).SerializeToString()
        code, found = refusal(f"{RECOMMENDER}/RecordInteractions", request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert found.startswith(f"interactions[0].{said}")


def test_text_that_is_not_utf8_is_named(refusal):
    user = pb.RecommendRequest(user_id="??").SerializeToString()
    candidates = pb.RecommendRequest(user_id="a", k=3, candidates=["b", "?" * 50])
    interactions = pb.RecordInteractionsRequest(
        interactions=[pb.Interaction(user_id="a", item_id="b"), pb.Interaction(item_id="?")]
    )
    items = pb.UpsertItemsRequest(
        items=[pb.NewItem(item_id="a", attributes={"?": pb.AttributeValue(number=3.5)})]
    )
    for method, request, said in (
        ("Recommend", user, r"user_id is b'\xff\xff'"),
        ("Recommend", candidates.SerializeToString(), "candidates[1] is b'" + r"\xff" * 40 + "'…"),
        ("RecordInteractions", interactions.SerializeToString(), "interactions[1].item_id is b'"),
        ("UpsertItems", items.SerializeToString(), r"items[0].attributes[0].key is b'\xff'"),
    ):
        code, found = refusal(f"{RECOMMENDER}/{method}", request.replace(b"?", b"\xff"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert found.startswith(said)
        assert found.endswith(", which is not UTF-8; expected text")


def test_what_is_no_message_at_all_is_called_that(refusal):
    for data in (b"\xff\xff", b"\x80" * 20, b"\x0a\x05a", b"\x0b", b"\x1a", b"\x09\x01"):
        code, found = refusal(f"{RECOMMENDER}/Recommend", data)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert found == (
            f"the request is not a hiertcn.v1.RecommendRequest message ({len(data)} bytes); "
            "build it from recommender.proto"
        )


def test_a_message_of_very_many_fields_is_not_searched_to_its_end(refusal):
    listed = pb.RecommendRequest(candidates=["a"] * 30_000).SerializeToString()
    user = pb.RecommendRequest(user_id="?").SerializeToString().replace(b"?", b"\xff")
    code, found = refusal(f"{RECOMMENDER}/Recommend", listed + user)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "is not a hiertcn.v1.RecommendRequest message" in found


def test_unknown_methods_are_named_to_whoever_calls_them(refusal):
    for token in (READER, None, "0" * 32):
        for method in (f"{RECOMMENDER}/Recomend", "/hiertcn.v2.Recommender/Recommend", "/x/y"):
            code, found = refusal(method, b"\xff", token)
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert found.startswith(
                f"the method {method!r} is unknown; expected /SERVICE/METHOD of"
            )
            assert "hiertcn.v1.Recommender, hiertcn.v1.Releases" in found
