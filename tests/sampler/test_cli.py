"""Training, evaluation and inspection by command; bad input is refused in a line."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adadiff
from adadiff import cli
from adadiff.commands import (
    calibrate,
    calibrate_reuse,
    convert,
    data,
    diff,
    distill,
    evaluate,
    info,
    inspect,
    pages,
    reproduce,
    sample,
    search,
    serve,
    train,
    train_steps,
)
from adadiff.config import ModelConfig
from adadiff.sampling.batch import Batch
from adadiff.training.config import FORMAT_VERSION, TrainConfig
from adadiff.training.trainer import Trainer
from sampler import shell
from sampler.shell import config, error_line, interrupt_call, run, saved, strict_json

ROOT = Path(__file__).parents[2]
ctrl_c, tiny = shell.ctrl_c, shell.tiny
COMMANDS = {
    "sample": sample.sample,
    "serve": serve.serve,
    "train": train.train,
    "train-steps": train_steps.train_steps,
    "calibrate": calibrate.calibrate,
    "calibrate-reuse": calibrate_reuse.calibrate_reuse,
    "evaluate": evaluate.evaluate,
    "distill": distill.distill,
    "convert": convert.convert,
    "inspect": inspect.inspect,
    "diff": diff.diff,
    "info": info.info,
    "search": search.search,
    "data": data.data,
    "reproduce": reproduce.reproduce,
}


def test_who_reads_no_further_gets_no_error() -> None:
    """As `adadiff inspect digits | head`: the output is a pipe whose other end is closed."""
    command = [sys.executable, "-m", "adadiff", "inspect", "digits"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
    process.stderr.close()


def test_bad_files_and_folders_end_in_one_line(tiny, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(Path(tiny).read_bytes()[:-100])
    latents = saved(tmp_path / "latents.safetensors", config(channels=4))
    cases = (
        (f"sample nowhere --out {tmp_path}", "no model 'nowhere'"),
        (f"sample {file} --out {tmp_path}", "truncated"),
        (f"sample {latents} --out {tmp_path} --format png", "these are latents, 4 channels: --decoder FOLDER"),
        (f"sample {tiny} --out {file}/below", f"cannot write to {file}/below"),
        (f"sample {tiny} --out {file}", f"cannot write to {file}"),
        (f"evaluate {latents} --features digits", "these are latents, 4 channels: --decoder FOLDER"),
        (f"evaluate {tiny} --n 1", "n >= 2"),
        (f"evaluate {tiny} --n 20 --json {tmp_path}", "cannot write"),
        (f"evaluate {tiny} --n 20 --json {tmp_path}/none/q.json", "cannot write"),
        (f"inspect {file}", "truncated"),
        (f"train --out {file}/below", str(file)),
        (f"train {tmp_path}/none.json --out {tmp_path}", "none.json"),
        (f"train digits_plan --out {tmp_path}", "neither a file nor one of"),
        (f"train --out {tmp_path} --init {file}", "truncated"),
        (f"train --out {tmp_path} --data canvases", "choose data, preset and network that agree"),
    )
    for line, words in cases:
        assert run(line) == 2, line
        error = capsys.readouterr().err
        assert error.startswith("adadiff: error: "), line
        assert words in error, line
        assert error.count("\n") == 1, line


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
    return train.train_config(cli.parser().parse_args(["train", "--out", "x", *shlex.split(line)]))


OTHER = {
    "preset": "canvases",
    "data": "canvases",
    "recipe": "frozen",
    "init": "digits",
    "start": "linear",
    "loss": "official",
    "schedule": "cosine",
    "prediction_type": "sample",
}


def test_every_training_setting_is_an_option(tmp_path):
    file = tmp_path / "c.json"
    values = {}
    for field in dataclasses.fields(TrainConfig):
        option = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            values[field.name], text = not field.default, f"{option}" if not field.default else f"--no-{option[2:]}"
        elif field.type is dict:
            given = {"network": {"depth": 2, "conv": False}, "exit_options": {"head": "mlp", "time": False}}
            values[field.name] = given[field.name]
            pairs = (f"{key}={str(value).lower()}" for key, value in given[field.name].items())
            text = f"{option} {' '.join(pairs)}"
        elif field.type is list:
            values[field.name], text = [0.5, 1.0], f"{option} 0.5,1"
        elif field.type is str:
            values[field.name] = OTHER.get(field.name, "bfloat16")
            text = f"{option} {values[field.name]}"
        else:
            values[field.name] = {int: 3, float: 0.375}[field.type] if field.name != "accumulate" else 1
            text = f"{option} {values[field.name]}"
        extra = {"init": "digits"} if field.name == "recipe" else {}
        extra_text = " --init digits" if extra else ""
        assert resolved(text + extra_text) == TrainConfig(**{field.name: values[field.name]}, **extra)
    values |= {"exits": True, "accumulate": 3, "start": "published"}  # a checkpoint is a start itself
    file.write_text(json.dumps({"format_version": FORMAT_VERSION, **values}))
    assert dataclasses.asdict(resolved(str(file))) == values
    assert dataclasses.asdict(resolved(f"{file} --lr 2 --tensorboard")) == {**values, "lr": 2.0}
    assert resolved("--plain") == resolved("--no-exits") == resolved("digits_plain")
    assert resolved("canvases --network depth=2").model.network.depth == 2
    assert resolved("digits_tuned --plain").exit_options == {}  # the baseline of equal budget of any configuration
    with pytest.raises(ValueError, match="exits is false"):
        resolved("digits_tuned --plain --exit-options head=mlp")


def test_a_folder_is_named_after_the_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(f"train digits {QUICK} --steps 1 --network dim=16 depth=2") == 0
    assert (tmp_path / "runs/digits/model.safetensors").is_file()
    assert re.search(r"^network.depth +2$", capsys.readouterr().out, re.MULTILINE)


def test_a_loss_that_is_nan_ends_in_one_line(tmp_path, capsys):
    assert run(f"train --out {tmp_path} {QUICK} --steps 20 --lr 1e30 --network dim=16 depth=2") == 2
    assert "the last checkpoint is kept" in error_line(capsys.readouterr().err)
    assert all(bool(v.isfinite().all()) for v in load_file(tmp_path / "model.safetensors").values())


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
        "full forward pass": stem + 3 * block + 2 * D * D * T + head,
        "stem": stem,
        "block": block,
        "block with skip": block + 2 * D * D * T,
        "head": head,
        "score after a block": N * D,
    }
    assert ModelConfig.from_dict({k: content[k] for k in config().to_dict()}) == config()
    assert (content["num_layers"], content["tokens"], content["classes"]) == (3, 18, 10)
    assert content["file_bytes"] == Path(tiny).stat().st_size
    assert content["notes"] == {"train": {"steps": 7}}

    assert run(f"inspect {tiny} --all") == 0
    printed = capsys.readouterr().out
    for row in (r"network\.dim +32", r"schedule +linear", r"exits\.time +True", r"notes\.train\.steps +7"):
        assert re.search(f"^{row}$", printed, re.MULTILINE)
    assert f"{content['macs']['full forward pass']:,}" in printed


def test_ctrl_c_without_results_says_so(tiny, monkeypatch, capsys):
    interrupt_call(monkeypatch, Batch, "tick", 2)
    assert run(f"evaluate {tiny} --n 20 --steps 2") == 130
    assert error_line(capsys.readouterr().err) == "adadiff: interrupted; no results are on disk"


@pytest.mark.parametrize("command", [*pages.EXAMPLES])
def test_help_explains_every_option_and_its_examples_parse(command):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert pages.EXAMPLES[command] in printed.getvalue()
    examples = pages.EXAMPLES[command].replace("\\\n", "")
    lines = re.findall(r"^  (?:torchrun .*-m )?adadiff (.*)$", examples, re.MULTILINE)
    assert lines
    for line in lines:
        options = cli.parser().parse_args(shlex.split(line))
        assert getattr(options.run, "func", options.run) is COMMANDS[command]


def test_unknown_options_are_errors(tiny, tmp_path, capsys):
    assert run("") == 2
    assert "error: " in capsys.readouterr().err
    for line in (
        "draw",
        f"sample {tiny}",
        f"sample {tiny} --out x --see 3",
        "train --out x --steps many",
        "train --out x --network depth",
        "calibrate digits --out x --budget lots",
    ):
        with pytest.raises(SystemExit) as end:
            run(line)
        assert end.value.code == 2
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
