"""Candidates taken off the wire equal those that protobuf parses, whatever is sent."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.ranking.candidate_ranking import drop_repeats
from hiertcn.serving.rpc.listed_candidates import received_recommend
from hiertcn.serving.rpc.validation import MAX_LISTED_ITEMS

IDS = st.text(alphabet="abc-7é€", min_size=0, max_size=6)


@st.composite
def messages(draw):
    return pb.RecommendRequest(
        user_id=draw(st.text(max_size=5)),
        candidates=draw(st.lists(IDS, max_size=8)),
        exclude=draw(st.lists(IDS, max_size=3)),
        timestamp_us=draw(st.integers(-(2**63), 2**63 - 1)),
        candidates_only=draw(st.booleans()),
        deadline_ms=draw(st.integers(0, 1000)),
        filters=[pb.Filter(column="c", any_of=draw(st.lists(IDS, max_size=2)))],
    )


def whole(received):
    """The message as it was, whichever way its candidates came."""
    if received.candidates is None:
        return received.message
    assert not received.message.candidates
    message = pb.RecommendRequest()
    message.CopyFrom(received.message)
    texts = received.candidates
    message.candidates.extend(texts[place] for place in range(len(texts)))
    return message


@given(message=messages())
def test_every_message_arrives_whole(message):
    received = received_recommend(message.SerializeToString())
    assert whole(received) == message
    ordinary = all(one.isascii() and one for one in message.candidates)
    assert (received.candidates is not None) == (bool(message.candidates) and ordinary)


@given(parts=st.lists(messages(), max_size=3), unknown=st.binary(max_size=12))
def test_scattered_and_unknown_fields_are_read_as_protobuf_reads_them(parts, unknown):
    # Field 100, length-delimited, then the fields again: the last one counts, lists go on.
    data = b"".join(part.SerializeToString() for part in parts)
    data += bytes([0xA2, 0x06, len(unknown)]) + unknown
    assert whole(received_recommend(data)) == pb.RecommendRequest.FromString(data)


@settings(max_examples=300)
@given(data=st.one_of(st.binary(max_size=40), messages().map(lambda one: one.SerializeToString())))
def test_what_protobuf_refuses_is_refused(data):
    for cut in (data, data[:-1], b"\x1a\xff\xff\xff\xff\x7f" + data):
        try:
            expected = pb.RecommendRequest.FromString(cut)
        except DecodeError:
            assert isinstance(received_recommend(cut), InputError)
        else:
            assert whole(received_recommend(cut)) == expected


@pytest.mark.parametrize(
    "candidates", [["x" * 513], ["a"] * (MAX_LISTED_ITEMS + 1), ["", "a"]], ids=len
)
def test_candidates_that_break_a_rule_are_left_for_the_checks(candidates):
    message = pb.RecommendRequest(user_id="u", candidates=candidates)
    received = received_recommend(message.SerializeToString())
    assert received.candidates is None
    assert received.message == message


@given(lists=st.lists(st.lists(st.integers(-1, 300), max_size=80), min_size=1, max_size=4))
def test_repeats_are_dropped_within_a_request_only(lists):
    rows = np.array([row for one in lists for row in one], np.int64)
    drop_repeats(rows, np.cumsum([0, *map(len, lists)]))
    expected = []
    for one in lists:
        expected += [row if one.index(row) == place else -1 for place, row in enumerate(one)]
    assert rows.tolist() == expected
