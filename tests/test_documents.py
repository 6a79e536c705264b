"""What the documents say is so: links lead somewhere, named files, targets and functions exist, numbers are those of
the models and of committed rows, and examples run."""

import json
import re
import tomllib
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import adadiff
from adadiff import checkpoint
from adadiff.conversion.describing import describe
from adadiff.metrics.features import digits_network
from adadiff.metrics.letters_network import letters_network
from adadiff.sampling.cascade_file import read_cascade

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CHECKPOINTS, RESULTS = ROOT / "python" / "adadiff" / "checkpoints", ROOT / "benchmarks" / "results"
DOCUMENTS = sorted(
    path
    for folder in (
        ROOT,
        RESULTS,
        ROOT / ".github",
        ROOT / "examples",
        DOCS,
        *DOCS.iterdir(),
        *(ROOT / "python" / "adadiff").iterdir(),
    )
    for path in folder.glob("*.md")
)
CARDS = ("digits", "canvases", "digits_prototypes", "letters")
CLASSIFIERS = {"digits_features": digits_network, "letters_features": letters_network}
MODELS = sorted(path.stem for path in CHECKPOINTS.glob("*.safetensors"))
OPERATOR = "settle_rows"  # stands for <operator>


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links and pictures that lie beside the document, anchors cut off."""
    outside_code = re.sub(r"`[^`\n]*`", "", prose(text))
    targets = re.findall(r"\]\(([^)\s]+)\)", outside_code)
    return [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]


def named(text: str) -> list[str]:
    """What stands in backticks in a sentence."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def card(name: str) -> str:
    return (CHECKPOINTS / f"{name}.md").read_text()


def examples(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card(name), flags=re.MULTILINE | re.DOTALL)


def cells(line: str) -> list[str]:
    """Of a row of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose header begins with `first`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and cells(line)[0] == first)
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append(cells(line))
    return found


def fields(text: str) -> dict[str, str]:
    """The lines `key: value` of a CITATION.cff that are not indented."""
    return dict(re.findall(r"^([a-z-]+):[ ]*(.*)$", text, flags=re.MULTILINE))


def test_links_are_found() -> None:
    text = "[a](b.md) ![c](d/e.png) [f](g.md#h) [i](https://j.k) [l](#m) `[n](o.md)`\n```\n[p](q.md)\n```\n"
    assert links(text) == ["b.md", "d/e.png", "g.md"]
    assert sum(len(links(path.read_text())) for path in DOCUMENTS) > 20
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md"} <= {path.name for path in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_links_lead_somewhere(document: Path) -> None:
    missing = [target for target in links(document.read_text()) if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=short)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = document.read_text()
    asked = {word for name in named(text) for word in re.findall(r"^make ([a-z-]+)", name)}
    asked |= set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE))
    assert not asked - targets
    if document.name == "CONTRIBUTING.md":
        assert len(asked) >= 6


def test_files_named_to_contributors_exist() -> None:
    names = [name.replace("<operator>", OPERATOR) for name in named((ROOT / "CONTRIBUTING.md").read_text())]
    paths = [name for name in names if "/" in name and " " not in name]
    assert len(paths) > 30
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_functions_named_to_contributors_exist() -> None:
    folders = ("adadiff_kernels", "benchmarks", "python", "tests")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    words = set().union(*(re.findall(r"\w+", path.read_text()) for path in sources))
    asked = {name for name in named((ROOT / "CONTRIBUTING.md").read_text()) if name.isidentifier()}
    assert {"ORDER", "FAMILIES", "make_table", "test_order_of_convergence"} <= asked
    assert not asked - words


def test_the_guide_for_contributors_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().split()) <= 700


def test_the_citation_is_of_this_version() -> None:
    found = fields((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "date-released", "license"} <= set(found)
    assert found["cff-version"] == "1.2.0"
    assert found["version"] == adadiff.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["license"] == project["license"]
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", found["date-released"])


def test_every_model_has_a_card_and_a_line_in_the_index() -> None:
    index = (CHECKPOINTS / "README.md").read_text()
    carded = {row[0]: row for name in CARDS for row in rows(card(name), "file")}
    assert set(carded) == {row[0] for row in rows(index, "file")} == {f"`{name}.safetensors`" for name in MODELS}


def test_all_files_beside_the_models_are_installed() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [f"checkpoints/{path.name}" for path in CHECKPOINTS.iterdir() if path.is_file()]
    assert len(files) > len(MODELS)
    assert not [file for file in files if not any(fnmatch(file, pattern) for pattern in tables["adadiff"])]


@pytest.mark.parametrize("name", MODELS)
def test_cards_count_the_parameters(name: str) -> None:
    """As in "699,406, exits 6,453", or the network's alone."""
    (said,) = (row[-1] for kind in CARDS for row in rows(card(kind), "file") if row[0] == f"`{name}.safetensors`")
    if name in CLASSIFIERS:
        counted = {"network": count(CLASSIFIERS[name]()), "exits": 0}
    elif name == "digits_cascade":
        file = read_cascade(checkpoint.find(name), torch.device("cpu"), torch.float32)
        assert said == f"student {count(file.student):,}, oracle {count(file.oracle):,}"
        return
    else:
        counted = describe(name)["parameters"]
    exits = f", exits {counted['exits']:,}" if counted["exits"] else ""
    assert said == f"{counted['network']:,}{exits}"


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*CLASSIFIERS, "digits_cascade")])
def test_cards_count_the_multiply_adds(name: str) -> None:
    kind = name if name in CARDS else name.split("_")[0]
    macs, column = describe(name)["macs"], 2 if name.endswith("shallow") else 1
    said = {row[0]: row[column] for row in rows(card(kind), "")}
    assert said["multiply-adds of a forward pass"] == f"{macs['full forward pass']:,}"
    block = f"{macs['block']:,}, with a long skip {macs['block with skip']:,}"
    assert said["of a block"] == ("the same" if column == 2 else block)


def over_runs(values: list[float]) -> tuple[str, str]:
    """Their mean, and its 95 % interval by Student's t."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return f"{np.mean(values):.3f}", f"{low:.3f} to {high:.3f}"


def test_quality_of_digits_is_that_of_the_committed_rows() -> None:
    runs = defaultdict(list)
    for row in map(json.loads, (RESULTS / "digits-quality.jsonl").read_text().splitlines()):
        runs[row["variant"], row["parameters"]["setting"]].append(row)
    settings = ("0.07", "0.135,first=3", "0.18,first=3")
    kinds = [("full", None), ("plain, equal budget", None), ("fewer steps", 12)]
    kinds += [(variant, setting) for setting in settings for variant in ("early exit", "fixed depth")]
    for (name, *said), kind in zip(rows(card("digits"), "policy"), kinds, strict=True):
        own = runs[kind]
        ratios = [row["frechet_over_full"]["value"] for row in own if "frechet_over_full" in row]
        ratio = "{} ({})".format(*over_runs(ratios)) if ratios else ""
        depth, accuracy = (np.mean([row[key] for row in own]) for key in ("mean_exit_layer", "accuracy"))
        distance = over_runs([row["frechet"] for row in own])
        assert said == [f"{depth:.2f}", *distance, ratio, f"{accuracy:.1%}"], name


@pytest.mark.parametrize("name", ["canvases", "letters"])
def test_quality_by_budget_is_that_of_the_calibration(name: str) -> None:
    found = []
    for budget in describe(name)["calibration"]["budgets"]:
        adaptive, ratio = budget["adaptive"], "{:.2f} ({:.2f} to {:.2f})".format(*budget["ratio"])
        depth, error = f"{adaptive['depth']:.2f}", f"{adaptive['error']:.3g}"
        found.append([f"`exit:budget={budget['share']:g}`", depth, error, ratio])
    assert rows(card(name), "policy") == found


def test_steps_by_class_are_those_of_the_selector() -> None:
    content = describe("digits_prototypes")
    by_steps = defaultdict(list)
    for label, steps in enumerate(content["steps_of_classes"]):
        by_steps[steps].append(str(label))
    wanted = [[str(steps), ", ".join(by_steps[steps])] for steps in sorted(by_steps)]
    assert rows(card("digits_prototypes"), "steps") == wanted
    measured = content["step_selector"]["measured"]
    numbers = [[f"{measured['mean_steps']:.2f}", f"{measured['error']:.3g}", ""]]
    for name, steps in (("fixed", str(measured["fixed_steps"])), ("random", numbers[0][0])):
        ratio = "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**measured[name])
        numbers.append([steps, f"{measured[name]['error']:.3g}", ratio])
    assert [row[1:] for row in rows(card("digits_prototypes"), "steps by")] == numbers


@pytest.mark.parametrize(
    ("name", "example"), [(name, example) for name in CARDS for example in range(len(examples(name)))]
)
def test_examples_run(name: str, example: int, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, object] = {}
    exec(examples(name)[example], found)
    images = found["images"]
    assert bool(images.isfinite().all())
    if "report" in found:
        exits = found["model"].exits is not None
        assert (found["report"].mean_exit_layer < found["model"].num_layers) == exits
        assert len(images) == found["report"].exit_layer.shape[1]
    else:
        (said,) = re.findall(r"reads (\d+ of \d+) held-out scans", card(name))
        assert said in capsys.readouterr().out
