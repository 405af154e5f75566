"""Compile the daily pipeline, submit it to a Kubeflow cluster, and schedule it there."""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hiertcn.errors import InputError
from hiertcn.files import whole_file
from pipelines.cron import six_field_cron
from pipelines.daily import NAME, ClusterSettings, cluster_pipeline
from pipelines.parameters import complete

_log = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S: Final = 10.0
_PAGE_SIZE: Final = 100


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Kubeflow Pipelines API server.

    Attributes:
        host: its address, such as ``http://localhost:8080``.
        namespace: the profile's namespace on a multi-user cluster; empty elsewhere.
        token: bearer token; empty for none.
        experiment: experiment that runs and schedules belong to; created if missing.
    """

    host: str
    namespace: str = ""
    token: str = ""
    experiment: str = NAME

    def __post_init__(self) -> None:
        if not self.host.startswith(("http://", "https://")):
            raise InputError(
                f"--host {self.host!r} is no address of a Kubeflow Pipelines API; expected "
                "http://HOST:PORT or https://HOST"
            )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is at the cluster after `schedule`."""

    schedule_id: str
    cron: str
    replaced: tuple[str, ...]


def compile_pipeline(
    output: Path, settings: ClusterSettings, parameters: Mapping[str, Any] | None = None
) -> None:
    """Write the pipeline as Kubeflow's IR YAML, whole or not at all.

    Args:
        output: file to write, ``.yaml``.
        settings: image, resources, volumes and secrets.
        parameters: new defaults of the pipeline's parameters; a run may still set others.

    Raises:
        InputError: another ending, or an unknown or ill-typed parameter.
    """
    from kfp import compiler

    if output.suffix not in (".yaml", ".yml"):
        raise InputError(f"--output {output} does not end in .yaml; Kubeflow tells files by that")
    if parameters:
        complete({"events": "-", **parameters})
    with whole_file(output) as aside, tempfile.TemporaryDirectory() as scratch:
        # The compiler, too, wants the ending, which the temporary name has not.
        package = Path(scratch) / "pipeline.yaml"
        compiler.Compiler().compile(
            cluster_pipeline(settings),
            str(package),
            pipeline_parameters=dict(parameters) if parameters else None,
        )
        aside.write_bytes(package.read_bytes())


@contextlib.contextmanager
def compiled(settings: ClusterSettings) -> Iterator[Path]:
    """Yield the compiled pipeline as a temporary file."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "pipeline.yaml"
        compile_pipeline(package, settings)
        yield package


def submit(
    cluster: Cluster,
    package: Path,
    parameters: Mapping[str, Any],
    *,
    run_name: str,
    service_account: str = "",
) -> str:
    """Start one run of a compiled pipeline; return its id.

    Raises:
        InputError: a parameter is wrong, or the host cannot be reached or refuses.
    """
    values = complete(parameters)
    with _client(cluster) as client:
        run = client.run_pipeline(
            experiment_id=_experiment(client, cluster),
            job_name=run_name,
            pipeline_package_path=str(package),
            params=values,
            service_account=service_account or None,
        )
        return str(run.run_id)


def schedule(
    cluster: Cluster,
    package: Path,
    parameters: Mapping[str, Any],
    *,
    name: str,
    cron: str,
    service_account: str = "",
) -> Schedule:
    """Run the pipeline by the clock; a schedule of the same name is replaced.

    Missed runs are not caught up, one run at a time. Kubeflow cannot update a schedule, so the
    new one is created before the old ones are deleted: there is never none. If an old one can
    neither be deleted nor disabled, the new one is deleted again, so that two never stay.

    Args:
        cluster: where.
        package: the compiled pipeline.
        parameters: the pipeline's; ``data_date`` is a macro of components/scheduled_time.py.
        name: the schedule's name, unique within the experiment.
        cron: five or six fields, UTC (pipelines/cron.py).
        service_account: Kubernetes service account of the runs; empty for the default.

    Raises:
        InputError: the cron expression or a parameter is wrong, or the host cannot be reached or
            refuses.
    """
    expression = six_field_cron(cron)
    values = complete(parameters)
    with _client(cluster) as client:
        experiment_id = _experiment(client, cluster)
        old = _schedules(client, experiment_id, name)
        new = client.create_recurring_run(
            experiment_id=experiment_id,
            job_name=name,
            cron_expression=expression,
            max_concurrency=1,
            no_catchup=True,
            params=values,
            pipeline_package_path=str(package),
            service_account=service_account or None,
        )
        new_id = str(new.recurring_run_id)
        _retire(client, old, new_id, name)
    return Schedule(schedule_id=new_id, cron=expression, replaced=tuple(old))


def _retire(client: Any, old: list[str], new_id: str, name: str) -> None:
    """Delete the old schedules; one that stays active withdraws the new one."""
    from kfp_server_api import ApiException

    for schedule_id in old:
        try:
            client.delete_recurring_run(schedule_id)
        except ApiException as error:
            if error.status == 404:
                continue
            try:
                client.disable_recurring_run(schedule_id)
            except ApiException:
                client.delete_recurring_run(new_id)
                raise InputError(
                    f"the earlier schedule {schedule_id} called {name!r} could neither be deleted "
                    f"nor disabled ({_reason(error)}), so it stays and the new one was withdrawn; "
                    "remove it in Kubeflow and run again"
                ) from None
            _log.warning(
                "the earlier schedule %s could not be deleted (%s) and was disabled",
                schedule_id,
                _reason(error),
            )


def _schedules(client: Any, experiment_id: str, name: str) -> list[str]:
    """Return the ids of the experiment's schedules of that name."""
    same_name = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    found: list[str] = []
    token = ""
    while True:
        page = client.list_recurring_runs(
            page_token=token,
            page_size=_PAGE_SIZE,
            experiment_id=experiment_id,
            filter=json.dumps({"predicates": [same_name]}),
        )
        found += [
            str(entry.recurring_run_id)
            for entry in page.recurring_runs or []
            if entry.display_name == name
        ]
        token = page.next_page_token or ""
        if not token:
            return found


def _experiment(client: Any, cluster: Cluster) -> str:
    experiment = client.create_experiment(
        name=cluster.experiment, namespace=cluster.namespace or None
    )
    return str(experiment.experiment_id)


@contextlib.contextmanager
def _client(cluster: Cluster) -> Iterator[Any]:
    """Yield a Kubeflow client; what the network or the server refuse becomes one sentence."""
    import kfp
    import urllib3
    from kfp_server_api import ApiException

    _check_reachable(cluster)
    # The client warns of old servers and prints links on standard output.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield kfp.Client(
                host=cluster.host,
                namespace=cluster.namespace or "kubeflow",
                existing_token=cluster.token or None,
            )
        except urllib3.exceptions.HTTPError as error:
            raise _unreachable(cluster, error) from None
        except ApiException as error:
            raise InputError(
                f"Kubeflow Pipelines at {cluster.host} refused ({_reason(error)}); check --host, "
                "--namespace and the token"
            ) from None


def _check_reachable(cluster: Cluster) -> None:
    """Ask for the server's health: kfp.Client itself would retry for minutes, with tracebacks."""
    import urllib3

    headers = {"Authorization": f"Bearer {cluster.token}"} if cluster.token else {}
    try:
        answer = urllib3.PoolManager().request(
            "GET",
            cluster.host.rstrip("/") + "/apis/v2beta1/healthz",
            headers=headers,
            timeout=_CONNECT_TIMEOUT_S,
            retries=False,
        )
    except urllib3.exceptions.HTTPError as error:
        raise _unreachable(cluster, error) from None
    if answer.status != 200:
        raise InputError(
            f"{cluster.host} answered {answer.status} {answer.reason} when asked for the health of "
            "Kubeflow Pipelines; expected its API server there, so check --host and the token"
        )


def _unreachable(cluster: Cluster, error: BaseException) -> InputError:
    return InputError(
        f"Kubeflow Pipelines at {cluster.host} could not be reached ({_innermost(error)}); check "
        "--host, or forward a port to its API server"
    )


def _reason(error: Any) -> str:
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    return f"{error.status} {message}"


def _innermost(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return _innermost(reason)
    return str(error).rpartition(": ")[2] or type(error).__name__
