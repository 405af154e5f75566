"""TLS and mutual TLS at the sidecar's real gRPC door, and the commands that get through it."""

import datetime
import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from hiertcn.cli import app
from hiertcn.errors import (
    InputError,
    ServingError,
)
from hiertcn.serving.client import RecommenderClient
from hiertcn.serving.security.access import Access
from hiertcn.serving.security.tls import ServerTls
from tests.waiting import patient_client, until

T0 = 1_767_225_600_000_000 + 3_600_000_000


@dataclass(frozen=True)
class Certificate:
    """Paths of a certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(
            self._signed(self._name, self._key.public_key(), is_authority=True).public_bytes(
                serialization.Encoding.PEM
            )
        )

    def issue(self, name: str, file: str | None = None) -> Certificate:
        """A certificate for loopback."""
        key = ec.generate_private_key(ec.SECP256R1())
        found = Certificate(
            self._folder / f"{file or name}.crt", self._folder / f"{file or name}.key"
        )
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        found.cert.write_bytes(
            self._signed(subject, key.public_key()).public_bytes(serialization.Encoding.PEM)
        )
        found.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return found

    def _signed(self, subject: x509.Name, key, *, is_authority: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
                ),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path, "authority")


def test_tls_serves_those_who_trust_its_authority_and_no_one_else(
    shared_toy, shared_triton, start_sidecar, authority, tmp_path
):
    own = authority.issue("sidecar")
    running = start_sidecar(shared_toy, shared_triton.grpc_url, tls_cert=own.cert, tls_key=own.key)
    address = running.sidecar.address
    with patient_client(address, access=Access(tls_ca=authority.path)) as client:
        assert client.recommend("ada", timestamp_us=T0).items
    stranger = Authority(tmp_path, "stranger")
    for access in (Access(tls_ca=stranger.path), Access()):
        with (
            RecommenderClient(address, timeout_s=1.0, access=access) as client,
            pytest.raises(ServingError),
        ):
            client.recommend("ada")


def test_mutual_tls_refuses_clients_of_another_authority(
    shared_toy, shared_triton, start_sidecar, authority, tmp_path
):
    own, known = authority.issue("sidecar"), authority.issue("client")
    unknown = Authority(tmp_path, "stranger").issue("stranger-client")
    running = start_sidecar(
        shared_toy,
        shared_triton.grpc_url,
        tls_cert=own.cert,
        tls_key=own.key,
        tls_client_ca=authority.path,
    )
    address = running.sidecar.address
    shown = Access(tls_ca=authority.path, tls_cert=known.cert, tls_key=known.key)
    with patient_client(address, access=shown) as client:
        assert client.recommend("ada", timestamp_us=T0).items
    for access in (
        Access(tls_ca=authority.path),
        Access(tls_ca=authority.path, tls_cert=unknown.cert, tls_key=unknown.key),
    ):
        with (
            RecommenderClient(address, timeout_s=1.0, access=access) as client,
            pytest.raises(ServingError),
        ):
            client.recommend("ada")


def test_a_renewed_certificate_is_used_without_a_restart_and_a_broken_one_is_not(
    shared_toy, shared_triton, start_sidecar, authority, tmp_path
):
    own = authority.issue("sidecar")
    running = start_sidecar(shared_toy, shared_triton.grpc_url, tls_cert=own.cert, tls_key=own.key)
    successor = Authority(tmp_path, "successor")

    def answers(trusted: Path) -> bool:
        with RecommenderClient(
            running.sidecar.address, timeout_s=1.0, access=Access(tls_ca=trusted)
        ) as client:
            try:
                client.releases()
            except ServingError:
                return False
            return True

    assert answers(authority.path)
    assert not answers(successor.path)
    renewed = successor.issue("sidecar", "renewed")
    renewed.key.replace(own.key)
    renewed.cert.replace(own.cert)
    until(lambda: answers(successor.path))
    own.cert.write_text("no certificate")
    assert answers(successor.path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda own, other: own.key.unlink(), "--tls-key .* cannot be read"),
        (lambda own, other: own.cert.write_text("x"), "cannot be used together"),
        (lambda own, other: other.key.replace(own.key), "cannot be used together"),
    ],
)
def test_files_that_cannot_serve_tls_are_refused_by_name(authority, spoil, said):
    own, other = authority.issue("sidecar"), authority.issue("other")
    spoil(own, other)
    with pytest.raises(InputError, match=said):
        ServerTls(certificate=own.cert, key=own.key).check()


def test_the_commands_reach_a_guarded_sidecar_by_options_or_environment(
    shared_toy, shared_triton, start_sidecar, authority, tmp_path, monkeypatch
):
    token_file = tmp_path / "tokens"
    token_file.write_text("read a-reader-of-recommendations\n")
    own, client = authority.issue("sidecar"), authority.issue("client")
    running = start_sidecar(
        shared_toy,
        shared_triton.grpc_url,
        token_file=token_file,
        tls_cert=own.cert,
        tls_key=own.key,
        tls_client_ca=authority.path,
    )
    command = ["recommend", "ada", "--json", "--address", running.sidecar.address]
    guarded = [
        *("--tls-ca", str(authority.path), "--token-file", str(token_file)),
        *("--tls-cert", str(client.cert), "--tls-key", str(client.key)),
    ]
    reply = CliRunner().invoke(app, [*command, *guarded], catch_exceptions=False)
    assert len(json.loads(reply.output)["items"]) == 10
    for name, value in (
        ("TLS_CA", authority.path),
        ("TLS_CERT", client.cert),
        ("TLS_KEY", client.key),
        ("TOKEN_FILE", token_file),
    ):
        monkeypatch.setenv(f"HIERTCN_{name}", str(value))
    reply = CliRunner().invoke(app, command, catch_exceptions=False)
    assert len(json.loads(reply.output)["items"]) == 10
