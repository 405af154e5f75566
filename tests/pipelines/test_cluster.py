"""Compiling, submitting and scheduling, against Kubeflow's own loaders and a real HTTP server."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, components, dsl

from hiertcn.errors import InputError
from pipelines.__main__ import main
from pipelines.cluster import Cluster, compile_pipeline, schedule, submit
from pipelines.daily import STEPS, ClusterSettings, SecretVariable, Volume
from pipelines.parameters import PARAMETERS
from pipelines.resources import resources

PARAMETERS_GIVEN = {"events": "s3://log/events", "repository": "/repository"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of one step: what is sent with it does not depend on its size."""

    def nothing(events: str) -> None:
        pass

    def small(events: str = "") -> None:
        dsl.component(nothing, base_image="hiertcn", install_kfp_package=False)(events=events)

    path = tmp_path_factory.mktemp("package") / "small.yaml"
    compiler.Compiler().compile(dsl.pipeline(small, name="small"), str(path))
    return path


def compiled(path: Path, settings: ClusterSettings, **parameters: Any) -> tuple[Any, Any]:
    compile_pipeline(path, settings, parameters)
    components.load_component_from_file(str(path))
    documents = list(yaml.safe_load_all(path.read_text()))
    return documents[0], documents[1] if len(documents) > 1 else {}


@pytest.fixture(scope="module")
def daily(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The compiled pipeline and its platform part, with an image, a volume and a secret."""
    settings = ClusterSettings(
        image="registry.example/hiertcn:7",
        volumes=[Volume.parse("releases:/repository")],
        secrets=[SecretVariable.parse("AWS_SECRET_ACCESS_KEY=storage.secret.key")],
    )
    return compiled(tmp_path_factory.mktemp("daily") / "daily.yaml", settings)


def tasks_of(spec: Any) -> dict[str, Any]:
    tasks = dict(spec["root"]["dag"]["tasks"])
    gate = tasks.pop("condition-1")
    tasks.update(spec["components"][gate["componentRef"]["name"]]["dag"]["tasks"])
    return {name.replace("-", "_"): task for name, task in tasks.items()}


def executors_of(spec: Any) -> dict[str, Any]:
    return {
        name.removeprefix("exec-").replace("-", "_"): executor["container"]
        for name, executor in spec["deploymentSpec"]["executors"].items()
    }


def test_every_step_runs_on_the_image_and_installs_nothing(daily: Any) -> None:
    spec, _ = daily
    executors = executors_of(spec)
    assert set(executors) == set(STEPS) == set(tasks_of(spec))
    for executor in executors.values():
        assert executor["image"] == "registry.example/hiertcn:7"
        assert "pip" not in " ".join(executor["command"][:3])


def test_resources_retries_timeouts_and_caching_are_in_the_yaml(tmp_path: Path) -> None:
    options = [
        "all.retries=1",
        "train_hiertcn.gpu=2",
        "train_hiertcn.accelerator=amd.com/gpu",
        "train_hiertcn.cpu=500m",
        "train_hiertcn.memory=3Gi",
        "train_hiertcn.timeout_s=77",
        "train_hiertcn.retries=4",
        "train_hiertcn.backoff_s=9",
        "build_sessions.cache=false",
        "build_sessions.timeout_s=0",
        "evaluate.retries=0",
    ]
    spec, platform = compiled(tmp_path / "p.yaml", ClusterSettings(resources=resources(options)))
    tasks, executors = tasks_of(spec), executors_of(spec)
    train = executors["train_hiertcn"]["resources"]
    assert train["accelerator"]["resourceType"] == "amd.com/gpu"
    assert int(train["accelerator"]["resourceCount"]) == 2
    assert train["resourceCpuRequest"] == train["resourceCpuLimit"] == "500m"
    assert train["resourceMemoryRequest"] == train["resourceMemoryLimit"] == "3Gi"
    assert tasks["train_hiertcn"]["retryPolicy"]["maxRetryCount"] == 4
    assert tasks["train_hiertcn"]["retryPolicy"]["backoffDuration"] == "9s"
    assert tasks["embed_items"]["retryPolicy"]["maxRetryCount"] == 1
    assert "retryPolicy" not in tasks["evaluate"]
    assert "accelerator" not in executors["embed_items"]["resources"]

    cached = {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")}
    assert cached == set(STEPS) - {"ingest_events", "publish_release", "build_sessions"}

    limits = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert limits["exec-train-hiertcn"]["activeDeadlineSeconds"] == "77"
    assert "exec-build-sessions" not in limits


def test_a_file_gives_resources_and_options_win_over_it(tmp_path: Path) -> None:
    file = tmp_path / "resources.toml"
    file.write_text('[all]\ncpu = "3"\n[evaluate]\ncpu = "5"\ncache = false\ngpu = 1\n')
    chosen = resources(["evaluate.gpu=0"], file)
    assert (chosen["evaluate"].cpu, chosen["evaluate"].cache, chosen["evaluate"].gpu) == (
        "5",
        False,
        0,
    )
    assert chosen["embed_items"].cpu == "3"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("train_hiertcn.gpu", "STEP.KEY=VALUE"),
        ("train.gpu=1", "the steps are"),
        ("train_hiertcn.gpus=1", "the keys of a step are"),
        ("train_hiertcn.gpu=one", "a whole number"),
        ("train_hiertcn.gpu=-1", "0 or more"),
        ("train_hiertcn.cache=yes", "true or false"),
        ("train_hiertcn.memory=8 GB", "Kubernetes quantity"),
        ("ingest_events.cache=true", "never cached"),
    ],
)
def test_wrong_resources_are_refused(option: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        resources([option])


def test_volumes_and_secrets_reach_every_step(daily: Any) -> None:
    _, platform = daily
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == len(STEPS)
    for executor in executors.values():
        assert executor["pvcMount"][0]["mountPath"] == "/repository"
        assert executor["pvcMount"][0]["constant"] == "releases"
        secret = executor["secretAsEnv"][0]
        assert secret["secretName"] == "storage.secret"
        assert secret["keyToEnv"] == [{"secretKey": "key", "envVar": "AWS_SECRET_ACCESS_KEY"}]


@pytest.mark.parametrize("text", ["releases", "releases:repository", ":/x"])
def test_a_wrong_volume_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="CLAIM:/PATH"):
        Volume.parse(text)


def test_parameters_keep_their_types_defaults_and_descriptions(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path / "p.yaml", ClusterSettings(), max_epochs=3, event_types=["click"])
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    kinds = {str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE", list: "LIST"}
    for item in PARAMETERS:
        assert inputs[item.name]["parameterType"] == kinds[type(item.default)]
        assert inputs[item.name]["description"] == item.description
    assert inputs["max_epochs"]["defaultValue"] == 3
    assert inputs["event_types"]["defaultValue"] == ["click"]
    assert inputs["patience"]["defaultValue"] == 3


def test_the_gate_decides_over_all_that_serves(daily: Any) -> None:
    spec, _ = daily
    gate = spec["root"]["dag"]["tasks"]["condition-1"]
    assert "evaluate-Output" in gate["triggerPolicy"]["condition"]
    inside = spec["components"][gate["componentRef"]["name"]]["dag"]["tasks"]
    assert set(inside) == {
        *("tune-item-table", "export-onnx", "backfill-user-states", "publish-release"),
    }


def test_every_cached_step_depends_on_a_lineage(daily: Any) -> None:
    spec, _ = daily
    for name, task in tasks_of(spec).items():
        if name != "ingest_events":
            assert any("lineage" in parameter for parameter in task["inputs"]["parameters"]), name


def test_output_must_be_yaml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.yaml"):
        compile_pipeline(tmp_path / "p.json", ClusterSettings())


def test_submit_starts_a_run_with_the_parameters(kubeflow: Any, package: Path) -> None:
    cluster = Cluster(host=kubeflow.host, token="secret")
    run_id = submit(cluster, package, PARAMETERS_GIVEN, run_name="today", service_account="runner")
    (run,) = kubeflow.runs
    assert run["run_id"] == run_id
    assert run["display_name"] == "today"
    assert run["service_account"] == "runner"
    assert run["experiment_id"] == kubeflow.experiments[0]["experiment_id"]
    sent = run["runtime_config"]["parameters"]
    assert sent["events"] == "s3://log/events"
    assert set(sent) == {item.name for item in PARAMETERS}
    assert kubeflow.tokens == {"Bearer secret"}

    submit(cluster, package, PARAMETERS_GIVEN, run_name="again")
    assert len(kubeflow.experiments) == 1


def test_schedule_runs_without_catch_up_and_takes_the_scheduled_date(
    kubeflow: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "pipelines schedule --events s3://log/events --repository /repository --host"
    monkeypatch.setattr(sys, "argv", [*command.split(), kubeflow.host, "--cron", "30 3 * * *"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    (made,) = kubeflow.schedules.values()
    assert made["trigger"] == {"cron_schedule": {"cron": "0 30 3 * * *"}}
    assert made["no_catchup"] is True
    assert int(made["max_concurrency"]) == 1
    assert made["mode"] == "ENABLE"
    parameters = made["runtime_config"]["parameters"]
    assert parameters["data_date"] == "[[ScheduledTime.2006-01-02T00:00:00Z]]"
    ingest = made["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]["ingest-events"]
    scheduled = ingest["inputs"]["parameters"]["scheduled_time"]["runtimeValue"]["constant"]
    assert scheduled == "{{$.pipeline_job_schedule_time_utc}}"
    assert "scheduled 'hiertcn-daily'" in capsys.readouterr().out


def schedule_once(kubeflow: Any, package: Path, cron: str, name: str = "daily") -> Any:
    cluster = Cluster(host=kubeflow.host)
    return schedule(cluster, package, PARAMETERS_GIVEN, name=name, cron=cron)


def test_a_schedule_of_the_same_name_is_replaced_and_never_missing(
    kubeflow: Any, package: Path
) -> None:
    other = schedule_once(kubeflow, package, "0 1 * * *", name="other")
    first = schedule_once(kubeflow, package, "0 2 * * *")
    second = schedule_once(kubeflow, package, "0 3 * * *")
    assert second.replaced == (first.schedule_id,)
    assert set(kubeflow.schedules) == {other.schedule_id, second.schedule_id}
    # other, first, second beside first, second alone: the daily one is always there.
    assert kubeflow.active_counts == [1, 2, 3, 2]


def test_all_earlier_schedules_of_the_name_are_found_over_pages(
    kubeflow: Any, package: Path
) -> None:
    kubeflow.refused = {"GET recurringruns"}
    with pytest.raises(InputError, match="403 GET of recurringruns is not allowed"):
        schedule_once(kubeflow, package, "0 2 * * *")
    kubeflow.refused = set()
    schedule_once(kubeflow, package, "0 2 * * *")
    (first,) = kubeflow.schedules.values()
    for copy in range(3):
        kubeflow.schedules[f"copy-{copy}"] = {**first, "recurring_run_id": f"copy-{copy}"}
    last = schedule_once(kubeflow, package, "0 4 * * *")
    assert set(kubeflow.schedules) == {last.schedule_id}


def test_an_earlier_schedule_that_cannot_be_deleted_is_disabled(
    kubeflow: Any, package: Path
) -> None:
    first = schedule_once(kubeflow, package, "0 2 * * *")
    kubeflow.refused = {"DELETE recurringruns"}
    second = schedule_once(kubeflow, package, "0 3 * * *")
    modes = {key: value["mode"] for key, value in kubeflow.schedules.items()}
    assert modes == {first.schedule_id: "DISABLE", second.schedule_id: "ENABLE"}


def test_an_earlier_schedule_that_stays_withdraws_the_new_one(kubeflow: Any, package: Path) -> None:
    first = schedule_once(kubeflow, package, "0 2 * * *")
    kubeflow.protected = {first.schedule_id}
    with pytest.raises(InputError, match="it stays and the new one was withdrawn"):
        schedule_once(kubeflow, package, "0 3 * * *")
    assert set(kubeflow.schedules) == {first.schedule_id}
    assert kubeflow.schedules[first.schedule_id]["mode"] == "ENABLE"


def test_a_host_that_is_gone_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = f"pipelines submit --events x --repository /r --host http://127.0.0.1:{port}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"Kubeflow Pipelines at http://127.0.0.1:{port} could not be reached" in said


def test_a_host_that_is_no_kubeflow_says_so(kubeflow: Any, package: Path) -> None:
    with pytest.raises(InputError, match="answered 404"):
        submit(
            Cluster(host=f"{kubeflow.host}/elsewhere"),
            package,
            PARAMETERS_GIVEN,
            run_name="x",
        )
    with pytest.raises(InputError, match="no address"):
        Cluster(host="localhost:8080")


def test_a_relative_repository_is_refused_on_a_cluster(
    kubeflow: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", f"pipelines submit --events x --host {kubeflow.host}".split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--repository 'repository' is relative" in capsys.readouterr().err
