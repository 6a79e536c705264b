"""Calibrations that were interrupted go on where they stopped, and find what they would have found."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.calibration.calibrating import Calibrating
from adadiff.calibration.kept_runs import IDENTITY, KeptRuns
from adadiff.calibration.reuse_errors import ReuseErrors
from sampler import shell
from sampler.shell import fill_disk, interrupt_call, run
from sampler.tiny import served

ctrl_c = shell.ctrl_c
tiny = shell.tiny


class Counting(KeptRuns):
    """Counts the results that are made; Ctrl-C comes while number `most` + 1 is."""

    def __init__(self, folder: Path | None, most: int | None = None) -> None:
        super().__init__(folder, {"seed": 3})
        self.made, self._most = 0, most

    def run(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        def counted() -> Mapping[str, Tensor]:
            found = make()
            if self.made == self._most:
                raise KeyboardInterrupt
            self.made += 1
            return found

        return super().run(name, counted)


def calibrated(kept: KeptRuns) -> object:
    """The calibration, and the UEMs that were fitted for it."""
    calibrating = Calibrating(served(), [0.6, 0.8], n=8, steps=3, batch=8, refit=True)
    found = calibrating.run(kept=kept)
    assert torch.equal(calibrating.recording.u, calibrated_once().recording.u)
    return found, [value.tolist() for value in calibrating.model.exits.parameters()]


@cache
def calibrated_once() -> Calibrating:
    calibrating = Calibrating(served(), [0.6, 0.8], n=8, steps=3, batch=8, refit=True)
    calibrating.run()
    return calibrating


def estimated(kept: KeptRuns) -> object:
    return ReuseErrors(served(), n=32, steps=4, batch=16).run(kept=kept).text


@pytest.mark.parametrize("calibrate", [calibrated, estimated])
def test_they_find_the_same_in_as_many_runs(calibrate: Callable[[KeptRuns], object], tmp_path: Path) -> None:
    whole = Counting(None)
    wanted, folder = calibrate(whole), tmp_path / "runs"
    for number, most in enumerate((0, 1, 4, whole.made - 6)):
        with pytest.raises(KeyboardInterrupt):
            calibrate(Counting(folder, most))
        assert Counting(folder).count == (0, 1, 5, whole.made - 1)[number]
    last = Counting(folder)
    assert calibrate(last) == wanted
    assert last.made == 1
    last.drop()
    assert not folder.exists()


def test_results_come_back_bit_for_bit_or_are_made_again(tmp_path: Path) -> None:
    made = {"a": torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.float64), "b": torch.tensor(0.1)}
    kept = KeptRuns(tmp_path / "runs", {"n": 8})

    def never() -> dict[str, Tensor]:
        raise AssertionError("it is kept")

    assert kept.run("one", lambda: made) is not made
    found = KeptRuns(tmp_path / "runs", {"n": 8}).run("one", never)
    assert all(found[name].numpy().tobytes() == value.numpy().tobytes() for name, value in made.items())
    file = tmp_path / "runs" / "one.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        assert torch.equal(kept.run("one", lambda: {"b": torch.tensor(7)})["b"], torch.tensor(7))


def test_a_full_disk_ends_the_keeping_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptRuns(tmp_path / "runs")
    kept.run("one", lambda: {"b": torch.tensor(1)})
    with monkeypatch.context() as patch:
        fill_disk(patch, tmp_path / "runs", 0)
        with pytest.warns(UserWarning, match="not kept from now on: .*No space left"):
            assert kept.run("two", lambda: {"b": torch.tensor(2)})["b"] == 2
    assert kept.run("three", lambda: {"b": torch.tensor(3)})["b"] == 3
    assert kept.run("one", dict)["b"] == 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [IDENTITY, "one.safetensors"]


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / f"{IDENTITY}.00ff.part").write_text("{")  # of a process killed at once
    KeptRuns(folder, {"n": 8})  # an empty one will do
    assert not any(folder.iterdir())
    (folder / "letter.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(ValueError, match="holds no runs of a calibration"):
            KeptRuns(folder, {"n": 8}, force)
    assert (folder / "letter.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(folder)
    for other in ("file", "link"):
        with pytest.raises(ValueError, match="it is no folder"):
            KeptRuns(tmp_path / other, {}, force=True)


def test_runs_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    kept = KeptRuns(folder, {"n": 8, "seed": 1})
    kept.run("one", lambda: {"b": torch.tensor(7)})
    (folder / "one.safetensors.00ff.part").write_text("left by a killed process")
    assert KeptRuns(folder, {"n": 8, "seed": 1}).count == 1
    assert sorted(path.name for path in folder.iterdir()) == [IDENTITY, "one.safetensors"]
    with pytest.raises(ValueError, match="another n, prompts; give --force to drop them"):
        KeptRuns(folder, {"n": 9, "seed": 1, "prompts": 2})
    assert kept.count == 1
    assert KeptRuns(folder, {"n": 9, "seed": 1}, force=True).count == 0
    kept.run("one", lambda: {"b": torch.tensor(7)})
    (folder / IDENTITY).write_text("[")
    with pytest.raises(ValueError, match="another n, seed"):
        KeptRuns(folder, {"n": 8, "seed": 1})


LINES = {
    "calibrate": "calibrate {model} --budget 0.6 --n 8 --steps 3 --refit",
    "calibrate-reuse": "calibrate-reuse {model} --n 32 --steps 4",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_the_same_command_goes_on(
    tiny: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, out = line.format(model=tiny), tmp_path / "out.safetensors"
    assert run(f"{line} --out {tmp_path / 'whole'}") == 0
    undo = interrupt_call(monkeypatch, KeptRuns, "run", 4)
    capsys.readouterr()
    assert run(f"{line} --out {out}") == 130
    folder = tmp_path / "out.safetensors.runs"
    assert f"{folder} keeps 3 runs; the same command goes on from there" in capsys.readouterr().err
    undo()
    assert not out.exists()
    assert run(f"{line} --out {out} --seed 5") == 2
    assert "runs with another seed" in capsys.readouterr().err
    assert run(f"{line} --out {out}") == 0
    assert f"{folder} holds 3 runs; going on" in capsys.readouterr().out
    assert not folder.exists()
    assert contents(out) == contents(tmp_path / "whole")


def contents(file: Path) -> Any:
    if file.read_bytes()[:1] == b"{":
        return json.loads(file.read_text())
    model = adadiff.load(file)
    return model.calibration, [value.tolist() for value in model.parameters()]
