"""What is known to fail before seconds are spent on starting: release, folders, ports, Triton."""

import errno
import importlib.util
import re
import socket
import tempfile
from typing import Final

from hiertcn.errors import InputError
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.options import STORE_FOLDER, ServeOptions, SidecarOptions
from hiertcn.serving.processes.triton_install import find_tritonserver
from hiertcn.serving.security.tls import ServerTls
from hiertcn.serving.security.tokens import TokenFile

_NOT_FOR_SHELLS: Final = re.compile(r"[^\w@%+=:,./~-]", re.ASCII)


def check_before_starting(options: ServeOptions) -> None:
    """Refuse what cannot be served.

    Raises:
        InputError: the repository or its current release does not exist, a port is in use, or no
            Triton binary is here to be started; the state folder cannot be written; a certificate
            or token file cannot be used, or an extra that an option needs is not installed.
    """
    repository = ReleaseRepository(options.sidecar.repository)
    if not repository.root.is_dir():
        raise InputError(
            f"the release repository {repository.root} does not exist; publish a release there "
            "with 'python -m pipelines run', or give another --repository"
        )
    if repository.current() is None:
        raise InputError(
            f"{repository.root} has no current release; publish one with 'python -m pipelines "
            "run', or activate one with 'hiertcn releases activate'"
        )
    _check_port("--port", options.sidecar.host, options.sidecar.port)
    if options.sidecar.metrics_port is not None:
        _check_port("--metrics-port", options.sidecar.host, options.sidecar.metrics_port)
    if options.sidecar.ui_port is not None:
        _check_port("--ui-port", options.sidecar.host, options.sidecar.ui_port)
    _check_doors(options.sidecar)
    if options.triton_url is None and options.sidecar.models == "triton":
        _check_triton(options.sidecar)
    _check_state_folder(options.sidecar)


def _check_state_folder(options: SidecarOptions) -> None:
    folders = [options.state_dir / "log"]
    if not options.store:
        folders.append(options.state_dir / STORE_FOLDER)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(
                f"--state-dir is {options.state_dir}, but {folder} cannot be written "
                f"({error.strerror}); give a folder that this user may write"
            ) from None


def _check_triton(options: SidecarOptions) -> None:
    if find_tritonserver().wheel is None:
        return
    # The wheel's Python backend starts models by a shell command with both paths in it, and waits
    # for them without end if the shell reads others.
    for option, folder in (
        ("--state-dir", options.state_dir),
        ("--repository", options.repository),
    ):
        found = _NOT_FOR_SHELLS.search(str(folder.absolute()))
        if found:
            raise InputError(
                f"{option} is {str(folder)!r}, and Triton cannot start its models from a path with "
                f"{found.group()!r}; expected letters, digits and any of @%+=:,./-_~"
            )


def _check_doors(options: SidecarOptions) -> None:
    if options.tls_cert is not None and options.tls_key is not None:
        ServerTls(
            certificate=options.tls_cert,
            key=options.tls_key,
            client_authority=options.tls_client_ca,
        ).check()
    if options.token_file is not None:
        TokenFile(options.token_file)
    if options.ui_port is not None:
        require("aiohttp", "ui", "--ui")
    if options.otlp_endpoint is not None:
        require("opentelemetry.exporter.otlp.proto.grpc", "tracing", "--otlp-endpoint")


def require(module: str, extra: str, option: str) -> None:
    """Say which extra an option needs.

    Raises:
        InputError: its module is not installed.
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise InputError(f"{option} needs the extra {extra}: pip install 'hiertcn[{extra}]'")


def _check_port(option: str, host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise InputError(
                    f"--host is {host!r}, which is no address of this machine ({error.strerror}); "
                    "give one to listen on, such as 127.0.0.1 or 0.0.0.0"
                ) from None
            raise InputError(
                f"{option} {port} on {host} cannot be bound ({error.strerror}); stop what holds "
                "it or give another"
            ) from None
