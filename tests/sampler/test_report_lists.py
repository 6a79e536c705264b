"""What report.json tells of single pictures: steps that were chosen, and who went on to a cascade's teacher."""

import json
from pathlib import Path

import pytest

import adadiff
from sampler.cascading import written
from sampler.shell import error_line, run
from sampler.test_step_selector import CHOSEN, selecting
from sampler.tiny import served


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_steps_that_were_chosen_are_told_by_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """After a run that draws some of the pictures again, too."""
    model, out = tmp_path / "m.safetensors", tmp_path / "out"
    adadiff.save(selecting(), model)
    line = f"sample {model} --out {out} --n 5 --steps auto --class-labels 2,0,1,0,1 --batch 2"
    assert run(line) == 0
    chosen = [CHOSEN[label] for label in (2, 0, 1, 0, 1)]
    assert report_of(out)["by_sample"] == {"steps": chosen}
    (out / "000001.png").unlink()
    (out / "000004.png").write_bytes(b"damaged")
    assert run(line) == 0
    assert report_of(out)["by_sample"] == {"steps": chosen}
    report = report_of(out)
    for wrong in ({"steps": chosen[:4]}, {"steps": [*chosen[:4], "5"]}, {"steps": 5}, {}):
        (out / "report.json").write_text(json.dumps({**report, "by_sample": wrong}))
        capsys.readouterr()
        assert run(line) == 2
        assert "report.json is not a report of `adadiff sample`" in error_line(capsys.readouterr().err)


def test_pictures_that_are_not_drawn_have_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tmp_path / "m.safetensors", tmp_path / "out"
    adadiff.save(selecting(), model)
    monkeypatch.setattr("adadiff.output.pictures.to_pixels", lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(f"sample {model} --out {out} --n 3 --steps auto --class-labels 0,1,2")
    assert report_of(out)["by_sample"] == {"steps": [None] * 3}


def test_who_went_on_to_the_teacher_is_told_by_picture(tmp_path: Path) -> None:
    file = written(tmp_path)
    model, out = tmp_path / "m.safetensors", tmp_path / "out"
    adadiff.save(served(), model)
    policy = f"cascade:{file},share=0.5"
    assert run(f"sample {model} --out {out} --n 6 --steps 4 --class-labels 0,1,2 --policy {policy}") == 0
    _, report = adadiff.sample(
        served(), 6, seed=list(range(6)), steps=4, class_labels=[0, 1, 2, 0, 1, 2], policy=policy
    )
    assert 0 < report.went_on.sum() < 6
    assert report_of(out)["by_sample"] == {"went_on": report.went_on.tolist()}


def test_others_have_no_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor have folders of very many pictures, whose report is written over and over."""
    model = tmp_path / "m.safetensors"
    adadiff.save(selecting(), model)
    assert run(f"sample {model} --out {tmp_path}/a --n 2 --steps 3 --class-labels 0,1") == 0
    assert "by_sample" not in report_of(tmp_path / "a")
    monkeypatch.setattr("adadiff.output.pictures.MOST_LISTED", 1)
    assert run(f"sample {model} --out {tmp_path}/b --n 2 --steps auto --class-labels 0,1") == 0
    assert "by_sample" not in report_of(tmp_path / "b")
