"""The daily pipeline: which step reads what, and how each is run.

    ingest_events -> build_sessions -> build_item_graph -> train_item_encoder -> embed_items
      -> train_hiertcn -> evaluate -> (if the gate passes) tune_item_table -> export_onnx
      -> backfill_user_states -> publish_release

Sessions come before the graph because they say where the test sessions start: what the evaluation
asks about must not have shaped the item vectors. So graph and item table exist twice, as of then
(training, evaluation) and as of now (serving), from one encoder. Where HierTCN trains the vectors
of the former, tune_item_table adds what they learnt to the latter.

The same pipeline is compiled for a cluster and run by Kubeflow's local runner. A step gets the
pipeline parameters that its function names, the artifacts given here, and the lineage of every
step it reads from (components/step.py says why); it never finds anything by itself.

The functions become components here and not where they are written, because the image is chosen
when the pipeline is compiled.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from kfp import dsl
from kfp.dsl import HTML, Artifact, Model

from components.backfill_user_states import backfill_user_states
from components.build_item_graph import build_item_graph
from components.build_sessions import build_sessions
from components.embed_items import embed_items
from components.evaluate import evaluate
from components.export_onnx import export_onnx
from components.ingest_events import ingest_events
from components.publish_release import publish_release
from components.step import SOURCE
from components.train_hiertcn import train_hiertcn
from components.train_item_encoder import train_item_encoder
from components.tune_item_table import tune_item_table
from hiertcn import __version__
from hiertcn.errors import InputError
from pipelines.parameters import PARAMETERS
from pipelines.resources import DEFAULTS, NEVER_CACHED, Resources

NAME: Final = "hiertcn-daily"
DEFAULT_IMAGE: Final = f"hiertcn:{__version__}"
STEPS: Final = tuple(DEFAULTS)


class Outputs(NamedTuple):
    """The pipeline's outputs: those of steps that always run."""

    snapshot: Artifact
    graph: Artifact
    item_encoder: Model
    model: Model
    evaluation: Artifact
    report: HTML
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A persistent volume claim, mounted into every step."""

    claim: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "Volume":
        """Read ``CLAIM:/PATH``."""
        claim, colon, path = text.partition(":")
        if not (claim and colon and path.startswith("/")):
            raise InputError(
                f"--volume {text!r} was not understood; expected CLAIM:/PATH, such as "
                "releases:/repository"
            )
        return cls(claim=claim, path=path)


@dataclass(frozen=True, kw_only=True)
class SecretVariable:
    """A key of a Kubernetes secret, given to every step as an environment variable."""

    secret: str
    key: str
    variable: str

    @classmethod
    def parse(cls, text: str) -> "SecretVariable":
        """Read ``VARIABLE=SECRET.KEY``."""
        variable, equals, source = text.partition("=")
        secret, dot, key = source.rpartition(".")
        if not (variable and equals and secret and dot and key):
            raise InputError(
                f"--secret {text!r} was not understood; expected VARIABLE=SECRET.KEY, such as "
                "AWS_SECRET_ACCESS_KEY=storage.secret-key"
            )
        return cls(secret=secret, key=key, variable=variable)


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """How the steps run on a cluster."""

    image: str = DEFAULT_IMAGE
    resources: Mapping[str, Resources] = field(default_factory=lambda: dict(DEFAULTS))
    volumes: Sequence[Volume] = ()
    secrets: Sequence[SecretVariable] = ()


def cluster_pipeline(settings: ClusterSettings) -> Any:
    """Return the pipeline (a kfp pipeline object) to compile for a cluster."""

    def configure(task: Any, name: str) -> None:
        _set_resources(task, settings.resources[name])
        _set_platform(task, settings, settings.resources[name])

    scheduled_time = dsl.PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER
    return _pipeline(settings.image, configure, scheduled_time)


def local_pipeline(*, cache: bool, source: str) -> Any:
    """Return the pipeline for the local runner, its steps one after the other in their order.

    Args:
        cache: whether steps with unchanged inputs are skipped.
        source: hash of the program's source; another one makes every step run again.
    """

    added: list[Any] = []

    def configure(task: Any, name: str) -> None:
        # The local runner goes on with whatever does not depend on a step that failed.
        if added and task.parent_task_group is added[-1].parent_task_group:
            task.after(added[-1])
        added.append(task)
        task.set_caching_options(cache and name not in NEVER_CACHED)
        # The variable's value is part of the local runner's cache key.
        task.set_env_variable(SOURCE, source)

    return _pipeline(DEFAULT_IMAGE, configure, "")


def _pipeline(image: str, configure: Callable[[Any, str], None], scheduled_time: str) -> Any:
    def daily(*values: Any) -> Any:
        steps = _Steps(
            image, configure, dict(zip([item.name for item in PARAMETERS], values, strict=True))
        )
        return _connect(steps, scheduled_time)

    daily.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                item.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=item.default,
                annotation=list[str] if isinstance(item.default, list) else type(item.default),
            )
            for item in PARAMETERS
        ],
        return_annotation=Outputs,
    )
    daily.__doc__ = "From an event log to a published release.\n\nArgs:\n" + "\n".join(
        f"    {item.name}: {item.description}" for item in PARAMETERS
    )
    return dsl.pipeline(daily, name=NAME, description="From an event log to a published release.")


def _connect(steps: "_Steps", scheduled_time: str) -> Outputs:
    ingested = steps.add(ingest_events, scheduled_time=scheduled_time)
    snapshot, item_index = ingested["snapshot"], ingested["item_index"]
    parent_release = ingested["parent_release"]
    sessions = steps.add(
        build_sessions,
        lineage=ingested["lineage"],
        snapshot=snapshot,
        item_index=item_index,
    )
    graph = steps.add(
        build_item_graph,
        lineage=ingested["lineage"],
        sessions_lineage=sessions["lineage"],
        snapshot=snapshot,
        item_index=item_index,
        sessions=sessions["sessions"],
    )
    encoder = steps.add(
        train_item_encoder,
        lineage=graph["lineage"],
        snapshot=snapshot,
        item_index=item_index,
        training_graph=graph["training_graph"],
        parent_release=parent_release,
    )
    embedded = steps.add(
        embed_items,
        lineage=encoder["lineage"],
        snapshot=snapshot,
        item_index=item_index,
        sessions=sessions["sessions"],
        graph=graph["graph"],
        training_graph=graph["training_graph"],
        features=encoder["features"],
        item_encoder=encoder["item_encoder"],
    )
    trained = steps.add(
        train_hiertcn,
        items_lineage=embedded["lineage"],
        sessions_lineage=sessions["lineage"],
        sessions=sessions["sessions"],
        training_table=embedded["training_table"],
        parent_release=parent_release,
    )
    evaluated = steps.add(
        evaluate,
        lineage=trained["lineage"],
        snapshot=snapshot,
        item_index=item_index,
        graph=graph["graph"],
        item_encoder=encoder["item_encoder"],
        sessions=sessions["sessions"],
        training_table=embedded["training_table"],
        model=trained["model"],
        parent_release=parent_release,
    )
    # The local runner takes a step's only output in a condition, not one that has a name.
    with dsl.If(evaluated["Output"] == True, name="gate-passed"):  # noqa: E712
        tuned = steps.add(
            tune_item_table,
            lineage=trained["lineage"],
            embedded_table=embedded["item_table"],
            training_table=embedded["training_table"],
            model=trained["model"],
        )
        exported = steps.add(
            export_onnx,
            lineage=trained["lineage"],
            items_lineage=tuned["lineage"],
            model=trained["model"],
            item_encoder=encoder["item_encoder"],
            item_table=tuned["item_table"],
            sessions=sessions["sessions"],
        )
        states = steps.add(
            backfill_user_states,
            lineage=exported["lineage"],
            items_lineage=tuned["lineage"],
            sessions=sessions["sessions"],
            item_table=tuned["item_table"],
            onnx=exported["onnx"],
        )
        steps.add(
            publish_release,
            lineage=states["lineage"],
            release_date=ingested["release_date"],
            item_index=item_index,
            features=encoder["features"],
            item_encoder=encoder["item_encoder"],
            item_table=tuned["item_table"],
            neighbor_index=tuned["neighbor_index"],
            item_layers=embedded["item_layers"],
            popularity=embedded["popularity"],
            item_attributes=embedded["item_attributes"],
            model=trained["model"],
            onnx=exported["onnx"],
            user_states=states["user_states"],
            evaluation=evaluated["evaluation"],
            report=evaluated["report"],
        )
    return Outputs(
        snapshot=snapshot,
        graph=graph["graph"],
        item_encoder=encoder["item_encoder"],
        model=trained["model"],
        evaluation=evaluated["evaluation"],
        report=evaluated["report"],
        passed=evaluated["Output"],
    )


class _Steps:
    """Adds steps to the pipeline under construction."""

    def __init__(
        self,
        image: str,
        configure: Callable[[Any, str], None],
        parameters: Mapping[str, Any],
    ) -> None:
        self._image = image
        self._configure = configure
        self._parameters = parameters

    def add(self, function: Callable[..., Any], **inputs: Any) -> dict[str, Any]:
        """Add the step; its other inputs are the pipeline parameters of the same names.

        Returns its outputs by name. The value that most steps return is their lineage.
        """
        component = dsl.component(function, base_image=self._image, install_kfp_package=False)
        wanted = component.component_spec.inputs or {}
        task = component(
            **inputs,
            **{name: self._parameters[name] for name in wanted if name not in inputs},
        )
        self._configure(task, function.__name__)
        outputs = dict(task.outputs)
        if "Output" in outputs:
            outputs["lineage"] = outputs["Output"]
        return outputs


def _set_resources(task: Any, resources: Resources) -> None:
    task.set_caching_options(resources.cache)
    task.set_cpu_request(resources.cpu).set_cpu_limit(resources.cpu)
    task.set_memory_request(resources.memory).set_memory_limit(resources.memory)
    if resources.gpu:
        task.set_accelerator_type(resources.accelerator).set_accelerator_limit(resources.gpu)
    if resources.retries:
        task.set_retry(
            resources.retries, backoff_duration=f"{resources.backoff_s}s", backoff_factor=2.0
        )


def _set_platform(task: Any, settings: ClusterSettings, resources: Resources) -> None:
    # The keys are those of kubernetes_executor_config.proto of Kubeflow's Kubernetes platform;
    # older backends read the deprecated field of each pair.
    platform: dict[str, Any] = {}
    if resources.timeout_s:
        platform["activeDeadlineSeconds"] = str(resources.timeout_s)
    if settings.volumes:
        platform["pvcMount"] = [
            {
                "mountPath": volume.path,
                "constant": volume.claim,
                "pvcNameParameter": {"runtimeValue": {"constant": volume.claim}},
            }
            for volume in settings.volumes
        ]
    if settings.secrets:
        platform["secretAsEnv"] = [
            {
                "secretName": secret.secret,
                "secretNameParameter": {"runtimeValue": {"constant": secret.secret}},
                "keyToEnv": [{"secretKey": secret.key, "envVar": secret.variable}],
                "optional": False,
            }
            for secret in settings.secrets
        ]
    if platform:
        task.platform_config["kubernetes"] = platform
