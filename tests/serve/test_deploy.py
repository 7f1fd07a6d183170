"""What deploy/ holds: options that the command knows, probes that exist, nothing that runs as root or moves."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from oarsmith import cli

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(DEPLOY.rglob("*.yaml"))
DOCUMENTS = [(path, one) for path in FILES for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
KINDS = {one["kind"]: one for _, one in DOCUMENTS if "kind" in one}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
POD = KINDS["Deployment"]["spec"]["template"]["spec"]
RUNTIME = KINDS["ServingRuntime"]["spec"]
COMPOSE = next(one for path, one in DOCUMENTS if path.name == "compose.yaml")["services"]["oarsmith"]
CONTAINERS = {"kubernetes": POD["containers"][0], "kserve": RUNTIME["containers"][0]}
ARGUMENTS = {
    "compose": COMPOSE["command"],
    **{name: container["args"] for name, container in CONTAINERS.items()},
    "docker": shlex.split(re.search(r"^CMD \[(.*)\]$", DOCKERFILE, re.MULTILINE).group(1).replace(",", " ")),
}


def option(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


def test_every_kind_is_there():
    assert set(KINDS) >= {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    assert set(KINDS) >= {"ServingRuntime", "InferenceService"}


@pytest.mark.parametrize("place", ARGUMENTS)
def test_arguments_are_options_of_the_command(place):
    # KServe fills in the name.
    cli.check([word.replace("{{.Name}}", "name") for word in ARGUMENTS[place]])


@pytest.mark.parametrize("place", CONTAINERS)
def test_containers_may_do_nothing_that_they_need_not(place):
    container = CONTAINERS[place]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] and security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security.get("runAsNonRoot") or POD["securityContext"]["runAsNonRoot"]
    assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
    # What is written somewhere is mounted there.
    assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("place", CONTAINERS)
def test_probes_ask_the_port_that_is_served(place):
    container, words = CONTAINERS[place], ARGUMENTS[place]
    ports = {port.get("name", port["containerPort"]): port["containerPort"] for port in container["ports"]}
    paths = set()
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[probe]["httpGet"]
        assert str(ports[asked["port"]]) == option(words, "port")
        paths.add(asked["path"])
    assert paths in ({"/health", "/ready"}, {"/v2/health/live", "/v2/health/ready"})


def test_whoever_ends_a_server_waits_until_it_has_answered():
    grace = int(option(ARGUMENTS["kubernetes"], "grace_seconds"))
    sleep = int(CONTAINERS["kubernetes"]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > grace + sleep
    predictor = KINDS["InferenceService"]["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] > int(option(ARGUMENTS["kserve"], "grace_seconds"))
    assert int(COMPOSE["stop_grace_period"].removesuffix("s")) > int(option(COMPOSE["command"], "grace_seconds"))


def test_images_are_named_by_a_version_and_run_as_nobody():
    images = [COMPOSE["image"], *(container["image"] for container in CONTAINERS.values())]
    images += re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert all(":" in image and not image.endswith(":latest") for image in images)
    user = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert user is not None and user.group(1) == str(POD["securityContext"]["runAsUser"]) != "0"
    assert DOCKERFILE.rindex("USER ") < DOCKERFILE.rindex("ENTRYPOINT")
    assert COMPOSE["read_only"] and COMPOSE["cap_drop"] == ["ALL"]


def test_what_the_dockerfile_copies_is_there():
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
    extras = re.search(r"'\.\[(.*)\]'", DOCKERFILE).group(1).split(",")
    known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras) <= set(known)


def test_the_autoscaler_and_the_adapter_speak_of_a_metric_that_is_served():
    [metric] = KINDS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    adapter = (DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text()
    assert f"'{name}{{" in adapter
    sources = "".join(path.read_text() for path in (ROOT / "src" / "oarsmith" / "serve").rglob("*.py"))
    assert f'"{name}"' in sources


def test_selectors_select_the_pods():
    labels = KINDS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert KINDS["Service"]["spec"]["selector"] == labels
    assert KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    ports = {port["name"] for port in CONTAINERS["kubernetes"]["ports"]}
    assert {port["targetPort"] for port in KINDS["Service"]["spec"]["ports"]} <= ports
