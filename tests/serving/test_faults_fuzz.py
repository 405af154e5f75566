"""Requests that nobody should send: no crash, nothing internal, and each error names the field.

``FUZZED_REQUESTS`` says how many; ``make soak`` sends ten thousand.
"""

import collections
import contextlib
import os
import random
import re
import socket
import time

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.client import Interaction
from tests.waiting import WAIT_S

NUMBER = 2026010101
T0 = 1_767_225_600_000_000 + 3_600_000_000
REQUESTS = int(os.environ.get("FUZZED_REQUESTS", "2000"))
IN_FLIGHT = 64
LARGEST = 1 << 20

TEXTS = [
    *("user-1", "item-3", "item-4", "ada", "price", "colour", "title", "red", "3.5", "true"),
    *("2026-01-02", "", " ", "\x00", "nan", "\N{SNOWMAN}" * 170, "x" * 512, "x" * 513),
    *("\N{SNOWMAN}" * 171, "\U0010ffff", "a\nb", "'; DROP TABLE users; --", "x" * 70_000, "1e999"),
]
INTEGERS = [0, 1, 2, 10, 50, 1000, 1001, T0, T0 + 1, -1, -T0, 2**31 - 1, -(2**31), 2**62, 2**63 - 1]
INTEGERS += [-(2**63), NUMBER, 77]
FLOATS = [0.0, 1.0, -1.0, 3.5, float("nan"), float("inf"), float("-inf"), 1e38, 1e300, 5e-324]
COUNTS = [0, 1, 1, 2, 3, 8]
HUGE = [129, 1001, 10_001]

METHODS = {
    "Recommender/Recommend": pb.RecommendRequest,
    "Recommender/RecordInteractions": pb.RecordInteractionsRequest,
    "Recommender/UpsertItems": pb.UpsertItemsRequest,
    "Recommender/GetUser": pb.GetUserRequest,
    "Recommender/DeleteUser": pb.DeleteUserRequest,
    "Releases/ListReleases": pb.ListReleasesRequest,
    "Releases/ActivateRelease": pb.ActivateReleaseRequest,
    "Releases/RollBackRelease": pb.RollBackReleaseRequest,
}
WEIGHTS = [45, 25, 15, 6, 3, 2, 3, 1]

ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    # A release that there is none of, items for a release without an encoder.
    grpc.StatusCode.FAILED_PRECONDITION,
}


@pytest.fixture(scope="module")
def shared_toy(new_toys, tmp_path_factory):
    """A release whose items have attributes, for filters to meet."""
    folder = tmp_path_factory.mktemp("fuzzed")
    rows = np.arange(40)
    items = pa.table(
        {
            "item_id": [f"item-{row}" for row in rows],
            "title": [f"The item {row}" for row in rows],
            "colour": [("red", "blue", None)[row % 3] for row in rows],
            "price": rows / 2,
        }
    )
    pq.write_table(items, folder / "items.parquet")
    toys = new_toys(folder / "repository")
    toys.publish(NUMBER, items_file=folder / "items.parquet")
    return toys


@pytest.fixture
def running(shared_toy, start_sidecar):
    return start_sidecar(
        shared_toy,
        "",
        models="in-process",
        fsync="os",
        max_in_flight=4096,
        max_message_bytes=LARGEST,
    )


class Fuzz:
    """Messages of any type, valid by the wire and often by no other rule; seeded."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def message(self, kind, depth=0):
        found = kind()
        for field in kind.DESCRIPTOR.fields:
            if self.draw.random() < 0.45 and not (depth == 0 and field.name == "user_id"):
                continue
            self._fill(found, field, depth)
        return found

    def _fill(self, message, field, depth):
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values = getattr(message, field.name)
            for _ in range(self._count(depth)):
                name = self._scalar(field.message_type.fields_by_name["key"])
                made = self.message(type(values[name]), depth + 1)
                values[name].CopyFrom(made)
        elif field.is_repeated:
            values = getattr(message, field.name)
            count = self._count(depth)
            if field.message_type is not None:
                for _ in range(count):
                    values.add().CopyFrom(self.message(field.message_type._concrete_class, 1))
            else:
                some = [self._scalar(field) for _ in range(min(count, 8))]
                if count > 100:
                    some = [one for one in some if one not in TEXTS[10:]] or [TEXTS[0]]
                values.extend((some * count)[:count])
        elif field.message_type is not None:
            made = self.message(field.message_type._concrete_class, depth + 1)
            getattr(message, field.name).CopyFrom(made)
        else:
            setattr(message, field.name, self._scalar(field))

    def _count(self, depth):
        if depth == 0 and self.draw.random() < 0.003:
            return self.draw.choice(HUGE)
        return self.draw.choice(COUNTS)

    def _scalar(self, field):
        if field.cpp_type == field.CPPTYPE_STRING:
            # Mostly what gets past the first rule.
            most = 10 if self.draw.random() < 0.93 else len(TEXTS)
            return TEXTS[self.draw.randrange(most)]
        if field.cpp_type == field.CPPTYPE_BOOL:
            return self.draw.random() < 0.5
        if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            return self.draw.choice(FLOATS)
        bits = 31 if field.cpp_type == field.CPPTYPE_INT32 else 63
        # The wide ones are times.
        likely = INTEGERS[:7] if bits == 31 else [0, T0, T0 + 1]
        value = self.draw.choice(likely if self.draw.random() < 0.9 else INTEGERS)
        return value if -(2**bits) <= value < 2**bits else -value % 1000

    def broken(self, body):
        """The bytes with some of them gone, changed or added."""
        data = bytearray(body or b"\x0a\x03ada")
        for _ in range(self.draw.randint(1, 4)):
            at = self.draw.randrange(len(data) + 1)
            match self.draw.randrange(4):
                case 0:
                    del data[at : at + self.draw.randint(1, 9)]
                case 1:
                    data[at:at] = self.draw.randbytes(self.draw.randint(1, 9))
                case 2:
                    data[at:at] = b"\x0a\x02\xff\xfe"
                case 3 if at < len(data):
                    data[at] ^= 1 << self.draw.randrange(8)
            data = data or bytearray(b"\xff")
        return bytes(data)


def field_names(descriptor):
    names = {field.name for field in descriptor.fields}
    for field in descriptor.fields:
        if field.message_type is not None:
            names |= field_names(field.message_type)
    return names


def test_no_request_whatever_is_an_internal_error_or_goes_unnamed(running, shared_toy):
    fuzz = Fuzz(0)
    answers = collections.Counter()
    named = {name: field_names(kind.DESCRIPTOR) for name, kind in METHODS.items()}
    with grpc.insecure_channel(running.sidecar.address) as channel:
        calls = {name: channel.unary_unary(f"/hiertcn.v1.{name}") for name in METHODS}
        under_way = collections.deque()

        def check_oldest():
            name, body, future = under_way.popleft()
            code, details = future.code(), future.details()
            answers[name, code] += 1
            if len(body) > LARGEST:
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, details
                return
            assert code in ALLOWED, (name, code, details, body[:500])
            if code is grpc.StatusCode.INVALID_ARGUMENT:
                first = re.match(r"\w+", details).group()
                is_named = first in named[name] or details.startswith("the request is not a")
                assert is_named, (name, details)

        for _ in range(REQUESTS):
            (name,) = fuzz.draw.choices(list(METHODS), WEIGHTS)
            body = fuzz.message(METHODS[name]).SerializeToString()
            if fuzz.draw.random() < 0.2:
                body = fuzz.broken(body)
            under_way.append((name, body, calls[name].future(body, timeout=WAIT_S)))
            if len(under_way) == IN_FLIGHT:
                check_oldest()
        while under_way:
            check_oldest()
    # It would prove little if all were refused, or none.
    for name in ("Recommender/Recommend", "Recommender/RecordInteractions"):
        assert answers[name, grpc.StatusCode.OK] > REQUESTS / 100, answers
        assert answers[name, grpc.StatusCode.INVALID_ARGUMENT] > REQUESTS / 100, answers
    assert_serves(running, shared_toy)


def test_a_fuzzed_stream_ends_with_the_field_or_records_all(running, shared_toy):
    fuzz = Fuzz(1)
    with grpc.insecure_channel(running.sidecar.address) as channel:
        stream = channel.stream_stream("/hiertcn.v1.Recommender/StreamInteractions")
        for _ in range(100):
            bodies = [
                fuzz.message(pb.RecordInteractionsRequest).SerializeToString() for _ in range(5)
            ]
            bodies += [fuzz.broken(bodies[0])]
            replies = stream(iter(bodies), timeout=WAIT_S)
            with contextlib.suppress(grpc.RpcError):
                collections.deque(replies, maxlen=0)
            assert replies.code() in ALLOWED, replies.details()
    assert_serves(running, shared_toy)


def test_raw_bytes_on_the_port_end_their_connection_and_nothing_else(running, shared_toy):
    draw = random.Random(2)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    samples = [
        b"",
        b"\x00" * 1000,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        preface,
        preface + b"\xff" * 1000,
        preface + settings + b"\xff\xff\xff\x01\x05\x00\x00\x00\x01" + b"\x82" * 100,
    ]
    samples += [draw.randbytes(draw.randint(1, 3000)) for _ in range(40)]
    samples += [preface + settings + draw.randbytes(draw.randint(1, 300)) for _ in range(60)]
    host, _, port = running.sidecar.address.rpartition(":")
    for sent in samples:
        with (
            contextlib.suppress(ConnectionError, TimeoutError),
            socket.create_connection((host, int(port)), timeout=5) as connection,
        ):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert_serves(running, shared_toy)


def assert_serves(running, shared_toy):
    client, toy = running.client, shared_toy.toys[NUMBER]
    now = time.time_ns() // 1000
    assert client.record([Interaction("sane", "item-1", now)]).accepted in (0, 1)
    found = client.recommend("sane", candidates=toy.item_ids[:5], timestamp_us=now)
    assert len(found.items) == 5
    assert not found.fallback
