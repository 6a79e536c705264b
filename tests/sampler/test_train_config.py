"""Training configurations: what is refused, what ships, and the learning rate by hand."""

import json
import math
import tomllib
from pathlib import Path

import pytest

from adadiff.config import PRESETS
from adadiff.training.config import TrainConfig, learning_rate, load_config, shipped
from adadiff.uem import ExitConfig


@pytest.mark.parametrize(("classes", "null_label"), [(4, 3), (1, 0), (0, None)])
def test_the_null_class_stays_the_last_one(classes: int, null_label: int | None) -> None:
    model = TrainConfig(network={"num_classes": classes}, label_drop=0.0).model
    assert (model.null_label, model.classes) == (null_label, max(0, classes - 1))


def test_learning_rate_by_hand() -> None:
    config = TrainConfig(lr=8.0, warmup=4, steps=12)
    rates = [learning_rate(config, step) for step in range(12)]
    cosine = [4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates == pytest.approx([2, 4, 6, 8, *cosine])
    assert learning_rate(TrainConfig(lr=1.0, warmup=0, steps=1), 0) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "cifar10"}, "unknown preset 'cifar10', known: .*digits"),
        ({"preset": "cifar10_uvit_small"}, "no null class .* set label_drop to 0"),
        ({"loss": "relative"}, "'relative' needs a network that can predict already: give init"),
        ({"start": "linear", "init": "digits"}, "start = 'linear' is for a fresh U-ViT"),
        ({"start": "linear", "preset": "dit_s_8_256"}, "start = 'linear' is for a fresh U-ViT"),
        ({"data": "mnist"}, "no training data 'mnist'; there are digits, canvases"),
        ({"loss": "best"}, "no loss 'best'"),
        ({"recipe": "thaw"}, "recipe must be one of joint, frozen, got 'thaw'"),
        ({"recipe": "frozen"}, "needs init and exits"),
        ({"recipe": "frozen", "init": "digits", "exits": False}, "needs init and exits"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        ({"network": {"detph": 2}}, "unknown key detph in network"),
        ({"network": {"depth": 3}}, "depth must be even"),
        ({"exit_options": {"layers": 2}}, "unknown key layers in exit_options"),
        ({"exit_options": {"head": "conv"}}, "exits.head must be 'linear', 'mlp' or 'block', got 'conv'"),
        ({"exit_options": {"head": "mlp", "shared_head": True}}, "set shared_head to false"),
        ({"exit_options": {"map": True}, "exits": False}, "but exits is false"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"batch": -1}, "batch must be a positive integer"),
        ({"batch": 2.0}, "batch must be of type int, got 2.0"),
        ({"accumulate": 0}, "accumulate must be a positive integer"),
        ({"batch": 10, "accumulate": 4}, "10 cannot be split into 4"),
        ({"save_every": 0}, "save_every must be a positive integer"),
        ({"warmup": -1}, "warmup must be an integer >= 0"),
        ({"seed": 0.5}, "seed must be of type int"),
        ({"steps": True}, "steps must be of type int, got True"),
        ({"exits": "no"}, "exits must be of type bool, got 'no'"),
        ({"network": [2]}, "network must be of type dict"),
        ({"ema": 1.0}, "ema must be in"),
        ({"ema": math.nan}, "ema must be in"),
        ({"label_drop": -0.1}, "label_drop must be in"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"lr": -1e-3}, "lr must be a finite number"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number"),
        ({"uem_weight": -1.0}, "uem_weight must be a finite number"),
        ({"ual_weight": math.nan}, "ual_weight must be a finite number"),
    ],
)
def test_impossible_configurations_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_settings_change_the_preset() -> None:
    model = TrainConfig(network={"depth": 2, "dim": 32}, exit_options={"head": "mlp"}).model
    assert (model.network.depth, model.network.dim, model.network.patch) == (2, 32, 2)
    assert model.exits == ExitConfig(head="mlp")
    assert TrainConfig().model == PRESETS["digits"]
    assert TrainConfig(exits=False).model.exits is None
    unconditional = TrainConfig(preset="cifar10_uvit_small", label_drop=0.0).model
    assert unconditional.exits == ExitConfig()  # the preset has none


def test_files_and_what_is_given_beside_them(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('format_version = 2\nlr = 1\nloss = "supervised"\n[network]\ndepth = 4\n')
    assert load_config(file, {}) == TrainConfig(lr=1, loss="supervised", network={"depth": 4})
    assert load_config(str(file), {"lr": 0.5, "network": {}}) == TrainConfig(lr=0.5, loss="supervised")
    other = tmp_path / "c.json"
    other.write_text(json.dumps({"format_version": 2, "steps": 3}))
    assert load_config(other, {}) == TrainConfig(steps=3)
    assert load_config(None, {"steps": 3}) == TrainConfig(steps=3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "format_version = 2\nleraning_rate = 1", "cannot use .*c.toml: unknown key leraning_rate"),
        ("c.toml", "steps = ", "c.toml is not TOML"),
        ("c.toml", "format_version = 2\nsteps = 2.5", "cannot use .*c.toml: steps must be of type int, got 2.5"),
        ("c.json", '{"format_version": 2, "ema": "0.9"}', "ema must be of type float, got '0.9'"),
        ("c.json", "[3]", "table of values"),
        ("c.json", "{", "c.json is not JSON"),
    ],
)
def test_bad_files_are_errors(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / name, {})


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("c.toml", "steps = 3", "None"),
        ("c.toml", "", "None"),
        ("c.toml", "format_version = 1\nsteps = 3", "1"),
        ("c.toml", "format_version = 3", "3"),
        ("c.toml", "format_version = '2'", "'2'"),
        ("c.toml", "[network]\nformat_version = 2", "None"),
        ("c.json", '{"steps": 3}', "None"),
        ("c.json", '{"format_version": 1, "steps": 3}', "1"),
    ],
)
def test_files_of_another_version_are_refused_with_advice(tmp_path: Path, name: str, text: str, version: str) -> None:
    """In one line. What is advised is all that there is to do."""
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match="format_version") as refused:
        load_config(file, {})
    line = str(refused.value)
    assert "\n" not in line
    advice = "format_version = 2" if name == "c.toml" else '"format_version": 2'
    known = f"; its keys mean what they did, so write {advice}" if version in ("None", "1") else ""
    assert line == f"{file} has format_version {version}, this release reads 2{known}"
    if version == "None" and "steps" in text:
        file.write_text(f"{advice}\n{text}" if name == "c.toml" else "{" + advice + ", " + text[1:])
        assert load_config(file, {}) == TrainConfig(steps=3)


def test_every_configuration_that_ships_has_its_version() -> None:
    assert len(shipped()) > 8
    for file in shipped().values():
        assert tomllib.loads(file.read_text())["format_version"] == 2


def test_a_name_that_is_nothing_lists_what_ships() -> None:
    with pytest.raises(
        ValueError, match=r"no configuration 'digit': neither a file nor one of canvases, .*digits_plain"
    ):
        load_config("digit", {})


def test_shipped_configurations_are_usable() -> None:
    configs = {name: load_config(name, {}) for name in shipped()}
    assert configs["digits"] == TrainConfig()  # what made the model in the package
    assert configs["digits_plain"] == TrainConfig(exits=False)
    equal = [("digits", "digits_plain", "digits_shallow"), ("canvases_scratch", "canvases_plain", "canvases_shallow")]
    equal.append(("canvases", "canvases_exits", "canvases_longer"))
    for names in equal:
        budgets = {tuple(getattr(configs[name], part) for part in ("steps", "batch", "data", "lr")) for name in names}
        assert len(budgets) == 1
    for name in ("digits_shallow", "canvases_shallow"):
        assert configs[name].model.network.depth + 1 == 3
