"""``python -m pipelines run|compile|submit|schedule``: the daily pipeline's command line.

Every pipeline parameter is an option of every command; their help comes from parameters.py. An
error of the user's making ends with one sentence and its exit code (2 for bad input).
"""

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from components.scheduled_time import INSTANT, MIDNIGHT
from hiertcn import __version__
from hiertcn.errors import HiertcnError, InputError
from pipelines.parameters import PARAMETERS, Parameter

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The daily pipeline: from an event log to a published release.",
)


class Cutoff(StrEnum):
    """Up to when a scheduled run reads events."""

    MIDNIGHT = "midnight"
    INSTANT = "instant"


_Resources = Annotated[
    list[str] | None,
    typer.Option(
        "--resources",
        metavar="STEP.KEY=VALUE",
        help="What a step may use; repeat. STEP: a step or all. KEY: cpu, memory, gpu, "
        "accelerator, retries, backoff_s [seconds], timeout_s [seconds] or cache. "
        "Defaults: pipelines/resources.py.",
        rich_help_panel="Cluster",
    ),
]
_ResourcesFile = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with a [STEP] table of the same keys each. Default: none.",
        rich_help_panel="Cluster",
    ),
]
_Image = Annotated[
    str,
    typer.Option(
        help="Image that the steps run in (deploy/Dockerfile).", rich_help_panel="Cluster"
    ),
]
_Volumes = Annotated[
    list[str] | None,
    typer.Option(
        "--volume",
        metavar="CLAIM:/PATH",
        help="Persistent volume claim mounted into every step; repeat. The release repository and "
        "the edge store lie on one. Default: none.",
        rich_help_panel="Cluster",
    ),
]
_Secrets = Annotated[
    list[str] | None,
    typer.Option(
        "--secret",
        metavar="VARIABLE=SECRET.KEY",
        help="Secret's key that every step gets as an environment variable; repeat. Default: none.",
        rich_help_panel="Cluster",
    ),
]
_Host = Annotated[
    str,
    typer.Option(
        envvar="KF_PIPELINES_ENDPOINT",
        help="Kubeflow Pipelines API, http(s)://HOST[:PORT].",
        rich_help_panel="Cluster",
    ),
]
_Namespace = Annotated[
    str,
    typer.Option(
        help="Namespace on a multi-user cluster; empty elsewhere.", rich_help_panel="Cluster"
    ),
]
_Experiment = Annotated[
    str, typer.Option(help="Experiment, created if missing.", rich_help_panel="Cluster")
]
_ServiceAccount = Annotated[
    str,
    typer.Option(
        help="Kubernetes service account of the steps; empty for the default.",
        rich_help_panel="Cluster",
    ),
]


def _with_parameters(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Any]:
    """Give a command an option for every pipeline parameter; it gets them as ``parameters``."""
    offered = [item for item in PARAMETERS if item.name not in without]

    def decorate(command: Callable[..., None]) -> Any:
        @functools.wraps(command)
        def wrapper(**options: Any) -> None:
            parameters = {item.name: options.pop(item.name) for item in offered}
            command(parameters=parameters, **options)

        own = inspect.signature(command, eval_str=True)
        options = [
            *[_option(item) for item in offered],
            *[option for name, option in own.parameters.items() if name != "parameters"],
        ]
        wrapper.__signature__ = own.replace(parameters=options)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {option.name: option.annotation for option in options}
        return wrapper

    return decorate


def _option(item: Parameter) -> inspect.Parameter:
    kind: Any = list[str] if isinstance(item.default, list) else type(item.default)
    option = typer.Option(
        item.flag,
        # Rich would take the unit's brackets for markup.
        help=item.description.replace("[", "\\["),
        show_default=True if item.default or isinstance(item.default, int | float) else "none",
        rich_help_panel=item.group,
    )
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=item.default,
        annotation=Annotated[kind, option],
    )


@app.command()
@_with_parameters()
def run(
    *,
    parameters: dict[str, Any],
    work_dir: Annotated[
        Path,
        typer.Option(
            help="Folder for outputs, the cache, run.json and report.html.", rich_help_panel="Run"
        ),
    ] = Path(".hiertcn"),
    cache: Annotated[
        bool,
        typer.Option(
            help="Skip steps whose inputs and program are unchanged; so a failed run resumes.",
            rich_help_panel="Run",
        ),
    ] = True,
    keep_runs: Annotated[
        int, typer.Option(help="Newest runs whose outputs are kept [runs].", rich_help_panel="Run")
    ] = 3,
) -> None:
    """Run all steps on this machine, publish a release if the gate lets it pass."""
    from pipelines.local import run as run_locally
    from pipelines.summary import describe

    summary = run_locally(parameters, work_dir, cache=cache, keep_runs=keep_runs)
    for line in describe(summary, work_dir.absolute()):
        print(line)


@app.command(name="compile")
@_with_parameters()
def compile_(
    *,
    parameters: dict[str, Any],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="YAML file to write.", rich_help_panel="Cluster")
    ] = Path("hiertcn-daily.yaml"),
    image: _Image = f"hiertcn:{__version__}",
    resources: _Resources = None,
    resources_file: _ResourcesFile = None,
    volumes: _Volumes = None,
    secrets: _Secrets = None,
) -> None:
    """Write the pipeline as Kubeflow's IR YAML; parameter options become its defaults."""
    from pipelines.cluster import compile_pipeline

    changed = {
        item.name: parameters[item.name]
        for item in PARAMETERS
        if parameters[item.name] != item.default
    }
    settings = _settings(image, resources, resources_file, volumes, secrets)
    compile_pipeline(output, settings, changed)
    print(f"wrote the pipeline for {image} to {output}; submit it, or upload it to Kubeflow")


@app.command()
@_with_parameters()
def submit(
    *,
    parameters: dict[str, Any],
    host: _Host = "http://localhost:8080",
    namespace: _Namespace = "",
    experiment: _Experiment = "hiertcn-daily",
    name: Annotated[
        str,
        typer.Option(
            help="Name of the run. Default: hiertcn-daily and the time.", rich_help_panel="Cluster"
        ),
    ] = "",
    service_account: _ServiceAccount = "",
    image: _Image = f"hiertcn:{__version__}",
    resources: _Resources = None,
    resources_file: _ResourcesFile = None,
    volumes: _Volumes = None,
    secrets: _Secrets = None,
) -> None:
    """Start one run on a Kubeflow cluster. A token may be given as KF_PIPELINES_TOKEN."""
    from pipelines import cluster

    settings = _settings(image, resources, resources_file, volumes, secrets)
    _check_repository(parameters["repository"])
    with cluster.compiled(settings) as package:
        run_id = cluster.submit(
            _cluster(host, namespace, experiment),
            package,
            parameters,
            run_name=name or f"hiertcn-daily {datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z",
            service_account=service_account,
        )
    print(f"started run {run_id}: {host.rstrip('/')}/#/runs/details/{run_id}")


@app.command()
@_with_parameters(without=("data_date",))
def schedule(
    *,
    parameters: dict[str, Any],
    cron: Annotated[
        str,
        typer.Option(
            help="When to run, UTC: minutes hours day month weekday, or with seconds before them.",
            rich_help_panel="Schedule",
        ),
    ] = "0 2 * * *",
    cutoff: Annotated[
        Cutoff,
        typer.Option(
            help="Events a run reads: before the UTC midnight at or before its scheduled moment "
            "(whole days), or before that moment itself.",
            rich_help_panel="Schedule",
        ),
    ] = Cutoff.MIDNIGHT,
    name: Annotated[
        str,
        typer.Option(
            help="Name of the schedule; one of the same name is replaced.",
            rich_help_panel="Schedule",
        ),
    ] = "hiertcn-daily",
    host: _Host = "http://localhost:8080",
    namespace: _Namespace = "",
    experiment: _Experiment = "hiertcn-daily",
    service_account: _ServiceAccount = "",
    image: _Image = f"hiertcn:{__version__}",
    resources: _Resources = None,
    resources_file: _ResourcesFile = None,
    volumes: _Volumes = None,
    secrets: _Secrets = None,
) -> None:
    """Run the pipeline by the clock on a Kubeflow cluster; missed runs are not caught up."""
    from pipelines import cluster

    settings = _settings(image, resources, resources_file, volumes, secrets)
    _check_repository(parameters["repository"])
    data_date = MIDNIGHT if cutoff is Cutoff.MIDNIGHT else INSTANT
    with cluster.compiled(settings) as package:
        made = cluster.schedule(
            _cluster(host, namespace, experiment),
            package,
            {**parameters, "data_date": data_date},
            name=name,
            cron=cron,
            service_account=service_account,
        )
    instead = f", instead of {', '.join(made.replaced)}" if made.replaced else ""
    print(f"scheduled {name!r} ({made.cron}, UTC) as {made.schedule_id}{instead}")


def main() -> None:
    """Run the command line; an error of the user's making is one line on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except HiertcnError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted; the same command resumes where this run stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _settings(
    image: str,
    resources: list[str] | None,
    resources_file: Path | None,
    volumes: list[str] | None,
    secrets: list[str] | None,
) -> Any:
    from pipelines.daily import ClusterSettings, SecretVariable, Volume
    from pipelines.resources import resources as read_resources

    return ClusterSettings(
        image=image,
        resources=read_resources(resources or [], resources_file),
        volumes=[Volume.parse(text) for text in volumes or []],
        secrets=[SecretVariable.parse(text) for text in secrets or []],
    )


def _cluster(host: str, namespace: str, experiment: str) -> Any:
    from pipelines.cluster import Cluster

    return Cluster(
        host=host,
        namespace=namespace,
        experiment=experiment,
        token=os.environ.get("KF_PIPELINES_TOKEN", ""),
    )


def _check_repository(repository: str) -> None:
    if not Path(repository).is_absolute():
        raise InputError(
            f"--repository {repository!r} is relative, so the release would vanish with the step's "
            "container; expected an absolute path on a volume mounted with --volume CLAIM:/PATH"
        )


if __name__ == "__main__":
    main()
