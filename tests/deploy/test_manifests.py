"""systemd, Kubernetes, KubeRay, Prometheus: files that parse, and agree with the command, the image and each other."""

import configparser
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

pytest.importorskip("yaml")
import yaml

from adadiff import cli
from adadiff.commands.serve import KEY_VARIABLE
from adadiff.serving import lifecycle
from deploy.recipe import ROOT, Recipe
from deploy.test_container import PROJECT

DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "adadiff.service").read_text()
DEPLOYMENT, SERVICE = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
RAY = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())


def serve_options(words: list[str]) -> Any:
    """Of a command line `adadiff serve ...`, without its first word."""
    options = cli.parser().parse_args(words)
    assert words[0] == "serve"
    return options


def unit() -> dict[str, dict[str, str]]:
    found = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    found.optionxform = str
    found.read_string(UNIT)
    return {name: dict(section) for name, section in found.items()}


def test_the_unit_runs_the_command_and_waits_for_its_end() -> None:
    service = unit()["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).name == "adadiff"
    options = serve_options(words)
    assert int(service["TimeoutStopSec"]) >= options.drain_timeout + lifecycle.ABORT_SECONDS
    assert service["EnvironmentFile"].startswith("-"), "it need not be there"
    assert KEY_VARIABLE in UNIT
    assert (service["NoNewPrivileges"], service["ProtectSystem"], service["DynamicUser"]) == ("yes", "strict", "yes")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / "adadiff.service"
    program = shlex.split(unit()["Service"]["ExecStart"])[0]
    copy.write_text(UNIT.replace(f"ExecStart={program}", "ExecStart=/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    copy.write_text(copy.read_text().replace("ProtectHome=yes", "ProtectHouse=yes"))
    checked = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert "ProtectHouse" in checked.stderr


def container() -> dict[str, Any]:
    (one,) = DEPLOYMENT["spec"]["template"]["spec"]["containers"]
    return one


def test_the_pods_run_the_image_as_its_user_and_wait_for_its_end() -> None:
    pod, image = DEPLOYMENT["spec"]["template"]["spec"], Recipe.read().stages[""]
    context = pod["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == image.all("USER")[-1]
    assert context["runAsNonRoot"] is True
    options = serve_options(container()["args"])
    assert options.host == "0.0.0.0", "else the probes do not reach it"
    (port,) = container()["ports"]
    assert port == {"name": "http", "containerPort": options.port}
    before = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= before + options.drain_timeout + lifecycle.ABORT_SECONDS
    home = image.all("WORKDIR")[-1]
    assert {mount["mountPath"] for mount in container()["volumeMounts"]} == {"/tmp", home}, "the rest is read-only"
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True


def test_probes_ask_what_they_are_for() -> None:
    """/health: a restart is the cure. /ready: requests may come."""
    probes = {name: probe["httpGet"] for name, probe in container().items() if name.endswith("Probe")}
    paths = {name: probe["path"] for name, probe in probes.items()}
    assert paths == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert {probe["port"] for probe in probes.values()} == {"http"}


def test_the_service_finds_the_pods() -> None:
    template = DEPLOYMENT["spec"]["template"]["metadata"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= template["labels"].items()
    assert SERVICE["spec"]["selector"].items() <= template["labels"].items()
    assert [port["targetPort"] for port in SERVICE["spec"]["ports"]] == ["http"]
    assert [(one["kind"], one["apiVersion"]) for one in (DEPLOYMENT, SERVICE)] == [
        ("Deployment", "apps/v1"),
        ("Service", "v1"),
    ]
    environment = {one["name"]: one["valueFrom"] for one in container()["env"]}
    assert environment[KEY_VARIABLE]["secretKeyRef"]["optional"] is True
    assert environment["OMP_NUM_THREADS"]["resourceFieldRef"]["resource"] == "limits.cpu"
    assert "limits" in container()["resources"]


def test_prometheus_finds_both() -> None:
    single, pods = PROMETHEUS["scrape_configs"]
    assert single["static_configs"] == [{"targets": [f"127.0.0.1:{cli.parser().parse_args(['serve', 'x']).port}"]}]
    template = DEPLOYMENT["spec"]["template"]["metadata"]
    known = {}
    for kind in ("labels", "annotations"):
        for key, value in template[kind].items():
            known[f"__meta_kubernetes_pod_{kind[:-1]}_{re.sub('[^A-Za-z0-9]', '_', key)}"] = value
    for rule in pods["relabel_configs"]:
        assert not [name for name in rule["source_labels"] if name not in known and not name.endswith("pod_ip")]
        if rule.get("action") == "keep":
            (name,) = rule["source_labels"]
            assert re.fullmatch(rule["regex"], known[name])
    assert known["__meta_kubernetes_pod_annotation_prometheus_io_port"] == str(container()["ports"][0]["containerPort"])


def test_ray_runs_the_application_in_the_image_of_its_version() -> None:
    cluster = RAY["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [one for group in groups for one in group["template"]["spec"]["containers"]]
    assert {one["image"] for one in containers} == {"adadiff:ray"}
    for one in containers:  # whichever machine reads the keys
        (variable,) = one["env"]
        assert variable["name"] == KEY_VARIABLE
        assert variable["valueFrom"]["secretKeyRef"] == {"name": "adadiff", "key": "api-key", "optional": True}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    extras = PROJECT["optional-dependencies"]
    for text in extras.get("ray", ()):
        assert Requirement(text).specifier.contains(cluster["rayVersion"])
    config = yaml.safe_load(RAY["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (module, name, application["route_prefix"]) == ("adadiff.serving.ray", "app", "/")
    ports = {port["name"]: port["containerPort"] for port in containers[0]["ports"]}
    assert ports["serve"] == config["http_options"]["port"]


def test_ray_accepts_the_configuration() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray Serve is not installed")
    config = yaml.safe_load(RAY["spec"]["serveConfigV2"])
    assert schema.ServeDeploySchema.model_validate(config).applications[0].route_prefix == "/"
    module, _, name = config["applications"][0]["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    arguments = importlib.import_module(f"{module}.arguments").Arguments(**config["applications"][0]["args"])
    (group,) = RAY["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert (arguments.num_cpus, arguments.max_replicas) == (int(worker["resources"]["limits"]["cpu"]), 4)
