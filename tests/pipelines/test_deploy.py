"""The files of deploy/ agree with the project."""

import re
from pathlib import Path

import yaml

from hiertcn import __version__
from pipelines.daily import DEFAULT_IMAGE

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def test_kubernetes_manifests_parse_and_use_this_version() -> None:
    kinds = []
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        text = file.read_text()
        kinds += [document["kind"] for document in yaml.safe_load_all(text)]
        for image in re.findall(r"image: (hiertcn:\S+)", text):
            assert image == DEFAULT_IMAGE, file.name
    assert sorted(kinds) == ["PersistentVolumeClaim", "Service", "StatefulSet"]


def test_the_sidecars_volumes_and_ports_are_declared() -> None:
    stateful, service = yaml.safe_load_all((DEPLOY / "kubernetes" / "serving.yaml").read_text())
    pod = stateful["spec"]["template"]["spec"]
    claims = [claim["metadata"]["name"] for claim in stateful["spec"]["volumeClaimTemplates"]]
    volumes = {volume["name"] for volume in pod["volumes"]} | set(claims)
    ports = set()
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        ports |= {port["name"] for port in container.get("ports", [])}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_the_image_holds_every_package_and_the_pinned_versions() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert f"hiertcn:{__version__}" in text
    assert "--constraint constraints.txt" in text
    for name in ("hiertcn", "models", "components", "pipelines", "triton_repo"):
        assert f"COPY {name} {name}" in text
        assert (ROOT / name).is_dir()
    wanted = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert f"!{source.split('/')[0]}" in wanted, source
