"""The container without Docker: linted, read as Docker reads it, and its steps run in folders that stand for those of
the image."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from adadiff import cli
from adadiff.serving.app import GENERATIONS
from deploy.recipe import DOCKERFILE, ROOT, Recipe, Stage, copy_into, copy_steps, in_context, tracked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEVICES = ("cpu", "cu130")
SECONDS = 120  # after which a test gives up


def hadolint() -> str:
    path = shutil.which("hadolint", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if path is None:
        pytest.skip("hadolint is not installed")
    return path


def test_hadolint_finds_nothing() -> None:
    checked = subprocess.run([hadolint(), "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN sudo true\nRUN pip install torch\n")
    checked = subprocess.run(
        [hadolint(), "--no-color", tmp_path / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 1
    assert {"DL3004", "DL3006", "DL3013", "DL3042"} <= set(re.findall(r"DL\d+", checked.stdout))


@pytest.mark.parametrize("device", DEVICES)
def test_stages_rest_on_pinned_images(device: str) -> None:
    recipe = Recipe.read(DEVICE=device)
    for name in recipe.stages:
        assert re.search(r":\d+\.\d+\.\d+-", recipe.image(name)), name
    assert recipe.image("build") == recipe.image(""), "else its virtual environment has no Python there"
    (version,) = re.findall(r"^python:([\d.]+)-slim", recipe.image(""))
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    assert recipe.arguments["TORCH_INDEX"] == f"https://download.pytorch.org/whl/{device}"
    torch = next(Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch"))
    assert torch.specifier.contains(recipe.arguments["TORCH_VERSION"])


def packages(stages: list[Stage]) -> set[str]:
    """Of Debian, which the stages install."""
    commands = " && ".join(value for stage in stages for value in stage.all("RUN")).split("&&")
    install = [shlex.split(command) for command in commands if "apt-get install" in command]
    return {word for words in install for word in words[2:] if not word.startswith("-")}


def test_the_final_image_has_no_compiler_and_no_root() -> None:
    for device in DEVICES:
        recipe = Recipe.read(DEVICE=device)
        assert "g++" in packages(recipe.chain("build"))
        # Triton needs one on a GPU
        assert packages(recipe.chain("")) == ({"wget"} if device == "cpu" else {"wget", "gcc", "libc6-dev"})
        uid, gid = recipe.stages[""].all("USER")[-1].split(":")
        assert int(uid) > 0, "a number, for Kubernetes to know that it is not root"
        assert int(gid) > 0
        assert any(f"useradd --uid {uid} " in value for stage in recipe.chain("") for value in stage.all("RUN"))


def test_no_secret_is_built_in() -> None:
    settings = [value for stage in Recipe.read().stages.values() for value in (*stage.all("ENV"), *stage.all("ARG"))]
    assert not [value for value in settings if re.search("key|token|secret|password", value, flags=re.IGNORECASE)]


def test_extras_are_those_of_the_project() -> None:
    asked = re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE.read_text())
    assert "serve" in asked
    for names in asked:
        assert set(names.split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_context_is_what_is_copied() -> None:
    sources = {source.rstrip("/") for given, _ in copy_steps(Recipe.read().stages["build"]) for source in given}
    assert {"csrc", "adadiff_kernels", "python", "pyproject.toml", "setup.py"} <= sources
    for name in sources:
        assert in_context(name), name
    for name in (".git/config", "tests/conftest.py", "benchmarks/run.py", ".venv/bin/python", "secrets.env"):
        assert not in_context(name), name
    for name in ("adadiff_kernels/_C.cpython-311-x86_64-linux-gnu.so", "python/adadiff/__pycache__/cli.pyc"):
        assert not in_context(name), name
    assert in_context("python/adadiff/checkpoints/digits.safetensors")
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == sources


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def until_ready(port: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:  # refused, or 503
            time.sleep(0.05)
    raise AssertionError(f"not ready; exit code {process.poll()}")


@pytest.mark.slow
def test_the_steps_install_a_service_that_draws_and_ends(tmp_path: Path) -> None:
    """Those of the stage `build`, but for Debian's packages, the compiler among them, and the download of PyTorch: the
    packages of this environment stand in for it. Then what the image runs, its health check, and SIGTERM as `docker
    stop` sends it."""
    recipe = Recipe.read()
    build, image = recipe.stages["build"], recipe.stages[""]
    installed, source = tmp_path / "adadiff", tmp_path / "src"
    assert build.all("WORKDIR") == ["/src"]
    copied = set(copy_into(source, build))
    missing = {name for name in tracked("csrc", "adadiff_kernels", "python") if name not in copied}
    assert not missing

    def there(text: str) -> str:
        return text.replace("/opt/adadiff", str(installed))

    paths = {there(value) for value in (*build.all("ENV"), *image.all("ENV")) if value.startswith("PATH=")}
    assert paths == {f"PATH={installed}/bin:$PATH"}
    tools = tmp_path / "tools"  # a PATH without a compiler: `make install` has proved that the extension compiles
    tools.mkdir()
    (tools / "sh").symlink_to(shutil.which("sh"))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")}
    environment |= {"PATH": f"{installed}/bin:{tools}", "EXTRAS": recipe.own("build", "EXTRAS"), "OMP_NUM_THREADS": "1"}
    environment["PIP_NO_BUILD_ISOLATION"] = "0"  # which turns isolation off; setuptools is here
    ran = []
    for command in build.all("RUN"):
        if "apt-get" in command:
            continue
        if "torch==" in command:  # what is installed here counts as installed there
            (packages,) = installed.glob("lib/python*/site-packages")
            here = [path for path in sys.path if path.endswith("site-packages")]
            (packages / "here.pth").write_text("\n".join(here) + "\n")
            for old in packages.glob("setuptools*"):  # which Python 3.11 puts there, too old for pyproject.toml
                shutil.rmtree(old)
            continue
        if command.startswith("python -m venv"):
            command = there(command).replace("python", shlex.quote(sys.executable), 1)
        subprocess.run(["sh", "-ec", there(command)], cwd=source, env=environment, check=True)
        ran.append(command)
    assert len(ran) == 2

    port = free_port()
    words = [*image.last("ENTRYPOINT"), *(str(port) if word == "8000" else word for word in image.last("CMD"))]
    assert str(port) in words
    (check,) = image.all("HEALTHCHECK")
    health = check.partition("CMD ")[2].replace(":8000", f":{port}")
    home = tmp_path / "home"
    home.mkdir()
    with (tmp_path / "log").open("w") as log:
        program = shutil.which(words[0], path=environment["PATH"])
        process = subprocess.Popen([program, *words[1:]], cwd=home, env=environment, stderr=log)
    try:
        until_ready(port, process)
        (where,) = installed.glob("lib/python*/site-packages/adadiff/__init__.py")
        said = subprocess.run(
            [installed / "bin" / "python", "-c", "import adadiff; print(adadiff.__file__)"],
            cwd=home,
            env=environment,
            text=True,
            capture_output=True,
        )
        assert said.stdout == f"{where}\n"
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}{GENERATIONS}",
            b'{"class_label": 7, "num_inference_steps": 2, "response_format": "png"}',
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=SECONDS) as reply:
            assert reply.read(8) == b"\x89PNG\r\n\x1a\n"
        if shutil.which("wget"):
            assert healthy(health)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        if shutil.which("wget"):
            assert not healthy(health)
    finally:
        process.kill()
        process.wait()


def healthy(check: str) -> bool:
    return subprocess.run(json.loads(check), capture_output=True, check=False).returncode == 0


def test_the_command_of_the_image_is_one_and_its_health_check_asks_what_is_served() -> None:
    image = Recipe.read().stages[""]
    options = cli.parser().parse_args(image.last("CMD"))
    assert image.last("ENTRYPOINT") == ["adadiff"]
    assert (options.host, [str(options.port)]) == ("0.0.0.0", image.all("EXPOSE"))
    (check,) = image.all("HEALTHCHECK")
    assert f'"http://127.0.0.1:{options.port}/health"' in check
