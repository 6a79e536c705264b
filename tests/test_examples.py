"""Every example runs and prints what it says, the notebook shows what is kept in it, and a network of one's own keeps
what networks promise."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import adadiff
import notebooks
from adadiff import forward
from adadiff.config import PRESETS
from adadiff.models import FAMILIES
from adadiff.policies.exits import Full, Replay

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
# Trainings, made so short that no number is what it would be.
SHORTENED = {"frozen_exits": {"steps": 2, "n": 8}, "own_network": {"steps": 3}}
NOTEBOOK = EXAMPLES / "tour.ipynb"
NUMBER = r"-?\d+(?:\.\d+)?"
LONGER = {"own_network", "diffusers_pipeline"}  # than 65 lines: a whole network, a whole pipeline
EXTRAS = {"diffusers_pipeline": "diffusers", "depth_by_timestep": "matplotlib", "http_service": "fastapi"}
EXTRAS |= dict.fromkeys(SHORTENED, "sklearn")  # the scans


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def docstring(name: str) -> str:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    return text[3 : text.index('"""', 3)]


def said(name: str) -> str:
    """What a docstring says that its script prints; "..." stands for anything."""
    (block,) = re.findall(r"prints(?: \([^)]*\))?:\n\n((?:    .*\n|\n(?=    ))+)\Z", docstring(name))
    return re.sub(r"^    ", "", block, flags=re.MULTILINE)


def seconds(name: str) -> int:
    (found,) = re.findall(r"^Takes (\d+) s of CPU time", docstring(name), re.MULTILINE)
    return int(found)


def assert_printed(wanted: str, found: str) -> None:
    """Texts are equal but for the number of spaces; "..." stands for anything. Numbers may differ by a twentieth, or by
    one in their last digit: another CPU rounds differently, which moves an exit now and then."""
    pattern, numbers = "", []
    for part in re.split(rf"(\.\.\.| +|{NUMBER})", wanted):
        if re.fullmatch(NUMBER, part):
            numbers.append(part)
            pattern += f"({NUMBER})"
        else:
            pattern += {"...": ".*?", " " * len(part): " +"}.get(part, re.escape(part)) if part else ""
    if (match := re.fullmatch(pattern, found, re.DOTALL)) is None:
        assert found == wanted  # shows where they differ
        return
    for number, printed in zip(numbers, match.groups(), strict=True):
        digits = len(number.partition(".")[2])
        assert float(printed) == pytest.approx(float(number), rel=0.05, abs=1.01 * 10**-digits), found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an example runs, as if from its own folder: it finds its modules, and what it registers is undone."""
    for registry, name in ((FAMILIES, "mine"), (PRESETS, "mine"), (PRESETS, "tiny_dit")):
        monkeypatch.setitem(registry, name, None)
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mine(folder: Path) -> ModuleType:
    return loaded("own_network")


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in SHORTENED])
def test_an_example_prints_what_it_says(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(EXTRAS.get(name, "adadiff"))
    loaded(name).main()
    assert_printed(said(name), capsys.readouterr().out)
    promised = set(re.findall(r"\w+\.png", " ".join(re.findall(r"writes (.*?) and prints", docstring(name), re.S))))
    assert {path.name for path in folder.iterdir()} == promised
    for file in promised:
        pixels = Image.open(folder / file).convert("L")
        low, high = pixels.getextrema()
        assert high - low > 50, f"{file} shows something"


@pytest.mark.parametrize("name", SHORTENED)
def test_an_example_that_trains_runs_shortened(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its text is as it says; its numbers are those of a longer training."""
    pytest.importorskip(EXTRAS[name])
    loaded(name).main(**SHORTENED[name])
    assert_printed(re.sub(r"-?\d[\d.]*", "...", said(name)), capsys.readouterr().out)


def test_expected_outputs_are_compared() -> None:
    assert_printed("a ... s; b 2, c 0.31\n", "a 1.5 s;   b 3, c 0.32\n")
    for wrong in ("a 1.5 s; b 4, c 0.31\n", "a 1.5 s; b 2, c 0.33\n", "a 1.5 s; d 2, c 0.31\n"):
        with pytest.raises(AssertionError):
            assert_printed("a ... s; b 2, c 0.31\n", wrong)
    with pytest.raises(AssertionError):
        assert_printed("a\n", "a\nb\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_say_how_they_are_run_and_are_short(name: str) -> None:
    title, empty, command, *_ = docstring(name).split("\n")
    assert re.fullmatch(r"[A-Z].*\.", title)
    assert (empty, command) == ("", f"    python examples/{name}.py")
    assert seconds(name) > 0
    assert said(name).strip()
    assert 20 <= len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= (140 if name in LONGER else 65)


def test_the_table_of_examples_is_theirs() -> None:
    lines = (EXAMPLES / "README.md").read_text().splitlines()
    rows = [line for line in lines if re.match(r"\| \[\w+\.py\]", line)]
    wanted = {
        f"| [{name}.py]({name}.py) | {docstring(name).partition(chr(10))[0].removesuffix('.')} | {seconds(name)} |"
        for name in SCRIPTS
    }
    assert set(rows) == wanted
    assert len(rows) == len(wanted)


def test_the_notebook_shows_what_is_kept_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    notebook = notebooks.read(NOTEBOOK)
    cells = notebooks.code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = 0
    for cell, outputs in zip(cells, notebooks.run(notebook), strict=True):
        assert notebooks.texts(outputs) == notebooks.texts(cell["outputs"]), "".join(cell["source"])
        now, kept = notebooks.pictures(outputs), notebooks.pictures(cell["outputs"])
        assert [png[:24] for png in now] == [png[:24] for png in kept]  # the signature, width and height
        shown += len(now)
    assert shown >= 4
    assert not list(tmp_path.iterdir())


def test_the_notebook_is_one_that_jupyter_reads() -> None:
    """Of format 4.5: cells with ids of their own, and sources and outputs in the form of its schema."""
    notebook = notebooks.read(NOTEBOOK)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids)
    for cell in notebook["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == wanted | ({"execution_count", "outputs"} if cell["cell_type"] == "code" else set())
    assert NOTEBOOK.stat().st_size < 400_000


def test_a_notebook_that_differs_is_noticed() -> None:
    source = ["import adadiff\n", "print('1.25 s (3.1/s)')\n", "2 + 2"]
    cell = {"cell_type": "code", "source": source}
    (outputs,) = notebooks.run({"cells": [{"cell_type": "markdown", "source": ["no code"]}, cell]})
    assert notebooks.texts(outputs) == "... s\n\n4"
    (others,) = notebooks.run({"cells": [{**cell, "source": [*source[:-1], "2 + 3"]}]})
    assert notebooks.texts(others) != notebooks.texts(outputs)
    with pytest.raises(ZeroDivisionError):
        notebooks.run({"cells": [{**cell, "source": ["1 / 0"]}]})


@torch.no_grad()
def test_a_network_of_ones_own(mine: ModuleType, tmp_path: Path) -> None:
    """Full depth is its own forward; each exit is that layer's prediction; saved and loaded it is the same."""
    model = adadiff.build("mine")
    torch.manual_seed(1)
    x, t = torch.randn(6, 1, 8, 8), torch.linspace(10, 900, 6)
    torch.testing.assert_close(forward(model, x, t, policy=Full()).prediction, model.backbone(x, t))
    depth = torch.tensor([1.0, 5, 3, 2, 4, 5])
    found = forward(model, x, t, policy=Replay(), threshold=depth)
    assert found.exit_layer.tolist() == depth.tolist()
    for lane in range(6):
        alone = forward(
            model, x[lane : lane + 1], t[lane : lane + 1], policy=Replay(), threshold=depth[lane : lane + 1]
        )
        torch.testing.assert_close(found.prediction[lane], alone.prediction[0], rtol=1e-4, atol=1e-5)
    adadiff.save(model, tmp_path / "mine.safetensors")
    assert torch.equal(adadiff.load(tmp_path / "mine.safetensors").backbone(x, t), model.backbone(x, t))


def test_the_example_of_a_network_runs(mine: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    mine.main(steps=3)
    shown = capsys.readouterr().out
    assert "3.50 of 5 blocks a step" in shown
    assert "images [16, 1, 8, 8]" in shown
