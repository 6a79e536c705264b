"""What is released. The source distribution holds what a build and a run read, and nothing else, whether there is a
compiler or not; the wheel made of it holds the packages' files, and works where there is no repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import adadiff
from adadiff.config import PRESETS
from adadiff.serving.web_page import FOLDER as PAGE
from adadiff.training.config import shipped
from deploy.recipe import ROOT, tracked

PACKAGES = {"adadiff_kernels/": "adadiff_kernels/", "python/": ""}  # where they lie here, and in a wheel
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
ABOUT = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"}
FOR_THE_BUILD = {"MANIFEST.in", "pyproject.toml", "setup.py"}
MADE = {"PKG-INFO", "setup.cfg"}  # by setuptools
MODELS = sorted(path.stem for path in (ROOT / "python/adadiff/checkpoints").glob("*.safetensors"))
NO_MODELS = {"digits_features", "letters_features", "digits_cascade"}  # but classifiers, and a student with an oracle
# Opens all that the packages read of their own, and tells what it was.
READS = """
import contextlib, io, json, pathlib, sys
import adadiff, adadiff_command, adadiff_kernels
from adadiff import cli
from adadiff.config import PRESETS
from adadiff.data import letters as typefaces
from adadiff.metrics import letters
from adadiff.metrics.features import digits_network
from adadiff.metrics.letters_network import letters_network
from adadiff.policies.spelling import parts_from
from adadiff.serving.web_page import FOLDER
from adadiff.training.config import load_config, shipped

models = {name: adadiff.load(name).num_layers for name in sys.argv[1:]}
images, report = adadiff.sample(adadiff.load("canvases"), 2, steps=20, policy="exit:budget=0.55", class_labels=3)
student, _ = adadiff.sample(adadiff.load("digits"), 2, steps=4, policy="cascade:digits_cascade,share=0", class_labels=3)
digits_network(), letters_network(), letters.held_out(), parts_from("width:digits_slim")
recipes = {name: load_config(name, {}).preset for name in shipped()}
with contextlib.redirect_stdout(io.StringIO()) as help, contextlib.suppress(SystemExit):
    cli.main(["train", "--help"])
files = [module.__file__ for module in (adadiff, adadiff_command, adadiff_kernels)]
print(json.dumps({
    "files": files, "models": models, "finite": bool(images.isfinite().all()), "recipes": recipes,
    "left_out": report.macs < report.macs_full, "presets": sorted(PRESETS),
    "page": sorted(path.name for path in FOLDER.iterdir()), "help": help.getvalue(),
    "typefaces": len(json.loads(typefaces.LIST.read_text())),
}))
"""


def packaged() -> dict[str, str]:
    """Tracked files of the packages, and the names that they have in a wheel."""
    found = {}
    for name in tracked(*PACKAGES):
        (folder,) = (folder for folder in PACKAGES if name.startswith(folder))
        found[name] = PACKAGES[folder] + name.removeprefix(folder)
    return found


def build(kind: str, tree: Path, folder: Path) -> Path:
    """What setuptools makes of `tree`, in a new `folder`, where there is no compiler."""
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)]
    done = subprocess.run(command, cwd=tree, env={**environment, "PATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a fresh checkout: nothing in it was built or left by a run."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "tree" / name)
    return build("sdist", folder / "tree", folder / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the source distribution alone."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return build("wheel", tree, folder / "dist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_source_distribution_holds_what_it_has_to(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        sizes = {member.name: member.size for member in archive.getmembers() if member.isfile()}
    tops = {name.partition("/")[0] for name in sizes}
    assert tops == {f"adadiff_kernels-{adadiff.__version__}"}
    names = {name.partition("/")[2] for name in sizes}
    names = {name for name in names if ".egg-info/" not in name}
    assert names == {*packaged(), *tracked("csrc"), *ABOUT, *FOR_THE_BUILD, *MADE}
    assert max(sizes.values()) <= 16e6  # each model
    assert sdist.stat().st_size < 48 * 2**20  # PyPI takes 100 MB; models are most of it


def test_the_wheel_holds_the_files_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    info = f"adadiff_kernels-{adadiff.__version__}.dist-info/"
    wanted = {there: ROOT / here for here, there in packaged().items()}
    assert {name for name in contents if not name.startswith(info)} == set(wanted)
    assert not [name for name, path in wanted.items() if contents[name] != path.read_bytes()]
    told = HeaderParser().parsestr(contents[f"{info}METADATA"].decode())
    assert (told["Name"], told["Version"], told["License-Expression"]) == (
        "adadiff_kernels",
        adadiff.__version__,
        "MIT",
    )
    entry = contents[f"{info}entry_points.txt"].decode()
    assert re.search(r"^adadiff = adadiff_command:main$", entry, re.MULTILINE)


@pytest.mark.slow
def test_what_is_installed_works_without_the_repository(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    models = [name for name in MODELS if name not in NO_MODELS]
    command = [sys.executable, "-W", "ignore", "-c", READS, *models]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(installed) for file in found["files"])
    assert found["models"] == {name: adadiff.load(name).num_layers for name in models}
    assert (found["finite"], found["left_out"]) == (True, True)
    assert set(found["recipes"]) == set(shipped())
    assert found["presets"] == sorted(PRESETS)
    assert found["page"] == sorted(path.name for path in PAGE.iterdir())
    assert "--recipe" in found["help"]
    assert found["typefaces"] > 0
