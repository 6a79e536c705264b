"""Files that commands write: nothing is replaced without --force, a full disk is one line, results outlive printing."""

import errno
import json
import os
import resource
import stat
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import adadiff
from adadiff.calibration.calibrating import Calibrating
from adadiff.checkpoint import read_tensors
from adadiff.commands import evaluate
from adadiff.sampling.batch import Batch
from adadiff.sampling.sampler import SamplerRun
from adadiff.training.trainer import Trainer
from sampler import shell
from sampler.shell import config, error_line, fill_disk, read, run, saved, strict_json
from sampler.test_writing import NEVER_REPLACED, state
from sampler.tiny import SERVED, scramble

ctrl_c, tiny = shell.ctrl_c, shell.tiny
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("served") / "served.safetensors"
    model = adadiff.Model(SERVED)
    scramble(model, 0.25, seed=3)
    adadiff.save(model, file)
    return file


@pytest.fixture(scope="module")
def earlier(served: Path) -> Path:
    """A file that `convert` reads."""
    file = served.with_name("earlier.safetensors")
    config = json.dumps(read_tensors(served)[1]["config"])
    save_file(load_file(served), file, {"format_version": "1", "config": config})
    return file


@pytest.fixture(scope="module")
def calibrated(served: Path) -> Path:
    file = served.with_name("calibrated.safetensors")
    assert run(f"calibrate {served} --budget 0.6 --out {file} --n 8 --steps 2 --batch 8") == 0
    return file


@pytest.fixture
def lines(tiny: str, served: Path, earlier: Path, calibrated: Path) -> dict[str, str]:
    """Every command that writes a file, without its name."""
    calibrate = f"calibrate {served} --budget 0.6 --n 8 --steps 2 --batch 8"
    return {
        "evaluate": f"evaluate {tiny} --n 11 --steps 1 --resamples 2 --json",
        "diff": f"diff {tiny} --steps 2 --other seed=1 --picture",
        "inspect": f"inspect {calibrated} --picture",
        "inspect --json": f"inspect {calibrated} --json --picture",
        "calibrate --out": f"{calibrate} --out",
        "calibrate --picture": f"{calibrate} --out {{}}/c.safetensors --picture",
        "convert": f"convert {earlier}",
    }


COMMANDS = ("evaluate", "diff", "inspect", "inspect --json", "calibrate --out", "calibrate --picture", "convert")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed."""
    monkeypatch.setattr(Batch, "tick", lambda *_: pytest.fail("the network was run"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["a file", "a file below", "nowhere", *NEVER_REPLACED])
def test_nothing_is_replaced_unasked(command, kind, lines, tmp_path, monkeypatch, capsys, idle) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    if kind in NEVER_REPLACED:
        monkeypatch.chdir(tmp_path)
        NEVER_REPLACED[kind](out)
    elif kind != "nowhere":
        out.write_bytes(b"of the user")
    before = state(tmp_path)
    named = out if kind not in ("a file below", "nowhere") else out / "below"
    for force in ("",) if kind == "a file" else ("", " --force"):
        capsys.readouterr()
        assert run(f"{lines[command].format(tmp_path)} {named}{force}") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert f"cannot write {named}: " in error_line(captured.err)
        assert state(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_force_replaces_a_file(command, lines, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    out.write_bytes(b"of the user")
    assert run(f"{lines[command].format(tmp_path)} {out} --force") == 0
    if command == "evaluate":
        assert strict_json(out.read_text())["results"]
    elif command in ("convert", "calibrate --out"):
        assert adadiff.load(out).num_layers
    else:
        assert read(out).size
    expected = {"out"} | ({"c.safetensors"} if command == "calibrate --picture" else set())
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_no_command_writes_what_it_reads(tiny, served, earlier, calibrated, tmp_path, capsys, idle) -> None:
    pytest.importorskip("matplotlib")
    other = saved(tmp_path / "other.safetensors", config())
    torch.jit.save(torch.jit.script(torch.nn.Flatten()), tmp_path / "features.pt")
    (tmp_path / "real").mkdir()
    (tmp_path / "p.json").write_text("{}")
    before = {path: path.read_bytes() for path in (Path(tiny), served, earlier, calibrated, *tmp_path.glob("*.*"))}
    for line in (
        f"evaluate {tiny} --json {tiny}",
        f"evaluate {tiny} --features {tmp_path}/features.pt --json {tmp_path}/features.pt",
        f"evaluate {tiny} --reference {other} --json {other}",
        f"diff {tiny} --other seed=1 --picture {tiny}",
        f"diff {tiny} --other model={other} --picture {other}",
        f"inspect {calibrated} --picture {calibrated}",
        f"calibrate {served} --budget 0.6 --out {tmp_path}/c --picture {served}",
        f"calibrate {served} --budget 0.6 --out {tmp_path}/features.pt --features {tmp_path}/features.pt",
        f"convert {earlier} {earlier}",
        f"convert {earlier} {tmp_path}/p.json --preset {tmp_path}/p.json",
    ):
        for force in ("", " --force"):
            assert run(line + force) == 2, line
            captured = capsys.readouterr()
            assert captured.out == ""
            assert "this command reads it" in error_line(captured.err), line
    assert {path: path.read_bytes() for path in before} == before


def test_a_model_is_calibrated_in_place_with_force(served, tmp_path, capsys) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(served.read_bytes())
    line = f"calibrate {file} --budget 0.6 --out {file} --n 8 --steps 2 --batch 8"
    assert run(line) == 2
    assert "--force replaces it" in error_line(capsys.readouterr().err)
    assert run(line + " --force") == 0
    assert adadiff.load(file).calibration is not None


def test_two_results_take_two_files(served, tmp_path, capsys, idle) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "alias").symlink_to(tmp_path)
    for out, picture in (("c", "c"), ("c", "./c"), ("c", "alias/c")):
        names = f"--out {tmp_path}/{out} --picture {tmp_path}/{picture}"
        assert run(f"calibrate {served} --budget 0.6 {names} --force") == 2
        assert "cannot write two results to" in error_line(capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"alias"}


# The disk is full.


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a full disk, writing fails within a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_numbers_are_printed(command, lines, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    line = f"{lines[command].format(tmp_path)} {tmp_path}/out"
    with no_file_above(64):
        assert run(line) == 2
    captured = capsys.readouterr()
    assert "File too large" in error_line(captured.err)
    assert ("out'" in captured.err) == (command != "calibrate --picture")
    assert list(tmp_path.iterdir()) == []
    if command == "evaluate":
        assert "full" in captured.out
    if command == "diff":
        assert "the first bits differ" in captured.out
    if "calibrate" in command:
        assert captured.out == "", "it is seen before the work"


def test_a_calibration_that_does_not_fit_is_kept_elsewhere(served, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "full").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    line = f"calibrate {served} --budget 0.6 --out {tmp_path}/full/c.safetensors --n 8 --steps 2 --batch 8"
    with monkeypatch.context() as patch:
        fill_disk(patch, tmp_path / "full", 0)
        with pytest.warns(UserWarning, match="runs are not kept from now on"):
            assert run(line) == 2
    captured = capsys.readouterr()
    (file,) = (tmp_path / "elsewhere").glob("*/c.safetensors")
    last = error_line(captured.err)
    assert f"No space left on device: '{tmp_path}/full/c.safetensors'; the calibrated model is in {file}" in last
    assert list((tmp_path / "full").iterdir()) == []
    assert "error over timestep table" in captured.out
    assert run(line) == 0
    ours, theirs = adadiff.load(file), adadiff.load(tmp_path / "full" / "c.safetensors")
    assert ours.calibration == theirs.calibration
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_a_model_that_vanishes_costs_no_calibration(served, tmp_path, monkeypatch) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(served.read_bytes())
    original = Calibrating.run
    monkeypatch.setattr(Calibrating, "run", lambda *a, **k: (file.unlink(), original(*a, **k))[1])
    assert run(f"calibrate {file} --budget 0.6 --out {tmp_path}/c --n 8 --steps 2 --batch 8") == 0
    assert adadiff.load(tmp_path / "c").calibration is not None


@pytest.mark.parametrize("form", ["png", "npz --shard 2"])
@pytest.mark.parametrize("after", [0, 1, 4, 5, 8, 9])
def test_samples_that_fit_on_the_disk_are_kept(form, after, tiny, tmp_path, monkeypatch, capsys) -> None:
    line = f"sample {tiny} --n 7 --steps 2 --batch 2 --class-labels 1,2 --format {form} --out {tmp_path / 'o'}"
    with monkeypatch.context() as patch:
        fill_disk(patch, tmp_path / "o", after)
        code = run(line)
    last = capsys.readouterr().err
    files = sorted(path for path in (tmp_path / "o").glob("*") if path.name not in ("report.json", "manifest.json"))
    if code:
        assert code == 2
        assert "No space left on device" in error_line(last)
        there = len(files) if form == "png" else 2 * len(files)
        assert any(words in last for words in ("cannot write to", "grid.png", f"; {there} of 7 "))
    assert not list((tmp_path / "o").glob("*.part"))
    before = {path: path.read_bytes() for path in files if path.name != "grid.png"}
    assert run(line) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((tmp_path / "o" / "report.json").read_text())["samples"] == 7
    assert (tmp_path / "o" / "grid.png").exists()


QUICK = "--steps 4 --batch 2 --warmup 1 --save-every 1 --log-every 1 --network dim=16 depth=2"


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 7])
def test_training_goes_on_from_what_fits_on_the_disk(after, tmp_path, monkeypatch, capsys) -> None:
    line = f"train --out {tmp_path / 'run'} {QUICK}"
    with monkeypatch.context() as patch:
        fill_disk(patch, tmp_path / "run", after)
        assert run(line) == 2
    last = error_line(capsys.readouterr().err)
    assert "No space left on device" in last
    saved_steps = after // 2  # after config.json, a state and a model for each step
    assert (f"step {saved_steps} of 4 is in {tmp_path / 'run'}" in last) == (after > 0)
    assert run(line) == 0
    assert (f"holds step {saved_steps} of 4" in capsys.readouterr().out) == (saved_steps > 0)
    assert run(f"train --out {tmp_path / 'whole'} {QUICK}") == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_a_log_that_does_not_fit_costs_no_weights(tmp_path, monkeypatch, capsys) -> None:
    def log(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", log)
        assert run(f"train --out {tmp_path} {QUICK} --save-every 4 --log-every 3") == 2
    assert f"step 3 of 4 is in {tmp_path}" in error_line(capsys.readouterr().err)


def test_a_state_that_cannot_fit_is_refused_before_any_step(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Trainer, "update", lambda *_: pytest.fail("a step was taken"))
    with no_file_above(2000):
        assert run(f"train --out {tmp_path / 'run'} {QUICK}") == 2
    assert "File too large (" in error_line(capsys.readouterr().err)


# What was written outlives what is printed.


@pytest.mark.parametrize("command", COMMANDS)
def test_results_are_written_before_they_are_printed(command, lines, tmp_path, monkeypatch) -> None:
    """As where nobody reads the output any more: the first line that tells of results fails."""
    pytest.importorskip("matplotlib")
    out, before = tmp_path / "out", []

    def fail(text: str = "", *_: object, **__: object) -> None:
        if out.exists():
            raise BrokenPipeError
        before.append(text)

    line = f"{lines[command].format(tmp_path)} {out}"
    monkeypatch.setattr("builtins.print", fail)
    assert run(line) == 141
    monkeypatch.undo()
    assert out.stat().st_size
    results = {"evaluate": "kernel distance", "diff": "apart", "calibrate": "error over timestep table"}.get(
        command.split()[0], ""
    )
    assert not [text for text in before if results in text]


def test_numbers_are_written_where_they_cannot_be_printed(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "print_table", lambda *_: "é".encode("ascii"))
    assert run(f"evaluate {tiny} --n 11 --steps 1 --resamples 2 --json {tmp_path}/q.json") == 2
    assert strict_json((tmp_path / "q.json").read_text())["results"]


# Folders of samples.


USERS = {
    "report.json": b'{"mine": 1}',
    "manifest.json": b'{"name": "my app"}',
    "grid.png": b"a picture of mine",
    "000001.png": b"a picture of mine",
    "shard-00001.npz": b"arrays of mine",
}


@pytest.mark.parametrize("form", ["png", "npz --shard 2"])
@pytest.mark.parametrize("name", [*USERS])
def test_files_of_the_user_in_a_folder_of_samples(name, form, tiny, tmp_path, capsys) -> None:
    """They are kept: the run is refused where it would write a file of that name, or be misread for it."""
    line = f"sample {tiny} --n 3 --steps 1 --format {form} --out {tmp_path}"
    (tmp_path / name).write_bytes(USERS[name])
    (tmp_path / "notes.txt").write_text("mine")
    code = run(line)
    assert (tmp_path / name).read_bytes() == USERS[name]
    harmless = name == "shard-00001.npz" if form == "png" else name == "000001.png"
    assert code == (0 if harmless else 2)
    if code:
        assert "give --force" in error_line(capsys.readouterr().err)
        assert {path.name for path in tmp_path.iterdir()} == {name, "notes.txt"}
        assert run(line + " --force") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == 3
    assert Image.open(tmp_path / "grid.png").size
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("form", ["png", "npz --shard 2"])
@pytest.mark.parametrize("kind", [*NEVER_REPLACED])
@pytest.mark.parametrize("name", ["report.json", "manifest.json", "grid.png", "000001.png", "shard-00001.npz"])
def test_folders_of_samples_with_links_and_pipes_are_refused(
    name, kind, form, tiny, tmp_path, monkeypatch, capsys, idle
) -> None:
    monkeypatch.chdir(tmp_path)
    NEVER_REPLACED[kind](tmp_path / name)
    before = state(tmp_path)
    for force in ("", " --force"):
        assert run(f"sample {tiny} --n 3 --steps 1 --format {form} --out {tmp_path}{force}") == 2
        assert f"cannot write {tmp_path / name}: it is a" in error_line(capsys.readouterr().err)
        assert state(tmp_path) == before


def test_force_goes_on_where_it_can_and_begins_anew_where_not(tiny, tmp_path, capsys) -> None:
    line = f"sample {tiny} --n 3 --steps 1 --out {tmp_path}"
    assert run(line) == 0
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    assert run(line + " --force") == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")} == times
    capsys.readouterr()
    assert run(line + " --seed 7") == 2
    assert "drawn with another seed; choose another folder, empty this one, or give --force" in capsys.readouterr().err
    assert run(line + " --seed 7 --n 2 --force") == 0
    images, _ = adadiff.sample(adadiff.load(tiny), 2, steps=1, seed=[7, 8])
    for i, image in enumerate(images):
        np.testing.assert_array_equal(read(tmp_path / f"{i:06d}.png"), shell.pixels(image))
    assert not (tmp_path / "000002.png").exists()
    assert run(line + " --format npz --shard 2 --force") == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("grid.png", "manifest.json", "report.json"),
        *("shard-00000.npz", "shard-00001.npz"),
    }


def test_one_of_several_processes_does_not_force(tiny, tmp_path, monkeypatch, capsys) -> None:
    """It would remove what the others have drawn."""
    line = f"sample {tiny} --n 5 --steps 1 --format npz --shard 2 --out {tmp_path} --force"
    assert run(line) == 0
    before = state(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(line) == 0
    assert run(line + " --seed 3") == 2
    assert "--force takes one process" in error_line(capsys.readouterr().err)
    assert {name: value for name, value in state(tmp_path).items() if name != "report.json"} == {
        name: value for name, value in before.items() if name != "report.json"
    }


@pytest.mark.parametrize("form", ["png", "npz"])
def test_a_run_that_drew_nothing_leaves_its_folder_to_others(form, tiny, tmp_path, monkeypatch) -> None:
    line = f"sample {tiny} --n 3 --steps 1 --format {form} --out {tmp_path}"

    def fail(*_: object) -> None:
        raise ValueError("the first step failed")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "tick", fail)
        assert run(line) == 2
    assert run(line + " --seed 3") == 0


# Counts beyond all measure.


@pytest.mark.parametrize(
    "line",
    [
        "sample {} --out {}/o -n 100000000",
        "sample {} --out {}/o -n 100000000 --format npz",
        "sample {} --out {}/o -n 1000001 --format png",
        f"sample {{}} --out {{}}/o -n {10**30}",
        "sample {} --out {}/o --batch 100000000",
        "sample {} --out {}/o -n 5 --format npz --shard 100000000",
        "evaluate {} --json {}/q.json -n 100000000",
        "evaluate {} --json {}/q.json --resamples 100000000",
        "evaluate {} --json {}/q.json -n 1000000 --resamples 10000",
        "evaluate {} --json {}/q.json --batch 100000000",
        "calibrate {} --budget 0.6 --out {}/c -n 100000000",
        "calibrate {} --budget 0.6 --out {}/c --batch 100000000",
    ],
)
def test_counts_have_limits_that_are_checked_first(line, tiny, tmp_path, capsys, idle) -> None:
    tracemalloc.start()
    try:
        assert run(line.format(tiny, tmp_path)) == 2
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert any(words in error_line(captured.err) for words in ("at most", "more than"))
    assert most < 10**8
    assert not list(tmp_path.iterdir())


def test_settings_are_checked_on_few_samples(tiny, tmp_path, monkeypatch, capsys) -> None:
    """All that differ, and the largest seed; not on millions."""
    counts, original = [], SamplerRun.__init__

    def counted(self, model, n, *settings, **more) -> None:
        counts.append(n)
        original(self, model, n, *settings, **more)

    monkeypatch.setattr(SamplerRun, "__init__", counted)
    line = f"sample {tiny} --out {tmp_path}/o -n 10000000"
    for bad, words in (
        ("--steps 3,0", "steps must be at least 1"),
        ("--class-labels 1,2,3,10", "must be in 0..9"),
        (f"--seed {2**63 - 10**6}", "seed"),
        ("--solver euler", "no solver 'euler'"),
    ):
        assert run(f"{line} {bad}") == 2
        assert words in error_line(capsys.readouterr().err)
    assert max(counts, default=0) <= 5
    assert not (tmp_path / "o").exists()


def test_options_say_what_force_does(capsys) -> None:
    for command in ("sample", "evaluate", "diff", "inspect", "calibrate", "train", "distill", "convert"):
        with pytest.raises(SystemExit):
            run(f"{command} --help")
        assert "--force" in capsys.readouterr().out, command


def test_parts_of_killed_runs_go_with_the_next(tiny, tmp_path) -> None:
    sampled, trained = tmp_path / "sampled", tmp_path / "trained"
    for folder, name in ((sampled, "000001.png.0.part"), (trained, "state.safetensors.0123456789abcdef.part")):
        folder.mkdir()
        (folder / name).write_bytes(b"half")
    assert run(f"sample {tiny} --out {sampled} --n 2 --steps 1") == 0
    assert run(f"train --out {trained} {QUICK} --steps 1") == 0
    assert not list(tmp_path.glob("*/*.part"))


def test_modes(tiny, tmp_path) -> None:
    """Files are as readable as the umask says."""
    assert run(f"evaluate {tiny} --n 11 --steps 1 --resamples 2 --json {tmp_path}/q.json") == 0
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "q.json").stat().st_mode) == 0o666 & ~umask
