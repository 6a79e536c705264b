"""`adadiff sample` writes the pictures that Python draws and loses none when interrupted. Shards: test_shards.py."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adadiff
from adadiff.forward import runner
from adadiff.output import pictures
from sampler import guards, shell
from sampler.shell import config, error_line, grid_cells, interrupt_call, pixels, read, run, saved

ctrl_c, tiny, no_hang = shell.ctrl_c, shell.tiny, guards.no_hang


# Seven samples, three at a time, in runs of 3 and 4 steps: slots are refilled at different times.
def test_sample_writes_the_images_that_python_draws(tiny, tmp_path, capsys):
    out = tmp_path / "deep" / "er"
    line = (
        f"sample {tiny} --out {out} --n 7 --steps 3,4 --solver ddim:0.5 --policy exit:0.4 --seed 5 "
        "--class-labels 0,7,2 --guidance-scale 2.5 --tied --batch 3"
    )
    assert run(line) == 0
    images, report = adadiff.sample(
        adadiff.load(tiny),
        7,
        steps=[3, 4, 3, 4, 3, 4, 3],
        solver="ddim:0.5",
        policy="exit:0.4",
        seed=[5, 6, 7, 8, 9, 10, 11],
        class_labels=[0, 7, 2, 0, 7, 2, 0],
        guidance_scale=2.5,
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
    assert bool((report.exit_layer[..., 0] == report.exit_layer[..., 1]).all()), "tied lanes exit together"
    assert written["exit_layer_histogram"] == [ends.count(layer) for layer in (1, 2, 3)]
    assert written["mean_exit_layer"] == pytest.approx(sum(ends) / len(ends), abs=1e-12)
    assert (written["blocks"], written["blocks_full"]) == (sum(ends), 3 * len(ends))
    assert (written["macs"], written["macs_full"]) == (report.macs, report.macs_full)
    assert written["samples"] == 7
    assert written["seconds"] > 0
    assert written["configuration"]["class_labels"] == [0, 7, 2]
    printed = capsys.readouterr().out
    first, last = printed.splitlines()
    assert first == (
        f"{tiny}: 7 samples, 3 or 4 steps of ddim:0.5, guidance scale 2.5, policy exit:0.4, seeds from 5, on cpu"
    )
    left_out = f"{1 - report.macs / report.macs_full:.0%} of the work left out"
    assert last.startswith(f"wrote {out / 'grid.png'}: 7 images in ")
    assert last.endswith(f"images/s), {left_out} ({report.mean_exit_layer:.2f} of 3 blocks a step)")


def test_grid_shows_the_pictures_in_order(tiny, tmp_path):
    assert run(f"sample {tiny} --out {tmp_path} --n 7 --steps 2") == 0
    grid = read(tmp_path / "grid.png")  # 3 columns, cells of 64 pixels, two of them empty
    cells = grid_cells(grid, 3, 3)
    for slot in range(7):
        expected = np.kron(read(tmp_path / f"{slot:06d}.png"), np.ones((8, 8), np.uint8))
        np.testing.assert_array_equal(cells[slot], expected)
    assert all((cell == 255).all() for cell in cells[7:])


def test_one_picture_has_no_frame_and_two_have_a_gap():
    """In colour, neither square nor of a size that a cell is a multiple of."""
    picture = np.arange(5 * 3 * 3, dtype=np.uint8).reshape(5, 3, 3)
    shown = np.kron(picture, np.ones((12, 12, 1), np.uint8))
    np.testing.assert_array_equal(pictures.make_grid([picture]), shown)
    np.testing.assert_array_equal(
        pictures.make_grid([picture, picture]), np.hstack([shown, np.full((60, 4, 3), 255, np.uint8), shown])
    )


def test_nothing_is_left_out_unless_it_is_asked_for(tiny, tmp_path):
    plain = saved(tmp_path / "plain.safetensors", dataclasses.replace(config(), exits=None))
    for name, model in (("exits", tiny), ("plain", plain)):
        assert run(f"sample {model} --out {tmp_path / name} --n 2 --steps 1") == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["configuration"]["policy"] == "full"
        assert report["exit_layer_histogram"] == [0, 0, 2]


def test_how_it_is_computed_is_asked_for_and_kept(tiny, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(runner, "compiled_function", lambda function: calls.append(function) or function)
    line = f"sample {tiny} --n 2 --steps 2 --policy exit:0.4 --device cpu --out "
    for name, options, dtype in (
        ("dtype", "--dtype bfloat16", "bfloat16"),
        ("invariant", "--batch-invariant", None),
        ("compiled", "--runner compiled", None),
    ):
        assert not calls
        assert run(f"{line}{tmp_path / name} {options}") == 0
        execution = adadiff.ExecutionOptions(batch_invariant=name == "invariant")
        model = adadiff.load(tiny, dtype=dtype)
        images, _ = adadiff.sample(model, 2, steps=2, policy="exit:0.4", execution=execution)
        for slot, image in enumerate(images):
            np.testing.assert_array_equal(read(tmp_path / name / f"{slot:06d}.png"), pixels(image))
        asked = json.loads((tmp_path / name / "report.json").read_text())["configuration"]
        assert (asked["device"], asked["dtype"], asked["guidance_scale"]) == ("cpu", dtype, 1.0)
        assert asked["batch_invariant"] == (name == "invariant")
        assert asked["runner"] == ("compiled" if name == "compiled" else "eager")
    assert calls
    capsys.readouterr()
    for options, name in (("--dtype bfloat16", "dtype"), ("--batch-invariant", "batch_invariant")):
        assert run(f"{line}{tmp_path / 'compiled'} --runner eager {options}") == 2
        assert f"drawn with another {name}" in error_line(capsys.readouterr().err).replace(", runner", "")


def test_color_models_write_color(tmp_path):
    model = saved(tmp_path / "rgb.safetensors", config(channels=3))
    assert run(f"sample {model} --out {tmp_path / 'o'} --n 2 --steps 2 --policy full") == 0
    images, _ = adadiff.sample(adadiff.load(model), 2, steps=2)
    for slot, image in enumerate(images):
        np.testing.assert_array_equal(read(tmp_path / "o" / f"{slot:06d}.png"), pixels(image))


def test_interrupted_sampling_keeps_what_is_finished_and_draws_the_rest(tiny, tmp_path, monkeypatch, capsys):
    line = f"sample {tiny} --n 9 --steps 3,2 --class-labels 0,7,2 --policy exit:depth=2 --batch 4 --out "
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
    assert 5 * 3 + 4 * 2 <= report["passes"] == sum(report["exit_layer_histogram"])

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
    changes = {"--seed 1": "seed", "--class-labels 1": "class_labels", "--n 3": "n", "--policy exit:0.1": "policy"}
    for change, name in changes.items():
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
    assert run(f"sample {tiny} --out {tmp_path / 'o'} --n 0 --class-labels 1") == 0
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--policy exit:1.5", "strictly between 0 and 1"),
        ("--policy exit:nan", "strictly between 0 and 1"),
        ("--policy sometimes", "no policy 'sometimes'"),
        ("--solver euler", "euler"),
        ("--class-labels 0,10", "labels must be in 0..9"),
        ("--class-labels 1,2,3,4", "4 class labels for 3 samples"),
        ("--steps 0", "steps must be at least 1"),
        ("--steps 5,-2", "steps must be at least 1"),
        ("--steps 1001", "1000"),
        ("--n -1", "n must be an integer >= 0"),
        ("--batch 0", "batch must be an integer >= 1"),
        ("--seed -1", "seed must be an integer >= 0"),
        ("--guidance-scale 2", "without --class-labels doubles the work and changes nothing"),
        ("--tied", "--tied joins the halves of guidance, and there is none"),
        ("--guidance-scale nan", "guidance_scale must be finite"),
        ("--device toaster", "cannot use device 'toaster'"),
        ("--runner compiled --batch-invariant", "lane by lane, which is not compiled"),
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


# ---- only whole pictures count as drawn ----

DAMAGES = {
    "empty": lambda data: b"",
    "signature": lambda data: data[:8],
    "header": lambda data: data[:40],
    "half": lambda data: data[: len(data) // 2],
    "pixels": lambda data: data[:-20],
    "end": lambda data: data[:-12],
    "last byte": lambda data: data[:-1],
    "a byte": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"no picture",
}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_pictures_are_drawn_again_and_counted_once(damage, tiny, tmp_path, capsys):
    line = f"sample {tiny} --out {tmp_path} --n 5 --steps 2 --batch 1"
    assert run(line) == 0
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    before = times(tmp_path)
    for slot in (1, 4):
        path = tmp_path / f"{slot:06d}.png"
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    capsys.readouterr()
    assert run(line) == 0
    out = capsys.readouterr().out
    assert f"2 of 5 pictures are damaged and drawn again: {tmp_path}/000001.png" in out
    assert f"3 of 5 pictures are in {tmp_path} already; drawing 2" in out
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == whole
    kept = {name: before[name] for name in ("000000.png", "000002.png", "000003.png")}
    assert kept.items() <= times(tmp_path).items()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == 5
    assert report["passes"] == sum(report["exit_layer_histogram"]) == 7 * 2


def test_a_picture_of_another_size_is_refused(tiny, tmp_path, capsys):
    """Somebody has changed it; it is neither replaced nor counted."""
    line = f"sample {tiny} --out {tmp_path} --n 3 --steps 1"
    assert run(line) == 0
    Image.open(tmp_path / "000001.png").resize((16, 16)).save(tmp_path / "000001.png")
    (tmp_path / "000002.png").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(line) == 2
    assert "000001.png is 16x16, but the samples are 8x8" in error_line(capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["000001.png", "grid.png", "report.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "zeros", "dead link"])
def test_what_is_no_file_is_no_picture(kind, name, tiny, tmp_path, capsys, no_hang):
    line = f"sample {tiny} --out {tmp_path} --n 3 --steps 1"
    assert run(line) == 0
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "zeros" else "nowhere")
    before = path.lstat()
    assert run(line) == 2
    assert name in error_line(capsys.readouterr().err)
    assert path.lstat() == before


KILLED = """
import os, signal, sys
from adadiff import cli
from adadiff.output.pictures import PictureFolder

add, calls = PictureFolder.add, []

def killed(self, slot, image, **more):
    calls.append(slot)
    if len(calls) == 7:
        (self.folder / f"{slot:06d}.png.0.part").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, slot, image, **more)

PictureFolder.add = killed
cli.main(sys.argv[1:])
"""


def test_a_killed_run_is_counted_and_completed(tiny, tmp_path):
    """Ten samples, two at a time, of 3 steps: killed while the seventh was written, three ticks of two having ended."""
    words = f"sample {tiny} --out {tmp_path} --n 10 --steps 3 --batch 2 --format png".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    death = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, timeout=120)
    assert death.returncode == -signal.SIGKILL
    there = times(tmp_path)
    assert len(there) == 6
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == 6
    assert report["passes"] >= 6 * 3
    assert run(" ".join(words)) == 0
    assert there.items() <= times(tmp_path).items()
    assert len(times(tmp_path)) == 10
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == 10
    assert 10 * 3 <= report["passes"] == sum(report["exit_layer_histogram"]) <= 12 * 3
    assert report["blocks_full"] == 3 * report["passes"]
    assert not list(tmp_path.glob("*.part"))


def changed(report: dict, **changes: object) -> str:
    return json.dumps({**report, **changes})


@pytest.mark.parametrize("pictures_too", [True, False])
def test_a_report_that_is_none_is_not_replaced(pictures_too, tiny, tmp_path, capsys):
    line = f"sample {tiny} --out {tmp_path} --n 2 --steps 1"
    assert run(line) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    if not pictures_too:
        for path in tmp_path.glob("*.png"):
            path.unlink()
    for text in (
        *("", "{", "[]", "7", "[" * 100_000, '{"accuracy": 0.9}', '{"configuration": 3}', '{"configuration": []}'),
        *(changed(report, passes=value) for value in ("7", None, -1, True, [1], float("nan"), 10**40)),
        *(changed(report, exit_layer_histogram=value) for value in ([1, 2], 7, ["1", "2", "3"], None)),
        changed(report, num_layers=4),
        json.dumps({name: value for name, value in report.items() if name != "macs"}),
    ):
        (tmp_path / "report.json").write_text(text)
        assert run(line) == 2
        assert "is not a report of `adadiff sample`" in error_line(capsys.readouterr().err)
        assert (tmp_path / "report.json").read_text() == text


def test_an_option_given_twice_is_an_error(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(f"sample {tiny} --out {tmp_path}/o --policy full --policy exit:0.5")
    assert end.value.code == 2
    assert "--policy is given twice; this command takes one" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_what_to_try_is_what_the_model_was_calibrated_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Followed, it draws without a note that the share of the work may differ; other settings get one, also where the
    policy is one of several."""
    assert run("inspect letters") == 0
    tried = re.search(r"^try: adadiff (.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert "--guidance-scale 2 --policy exit:budget=0.55" in tried
    tried = tried.replace("--out samples", "").replace("0,1,2,3", "0")
    notes = []
    for i, line in enumerate((tried, f"{tried}+cache:threshold=0", f"{tried}+cache:threshold=0 --solver dpm++2m")):
        last = line.replace("--solver ddim", "") if "dpm" in line else line
        assert run(f"{last} --n 1 --out {tmp_path / str(i)}") == 0
        notes.append("the policy was calibrated for" in capsys.readouterr().out)
    assert notes == [False, False, True]


@pytest.mark.parametrize("command", ["calibrate", "calibrate-reuse"])
def test_a_calibration_ends_with_the_options_to_sample_with(
    command: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the solver, the steps and the guidance it holds for; followed, they draw without a note."""
    budget, out = " --budget 0.8" if command == "calibrate" else "", tmp_path / "made"
    line = f"{command} {tiny} --out {out} --n 32 --batch 16 --steps 4 --solver dpm++2m --guidance-scale 2{budget}"
    assert run(line) == 0
    how = re.search(r"sample (?:it )?with (--.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert how.startswith("--class-labels 0,1,2,3 --steps 4 --solver dpm++2m --guidance-scale 2 --policy ")
    model = out if command == "calibrate" else tiny
    assert run(f"sample {model} --out {tmp_path}/drawn --n 5 {how}") == 0
    assert "the policy was calibrated for" not in capsys.readouterr().out
