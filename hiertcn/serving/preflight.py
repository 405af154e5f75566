"""What can be known to fail before seconds are spent on starting: release, ports, Triton binary."""

import socket

from hiertcn.errors import InputError
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.options import ServeOptions
from hiertcn.serving.triton_install import find_tritonserver


def check_before_starting(options: ServeOptions) -> None:
    """Refuse what cannot be served.

    Raises:
        InputError: the repository or its current release does not exist, a port is in use, or no
            Triton binary is here to be started.
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
    if options.triton_url is None:
        find_tritonserver()


def _check_port(option: str, host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{option} {port} on {host} cannot be bound ({error.strerror}); stop what holds "
                "it or give another"
            ) from None
