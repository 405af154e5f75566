"""Tokens, scopes and rates at the sidecar's real gRPC door."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hiertcn.cli import app
from hiertcn.errors import (
    InputError,
    OverloadError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.client import Interaction
from hiertcn.serving.options import SidecarOptions
from hiertcn.serving.preflight import require
from hiertcn.serving.security.access import Access
from hiertcn.serving.security.access_control import METHOD_SCOPES
from hiertcn.serving.security.rate_limit import RateLimiter
from hiertcn.serving.security.shared_rate_limit import SharedRateLimiter, rate_table
from hiertcn.serving.security.tokens import Scope, TokenFile
from tests.waiting import WAIT_S, patient_client

READER, WRITER, ADMIN = (name * 4 for name in ("read-er", "writ-er", "admi-in"))
T0 = 1_767_225_600_000_000 + 3_600_000_000


@pytest.fixture
def token_file(tmp_path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(
        f"# who may what\n\nread {READER}\nread,write {WRITER}\nread,write,admin {ADMIN}\n"
    )
    return file


@pytest.fixture
def access_of(tmp_path) -> Callable[[str], Access]:
    def make(token: str) -> Access:
        file = tmp_path / f"token-{token[:4]}"
        file.write_text(token + "\n")
        return Access(token_file=file)

    return make


@pytest.fixture
def with_tokens(shared_toy, shared_triton, start_sidecar, token_file):
    return start_sidecar(shared_toy, shared_triton.grpc_url, token_file=token_file)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tls_cert": Path("a")}, "belong together"),
        ({"tls_client_ca": Path("a")}, "needs --tls-cert"),
        ({"rate_limit": -1.0}, "rate_limit is -1"),
        ({"max_message_bytes": 0}, "max_message_bytes is 0"),
        ({"trace_sampling": 2.0}, "trace_sampling is 2"),
    ],
)
def test_options_that_contradict_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        SidecarOptions(repository=Path(), triton_url="", state_dir=Path(), **options)


def test_each_token_may_do_what_its_line_says(with_tokens, access_of):
    address = with_tokens.sidecar.address
    click = [Interaction("ada", "item-3", T0)]
    with patient_client(address, access=access_of(READER)) as reader:
        assert reader.recommend("ada", timestamp_us=T0).items
        for forbidden in (
            lambda: reader.record(click),
            lambda: reader.delete_user("ada"),
            reader.roll_back,
        ):
            with pytest.raises(PermissionDeniedError, match="may read; this call needs"):
                forbidden()
    with patient_client(address, access=access_of(WRITER)) as writer:
        assert writer.record(click).accepted == 1
        with pytest.raises(PermissionDeniedError, match="scope admin"):
            writer.delete_user("ada")
    with patient_client(address, access=access_of(ADMIN)) as admin:
        assert admin.delete_user("ada")
    assert (
        with_tokens.value("hiertcn_requests_total", method="DeleteUser", code="PERMISSION_DENIED")
        == 2
    )


def test_callers_without_a_known_token_learn_only_the_state_of_health(with_tokens, access_of):
    address = with_tokens.sidecar.address
    for access, said in (
        (Access(), "authorization is missing"),
        (access_of("none-such-token-at-all"), "is not one of"),
    ):
        with (
            patient_client(address, access=access) as client,
            pytest.raises(UnauthenticatedError, match=said),
        ):
            client.recommend("ada")
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as refused:
            list(reflection.ServerReflectionInfo(iter([request]), timeout=WAIT_S))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        listed = list(
            reflection.ServerReflectionInfo(
                iter([request]),
                timeout=WAIT_S,
                metadata=[("authorization", f"Bearer {READER}")],
            )
        )
        assert len(listed[0].list_services_response.service) >= 3
        bad = channel.unary_unary("/hiertcn.v1.Recommender/Recommend")
        with pytest.raises(grpc.RpcError) as refused:
            bad(b"\xff" * 100, timeout=WAIT_S, metadata=[("authorization", "Basic YTpi")])
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_every_method_of_the_interface_has_a_scope():
    methods = {
        f"/{service.full_name}/{method.name}"
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods - set(METHOD_SCOPES) == set()


def test_tokens_change_with_the_file_and_a_broken_file_changes_nothing(token_file, caplog):
    tokens = TokenFile(token_file, check_every_s=0)
    assert tokens.caller(f"bearer {READER}", Scope.READ).scopes == {Scope.READ}
    added = "another-token-of-good-length"
    token_file.write_text(f"read {added}\n")
    tokens.caller(f"Bearer {added}", Scope.READ)
    with pytest.raises(UnauthenticatedError):
        tokens.caller(f"Bearer {READER}", Scope.READ)
    token_file.write_text(f"read {added} too many words")
    tokens.caller(f"Bearer {added}", Scope.READ)
    assert "has 5 words" in caplog.text
    token_file.unlink()
    tokens.caller(f"Bearer {added}", Scope.READ)
    token_file.write_text("# all revoked\n")
    with pytest.raises(UnauthenticatedError):
        tokens.caller(f"Bearer {added}", Scope.READ)
    assert added not in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no token"),
        ("read short", "at least 16"),
        ("a-token-of-good-length read", "line 1 begins with no scopes"),
        ("read a-token-of-good-length\nread a-token-of-good-length", "line 2 repeats"),
        ("read,execute a-token-of-good-length", "begins with no scopes"),
    ],
)
def test_a_token_file_that_cannot_be_used_is_refused_without_showing_it(tmp_path, text, said):
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(InputError, match=said) as refused:
        TokenFile(file)
    assert "good-length" not in str(refused.value)


@given(authorization=st.text() | st.binary().map(lambda sent: sent.decode("latin-1")))
def test_no_authorization_but_the_right_one_is_let_in(tmp_path_factory, authorization):
    file = tmp_path_factory.getbasetemp() / "tokens"
    if not file.exists():
        file.write_text(f"read {READER}")
    with pytest.raises(UnauthenticatedError):
        TokenFile(file).caller(authorization, Scope.READ)


def test_no_token_reaches_a_log_a_metric_or_a_printed_object(with_tokens, access_of, caplog):
    wrong = "a-token-that-nobody-gave-out"
    with caplog.at_level(logging.DEBUG):
        for token in (ADMIN, wrong):
            access = access_of(token)
            with patient_client(with_tokens.sidecar.address, access=access) as client:
                try:
                    client.recommend("ada", k=0)
                except InputError as error:
                    assert token not in str(error)
                assert token not in repr((access, client))
    from prometheus_client import generate_latest

    shown = caplog.text + generate_latest(with_tokens.sidecar.metrics.registry).decode()
    assert ADMIN not in shown
    assert wrong not in shown
    assert ADMIN not in repr(with_tokens.options)


def test_a_caller_over_its_rate_is_told_the_limit_and_others_go_on(
    shared_toy, shared_triton, start_sidecar, token_file, access_of
):
    running = start_sidecar(
        shared_toy, shared_triton.grpc_url, token_file=token_file, rate_limit=0.01
    )
    address = running.sidecar.address
    with patient_client(address, access=access_of(READER)) as client:
        client.recommend("ada", timestamp_us=T0)
        with pytest.raises(OverloadError, match=r"rate limit of 0\.01 requests/s"):
            client.recommend("ada", timestamp_us=T0)
    with patient_client(address, access=access_of(ADMIN)) as client:
        client.recommend("ada", timestamp_us=T0)
    with grpc.insecure_channel(address) as channel:
        for _ in range(3):
            health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=WAIT_S
            )


def test_callers_without_tokens_are_limited_by_their_address(
    shared_toy, shared_triton, start_sidecar
):
    running = start_sidecar(shared_toy, shared_triton.grpc_url, rate_limit=0.01)
    running.client.recommend("ada", timestamp_us=T0)
    with (
        patient_client(running.sidecar.address) as another,
        pytest.raises(OverloadError, match="rate limit"),
    ):
        another.recommend("ada", timestamp_us=T0)


def test_a_stream_over_its_rate_is_slowed_and_loses_nothing(
    shared_toy, shared_triton, start_sidecar
):
    running = start_sidecar(shared_toy, shared_triton.grpc_url, rate_limit=20.0)
    requests = [
        pb.RecordInteractionsRequest(
            interactions=[pb.Interaction(user_id="ada", item_id="item-1", timestamp_us=T0 + n)]
        )
        for n in range(25)
    ]
    with grpc.insecure_channel(running.sidecar.address) as channel:
        stream = channel.stream_stream(
            "/hiertcn.v1.Recommender/StreamInteractions",
            request_serializer=pb.RecordInteractionsRequest.SerializeToString,
            response_deserializer=pb.RecordInteractionsResponse.FromString,
        )
        began = time.monotonic()
        accepted = sum(reply.accepted for reply in stream(iter(requests), timeout=WAIT_S))
        # 20 at once, then one every 50 ms.
        assert time.monotonic() - began > 0.2
    assert accepted == len(requests)


@given(
    steps=st.lists(st.floats(0, 3), max_size=60),
    per_second=st.floats(0.5, 20),
)
def test_a_caller_never_gets_more_than_a_bucket_and_its_rate(steps, per_second):
    now = 0.0
    limiter = RateLimiter(per_second, clock=lambda: now)
    admitted = 0
    for step in steps:
        now += step
        wait_s = limiter.wait_s("caller")
        admitted += wait_s == 0
        assert wait_s <= 1 / per_second + 1e-6
        assert admitted <= max(1, per_second) + per_second * now + 1e-6


def test_the_limiter_forgets_the_callers_longest_silent():
    limiter = RateLimiter(1.0, clock=lambda: 0.0, most_callers=2)
    for caller in ("a", "b", "c"):
        limiter.admit(caller)
    with pytest.raises(OverloadError):
        limiter.admit("c")
    limiter.admit("a")


@given(
    steps=st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=60),
    per_second=st.floats(0.5, 20),
)
def test_two_limiters_on_one_table_admit_what_one_would(tmp_path_factory, steps, per_second):
    now = 0.0
    table = rate_table(tmp_path_factory.mktemp("rates"), create=True)
    shared = [SharedRateLimiter(per_second, table, clock=lambda: now) for _ in range(2)]
    alone = RateLimiter(per_second, clock=lambda: now)
    for step, second in steps:
        now += step
        assert shared[second].wait_s("caller") == alone.wait_s("caller")


def test_a_full_table_forgets_callers_whose_buckets_are_full(tmp_path):
    now = 0.0
    table = rate_table(tmp_path, create=True)
    limiter = SharedRateLimiter(1.0, table, clock=lambda: now)
    for n in range(20_000):
        limiter.admit(f"long silent {n}")
    now = 10.0
    callers = [b"caller %d" % n for n in range(1000)]
    for caller in callers:
        limiter.admit(caller)
    for caller in callers:
        with pytest.raises(OverloadError, match="rate limit"):
            limiter.admit(caller)
    assert table.stat().st_size < 1 << 20


def test_a_message_over_the_bound_is_refused(shared_toy, shared_triton, start_sidecar):
    running = start_sidecar(shared_toy, shared_triton.grpc_url, max_message_bytes=4096)
    with pytest.raises(OverloadError, match="larger than max"):
        running.client.recommend("ada", candidates=[f"item-{n}" for n in range(5000)])
    assert running.client.recommend("ada", timestamp_us=T0).items


def test_serve_refuses_what_it_cannot_guard_with_before_it_starts_anything(shared_toy, tmp_path):
    missing = tmp_path / "missing"
    for options, said in (
        (("--token-file", str(missing)), "missing cannot be read"),
        (("--tls-cert", str(missing), "--tls-key", str(missing)), "--tls-cert .* cannot be read"),
    ):
        command = ["serve", "--repository", str(shared_toy.root), "--port", "0", *options]
        with pytest.raises(InputError, match=said):
            CliRunner().invoke(app, [*command, "--metrics-port", "-1"], catch_exceptions=False)
    with pytest.raises(InputError, match=r"--ui needs the extra ui: pip install 'hiertcn\[ui\]'"):
        require("no_such_module.inside", "ui", "--ui")


def test_a_client_token_file_may_be_the_servers(token_file):
    assert Access(token_file=token_file).metadata() == (("authorization", f"Bearer {READER}"),)
    os.truncate(token_file, 0)
    with pytest.raises(InputError, match="holds no token"):
        Access(token_file=token_file)
