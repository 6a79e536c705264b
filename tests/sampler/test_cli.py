"""The command line writes what Python draws, loses nothing when interrupted, refuses bad input in a line."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import adadiff
from adadiff import cli, commands, pictures
from adadiff.config import ModelConfig
from adadiff.evaluation import evaluate_samples
from adadiff.exits import ExitConfig
from adadiff.models.uvit import UViTConfig
from adadiff.training import TrainConfig, Trainer
from sampler.tiny import scramble

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def config(**changes: int) -> ModelConfig:
    """Three blocks, shaped like the digits."""
    network = {
        "image_size": 8,
        "channels": 1,
        "patch": 2,
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "num_classes": 11,
    }
    return ModelConfig(UViTConfig(**{**network, **changes}), "linear", null_label=10, exits=ExitConfig())


def saved(path: Path, config: ModelConfig) -> str:
    model = adadiff.Model(config)
    scramble(model, 0.15, seed=3)
    adadiff.save(model, path, {"train": {"steps": 7}})
    return str(path)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Jobs that a shell starts in the background are born deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "tiny.safetensors", config())


def run(line: str) -> int:
    return cli.main(shlex.split(line))


def interrupt_call(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> Callable[[], None]:
    """Ctrl-C just before the given call (from 1) of a method. Returns what undoes it."""
    original, calls = getattr(owner, name), []

    def method(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(owner, name, method)
    return lambda: monkeypatch.setattr(owner, name, original)


def pixels(image: Tensor) -> np.ndarray:
    values = np.rint((np.clip(image.double().numpy(), -1, 1) + 1) * 127.5).astype(np.uint8)
    return values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def error_line(captured: str) -> str:
    """The last line, which must be all there is beside progress bars."""
    *others, last = captured.strip().splitlines()
    assert not [line for line in others if "it/s" not in line and "image" not in line and "step" not in line]
    assert last.startswith("adadiff: ")
    return last


# Seven samples, three at a time, in runs of 3 and 4 steps: places are refilled at different times.
def test_sample_writes_the_images_that_python_draws(tiny, tmp_path, capsys):
    out = tmp_path / "deep" / "er"
    line = (
        f"sample {tiny} --out {out} --n 7 --steps 3,4 --solver ddim:0.5 --rule threshold:0.4 --seed 5 "
        "--labels 0,7,2 --guidance 1.5 --tied --batch 3"
    )
    assert run(line) == 0
    images, report = adadiff.sample(
        adadiff.load(tiny),
        7,
        steps=[3, 4, 3, 4, 3, 4, 3],
        solver="ddim:0.5",
        rule="threshold:0.4",
        seeds=[5, 6, 7, 8, 9, 10, 11],
        labels=[0, 7, 2, 0, 7, 2, 0],
        guidance=1.5,
        tied=True,
        batch=3,
    )
    for slot, image in enumerate(images):
        np.testing.assert_array_equal(read(out / f"{slot:06d}.png"), pixels(image))
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"{slot:06d}.png" for slot in range(7)),
        "grid.png",
        "report.json",
    ]

    written = json.loads((out / "report.json").read_text())
    ends = [int(layer) for layer in report.exit_layer.flatten() if layer]
    assert set(ends) == {1, 2, 3}, "without exits at every layer the counts below mean little"
    assert bool((report.exit_layer[..., 0] == report.exit_layer[..., 1]).all()), "tied lanes leave together"
    assert written["exit_layer_histogram"] == [ends.count(layer) for layer in (1, 2, 3)]
    assert written["mean_exit_layer"] == pytest.approx(sum(ends) / len(ends), abs=1e-12)
    assert (written["blocks"], written["blocks_full"]) == (sum(ends), 3 * len(ends))
    assert (written["macs"], written["macs_full"]) == (report.macs, report.macs_full)
    assert written["samples"] == 7
    assert written["seconds"] > 0
    assert written["configuration"]["labels"] == [0, 7, 2]
    printed = capsys.readouterr().out
    assert re.search(r"^labels +0,7,2, cycled over the samples$", printed, re.MULTILINE)
    assert re.search(r"^rule +threshold:0\.4$", printed, re.MULTILINE)


def test_grid_shows_the_pictures_in_order(tiny, tmp_path):
    assert run(f"sample {tiny} --out {tmp_path} --n 7 --steps 2") == 0
    grid = read(tmp_path / "grid.png")  # 3 columns, cells of 64 pixels, two of them empty
    cells = grid.reshape(3, 64, 3, 64).transpose(0, 2, 1, 3).reshape(9, 64, 64)
    for slot in range(7):
        expected = np.kron(read(tmp_path / f"{slot:06d}.png"), np.ones((8, 8), np.uint8))
        np.testing.assert_array_equal(cells[slot], expected)
    assert (cells[7:] == 255).all()


def test_default_rule_follows_the_model(tiny, tmp_path):
    plain = saved(tmp_path / "plain.safetensors", dataclasses.replace(config(), exits=None))
    for model, rule in ((tiny, commands.DEFAULT_RULE), (plain, "full")):
        out = tmp_path / rule.partition(":")[0]
        assert run(f"sample {model} --out {out} --n 2 --steps 1") == 0
        assert json.loads((out / "report.json").read_text())["configuration"]["rule"] == rule


def test_color_models_write_color(tmp_path):
    model = saved(tmp_path / "rgb.safetensors", config(channels=3))
    assert run(f"sample {model} --out {tmp_path / 'o'} --n 2 --steps 2 --rule full") == 0
    images, _ = adadiff.sample(adadiff.load(model), 2, steps=2)
    for slot, image in enumerate(images):
        np.testing.assert_array_equal(read(tmp_path / "o" / f"{slot:06d}.png"), pixels(image))


def test_interrupted_sampling_keeps_what_is_finished_and_draws_the_rest(tiny, tmp_path, monkeypatch, capsys):
    line = f"sample {tiny} --n 9 --steps 3,2 --labels 0,7,2 --rule depth:2 --batch 4 --out "
    assert run(line + str(tmp_path / "whole")) == 0
    out = tmp_path / "parts"
    undo = interrupt_call(monkeypatch, pictures.PictureFolder, "add", 5)
    capsys.readouterr()
    assert run(line + str(out)) == 130
    undo()
    last = error_line(capsys.readouterr().err)
    assert last.startswith("adadiff: interrupted; ")
    assert f"4 of 9 pictures are in {out}" in last
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert len(before) == 4
    assert json.loads((out / "report.json").read_text())["samples"] == 4

    assert run(line + str(out)) == 0
    assert f"4 of 9 pictures are in {out} already; drawing 5" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert {name: after[name] for name in before} == before
    for slot in range(9):  # other batch-mates, so the last bit of a float may differ
        whole, parts = (read(tmp_path / name / f"{slot:06d}.png").astype(int) for name in ("whole", "parts"))
        assert np.abs(whole - parts).max() <= 1
    report = json.loads((out / "report.json").read_text())
    assert report["samples"] == 9
    assert report["mean_exit_layer"] == 2
    assert 5 * 3 + 4 * 2 <= report["evaluations"] == sum(report["exit_layer_histogram"])

    assert run(line + str(out)) == 0
    assert "9 of 9 pictures are" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text()) == report


def test_no_pictures_of_two_configurations_in_one_folder(tiny, tmp_path, capsys):
    other = saved(tmp_path / "other.safetensors", config(dim=48))
    out = tmp_path / "o"
    line = f"sample {tiny} --out {out} --n 2 --steps 1 "
    assert run(line) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    changes = (("--seed 1", "seed"), ("--labels 1", "labels"), ("--n 3", "n"), ("--rule full", "rule"))
    for change, name in changes:
        assert run(line + change) == 2
        assert f"holds pictures drawn with another {name};" in error_line(capsys.readouterr().err)
    assert run(line.replace(tiny, other)) == 2
    assert "model_sha256" in error_line(capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    (out / "report.json").write_text("{")
    assert run(line) == 2
    assert "is not a report of" in error_line(capsys.readouterr().err)
    (out / "report.json").unlink()
    assert run(line) == 2
    assert "no report.json" in error_line(capsys.readouterr().err)


def test_no_samples_is_no_error(tiny, tmp_path, capsys):
    assert run(f"sample {tiny} --out {tmp_path / 'o'} --n 0 --labels 1") == 0
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--rule threshold:1.5", "strictly between 0 and 1"),
        ("--rule threshold:nan", "strictly between 0 and 1"),
        ("--rule sometimes", "unknown rule 'sometimes'"),
        ("--solver euler", "euler"),
        ("--labels 0,10", "labels must be in 0..9"),
        ("--labels 1,2,3,4", "4 labels for 3 samples"),
        ("--steps 0", "steps must be at least 1"),
        ("--steps 5,-2", "steps must be at least 1"),
        ("--steps 1001", "1000"),
        ("--n -1", "n must be an integer >= 0"),
        ("--batch 0", "batch must be an integer >= 1"),
        ("--seed -1", "seeds must be >= 0"),
        ("--guidance nan", "guidance must be finite"),
    ],
)
def test_bad_settings_end_in_one_line_before_work(options, words, tiny, tmp_path, capsys):
    out = tmp_path / "o"
    assert run(f"sample {tiny} --out {out} --n 3 {options}") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("adadiff: error: ")
    assert words in captured.err
    assert not out.exists()


def test_bad_files_and_folders_end_in_one_line(tiny, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(Path(tiny).read_bytes()[:-100])
    latents = saved(tmp_path / "latents.safetensors", config(channels=4))
    cases = (
        (f"sample nowhere --out {tmp_path}", "no model 'nowhere'"),
        (f"sample {file} --out {tmp_path}", "truncated"),
        (f"sample {latents} --out {tmp_path}", "decoding them is not supported"),
        (f"sample {tiny} --out {file}/below", f"cannot write to {file}/below"),
        (f"sample {tiny} --out {file}", f"cannot write to {file}"),
        (f"evaluate {latents}", "draws 4x8x8"),
        (f"evaluate {tiny} --n 1", "n >= 2"),
        (f"evaluate {tiny} --n 20 --json {tmp_path}", "cannot write"),
        (f"evaluate {tiny} --n 20 --json {tmp_path}/none/q.json", "cannot write"),
        (f"inspect {file}", "truncated"),
        (f"train --out {file}/below", str(file)),
        (f"train {tmp_path}/none.json --out {tmp_path}", "none.json"),
    )
    for line, words in cases:
        assert run(line) == 2, line
        error = capsys.readouterr().err
        assert error.startswith("adadiff: error: "), line
        assert words in error, line
        assert error.count("\n") == 1, line


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_keep_every_level(channels):
    levels = torch.arange(256.0)[torch.randperm(256)].view(1, 16, 16).repeat(channels, 1, 1)
    levels[-1] = levels[-1].T.clone()  # channels that cannot be mistaken for each other, or for transposed ones
    expected = levels.numpy().astype(np.uint8)
    result = pictures.to_pixels(levels / 127.5 - 1)
    np.testing.assert_array_equal(result, expected[0] if channels == 1 else expected.transpose(1, 2, 0))


def test_pixels_beyond_the_range_are_clamped_and_nan_is_refused():
    assert pictures.to_pixels(torch.tensor([[[-7.0, -1.001, 1.001, 7.0]]])).tolist() == [[0, 0, 255, 255]]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            pictures.to_pixels(torch.tensor([[[0.0, bad]]]))
    with pytest.raises(ValueError, match="1 or 3 channels"):
        pictures.to_pixels(torch.zeros(2, 4, 4))


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "000000.png"
    pictures.write_png(path, np.full((8, 8), 7, np.uint8))
    before = path.read_bytes()

    def crash(self: Image.Image, target: Path, **options: str) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        pictures.write_png(path, np.zeros((8, 8), np.uint8))
    assert path.read_bytes() == before


QUICK = "--steps 3 --batch 2 --warmup 1 --save-every 1"


def test_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch, capsys):
    assert run(f"train --out {tmp_path / 'whole'} {QUICK}") == 0
    assert re.search(r"^batch +2$", capsys.readouterr().out, re.MULTILINE)
    undo = interrupt_call(monkeypatch, Trainer, "update", 3)
    line = f"train --out {tmp_path / 'parts'} {QUICK}"
    assert run(line) == 130
    undo()
    assert f"step 2 of 3 is in {tmp_path / 'parts'}" in error_line(capsys.readouterr().err)
    assert run(line) == 0
    assert "holds step 2 of 3" in capsys.readouterr().out
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)

    assert run(line + " --lr 0.5") == 2
    assert "another lr" in error_line(capsys.readouterr().err)


def test_ctrl_c_amid_an_update_tells_the_step_on_disk(tmp_path, monkeypatch, capsys):
    """The weights are half updated then, so the checkpoint before it must be what stays."""
    interrupt_call(monkeypatch, torch.optim.AdamW, "step", 4)
    line = f"train --out {tmp_path} --steps 5 --batch 2 --warmup 1 --save-every 2"
    assert run(line) == 130
    assert f"step 2 of 5 is in {tmp_path}" in error_line(capsys.readouterr().err)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 5
    monkeypatch.undo()
    assert run(line) == 0
    assert "holds step 2 of 5" in capsys.readouterr().out


def test_plain_training_has_no_exits(tmp_path):
    assert run(f"train --out {tmp_path} {QUICK} --steps 1 --plain") == 0
    assert adadiff.load(tmp_path / "model.safetensors").exits is None


def resolved(line: str) -> TrainConfig:
    return commands.train_config(cli.parser().parse_args(["train", "--out", "x", *shlex.split(line)]))


def test_every_training_setting_is_an_option(tmp_path):
    file = tmp_path / "c.json"
    values = {}
    for field in dataclasses.fields(TrainConfig):
        if field.type is bool:
            values[field.name], text = False, f"--no-{field.name}"
        elif field.name == "preset":
            values[field.name], text = "digits", "--preset digits"
        else:
            values[field.name] = 3 if field.type is int else 0.375
            text = f"--{field.name.replace('_', '-')} {values[field.name]}"
        assert getattr(resolved(text), field.name) == values[field.name]
        assert resolved(text) == dataclasses.replace(TrainConfig(), **{field.name: values[field.name]})
    file.write_text(json.dumps(values))
    assert dataclasses.asdict(resolved(str(file))) == values
    assert dataclasses.asdict(resolved(f"{file} --exits --lr 2")) == {**values, "exits": True, "lr": 2.0}
    assert resolved("--plain") == resolved("--no-exits")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"leraning_rate": 1}', "unknown key leraning_rate"),
        ('{"exits": "no"}', "exits in .* must be of type bool, got 'no'"),
        ('{"steps": true}', "steps in .* must be of type int, got True"),
        ('{"steps": 2.5}', "steps in .* must be of type int, got 2.5"),
        ('{"ema": "0.9"}', "ema in .* must be of type float, got '0.9'"),
        ('{"ema": 1}', "ema must be in"),
        ("[3]", "table of values"),
        ("{", "is not JSON"),
    ],
)
def test_bad_training_files_are_errors(text, words, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        resolved(str(file))


def strict_json(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_evaluate_measures_both_runs(tiny, tmp_path, capsys):
    file = tmp_path / "q.json"
    line = f"evaluate {tiny} --n 23 --steps 2 --rule depth:2 --seed 4 --batch 8 --json {file}"
    assert run(line) == 0
    results = strict_json(file.read_text())["results"]
    assert list(results) == ["full", "depth:2"]
    model, labels, full = adadiff.load(tiny), [slot % 10 for slot in range(23)], None
    for rule, depth in (("full", 3), ("depth:2", 2)):
        images, _ = adadiff.sample(model, 23, steps=2, rule=rule, seeds=list(range(4, 27)), labels=labels, batch=8)
        quality = evaluate_samples(images, torch.tensor(labels), paired=full)
        full = images
        for name, value in dataclasses.asdict(quality).items():
            assert results[rule][name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
        assert results[rule]["mean_exit_layer"] == depth
        assert results[rule]["images_per_second"] > 0
    assert results["full"]["psnr_median"] is None
    printed = capsys.readouterr().out
    for rule, r in results.items():
        frechet = f"{r['frechet']:.2f} [{r['frechet_low']:.2f}, {r['frechet_high']:.2f}]"
        row = next(row for row in printed.splitlines() if row.startswith(rule) and "[" in row)
        assert frechet in row
        assert f"{r['accuracy']:.1%}" in row
    assert f"{results['depth:2']['psnr_median']:.1f}, {results['depth:2']['psnr_p5']:.1f}" in row


def test_equal_images_have_no_psnr(tiny, tmp_path, capsys):
    assert run(f"evaluate {tiny} --n 11 --steps 1 --rule depth:3 --json {tmp_path / 'q.json'}") == 0
    result = strict_json((tmp_path / "q.json").read_text())["results"]["depth:3"]
    assert (result["psnr_median"], result["max_difference"]) == (None, 0)
    assert re.search(r"^depth:3 .* equal ", capsys.readouterr().out, re.MULTILINE)


def test_evaluating_the_full_network_draws_once(tiny, capsys):
    assert run(f"evaluate {tiny} --n 11 --steps 1 --rule full") == 0
    assert len(re.findall(r"^full  ", capsys.readouterr().out, re.MULTILINE)) == 1


def test_inspect_tells_what_the_file_holds(tiny, capsys):
    assert run(f"inspect {tiny} --json") == 0
    content = strict_json(capsys.readouterr().out)
    tensors = load_file(tiny)
    for part, prefix in (("network", "backbone."), ("exits", "exits.")):
        numbers = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(prefix))
        assert content["parameters"][part] == numbers
    D, N, T = 32, 16, 18  # 16 patches, a label and a time; 12 D D products a token, and attention twice T T D
    block = 12 * D * D * T + 2 * T * T * D
    stem, head = N * 4 * D, N * D * 4 + 9 * 64
    assert content["macs"] == {
        "full evaluation": stem + 3 * block + 2 * D * D * T + head,
        "stem": stem,
        "block": block,
        "block with skip": block + 2 * D * D * T,
        "head": head,
        "score after a block": N * D,
    }
    assert ModelConfig.from_dict({k: content[k] for k in config().to_dict()}) == config()
    assert (content["blocks"], content["tokens"], content["classes"]) == (3, 18, 10)
    assert content["file_bytes"] == Path(tiny).stat().st_size
    assert content["notes"] == {"train": {"steps": 7}}

    assert run(f"inspect {tiny}") == 0
    printed = capsys.readouterr().out
    for row in (r"network\.dim +32", r"schedule +linear", r"exits\.time +True", r"notes\.train\.steps +7"):
        assert re.search(f"^{row}$", printed, re.MULTILINE)
    assert f"{content['macs']['full evaluation']:,}" in printed


def test_ctrl_c_without_results_says_so(tiny, monkeypatch, capsys):
    interrupt_call(monkeypatch, adadiff.Sampling, "_tick", 2)
    assert run(f"evaluate {tiny} --n 20 --steps 2") == 130
    assert error_line(capsys.readouterr().err) == "adadiff: interrupted; no results are on disk"


@pytest.mark.parametrize("command", [*cli.EXAMPLES])
def test_help_explains_every_option_and_its_examples_parse(command):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as leave:
        cli.main([command, "--help"])
    assert leave.value.code == 0
    assert cli.EXAMPLES[command] in printed.getvalue()
    lines = [line for line in cli.EXAMPLES[command].splitlines() if line.startswith("  adadiff ")]
    assert lines
    for line in lines:
        options = cli.parser().parse_args(shlex.split(line)[1:])
        assert options.run is getattr(commands, command)


def test_unknown_options_are_errors(tiny, tmp_path, capsys):
    for line in (
        "",
        "draw",
        f"sample {tiny}",
        f"sample {tiny} --out x --see 3",
        "train --out x --steps many",
    ):
        with pytest.raises(SystemExit) as leave:
            run(line)
        assert leave.value.code == 2
        assert "error: " in capsys.readouterr().err


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "adadiff", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == f"adadiff {adadiff.__version__}\n"


def test_readme_commands_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"make ([a-z]+)", "\n".join(re.findall(r"`[^`]+`|^make .*$", README, re.MULTILINE)))
    assert {"bench", "test"} <= set(named) <= set(targets)
    lines = re.findall(r"^adadiff (.*)$", README, re.MULTILINE)
    runs = {cli.parser().parse_args(shlex.split(line)).run for line in lines}
    assert runs == {commands.sample, commands.train, commands.evaluate, commands.inspect}


def test_readme_names_files_that_exist():
    paths = re.findall(r"`([\w./]+(?:/|\.py))`", README)
    places = (ROOT, ROOT / "python/adadiff", ROOT / "adadiff_kernels")
    assert len(paths) > 8
    assert not [path for path in paths if not any((place / path).exists() for place in places)]


def test_readme_example_runs_as_written(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    names = {}
    exec(example, names)
    report, images = names["report"], names["images"]
    assert capsys.readouterr().out == f"{report}\n"
    assert bool(images.isfinite().all())
    assert len(images) == 16
    assert report.mean_exit_layer < report.layers
