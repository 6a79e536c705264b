"""The search for a schedule of widths: what it counts, what it finds, and what its command leaves on disk."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import adadiff
from adadiff.calibration import width_search
from adadiff.calibration.width_search import Candidate, WidthSearch, schedule
from adadiff.metrics.judges import judge_of
from adadiff.metrics.quality import evaluate_samples
from adadiff.metrics.yardsticks import Yardstick
from adadiff.policies.width import Width
from sampler import shell
from sampler.shell import config, error_line, interrupt_call, run, saved, strict_json
from sampler.slim import WIDTHS

pytest.importorskip("pymoo")
ctrl_c = shell.ctrl_c
SLIM = dataclasses.replace(config(heads=4), widths=WIDTHS)
SHORT = {"bins": 3, "population": 6, "generations": 2, "n": 4, "steps": 3}
LINE = "--n 4 --steps 3 --bins 3 --population 6 --generations 2"


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "slim.safetensors", SLIM)


def test_a_schedule_has_one_width_for_each_stretch() -> None:
    assert schedule((0, 0, 2, 3), WIDTHS) == Width((500.0, 750.0), (0.25, 0.8, 1.0))
    assert schedule((1, 1, 1), WIDTHS) == Width((), (0.5,))
    assert schedule((2,), WIDTHS) == Width((), (0.8,))


@pytest.mark.parametrize("aim", ["faithful", "distribution"])
def test_value_is_quality_and_weighted_share(slim: str, aim: str) -> None:
    """Recomputed from samples of the same seeds; the best is no worse than any width alone."""
    model = adadiff.load(slim)
    shape = tuple(model.backbone.sample_shape)
    yardstick = Yardstick.of(shape, judge_of(shape, 10)) if aim == "distribution" else None
    heard: list[Candidate] = []
    search = WidthSearch(model, 0.7, aim=aim, seed=40, yardstick=yardstick, **SHORT)
    found = search.run(better=heard.append)

    def by_hand(width: Width, seed: int) -> Candidate:
        given = {"steps": 3, "seed": [seed + i for i in range(4)], "class_labels": [0, 1, 2, 3]}
        images, report = adadiff.sample(model, 4, policy=width, **given)
        full, _ = adadiff.sample(model, 4, **given)
        error = float((images.double() - full.double()).square().mean())
        quality = error if aim == "faithful" else evaluate_samples(images).frechet
        share = report.macs / report.macs_full
        return Candidate(width, share, quality, quality + 0.7 * share)

    assert found.best.value == pytest.approx(by_hand(found.best.width, 40).value, rel=1e-4)
    assert found.measured.value == pytest.approx(by_hand(found.best.width, 44).value, rel=1e-4)
    assert [one.width.widths for one in found.uniform] == [(width,) for width in WIDTHS]
    for one in found.uniform:
        assert one.value == pytest.approx(by_hand(one.width, 44).value, rel=1e-4, abs=1e-6)
        assert found.best.value <= by_hand(one.width, 40).value * (1 + 1e-4)
    assert heard[-1] == found.best
    assert [one.value for one in heard] == sorted((one.value for one in heard), reverse=True)
    again = WidthSearch(model, 0.7, aim=aim, seed=40, yardstick=yardstick, **SHORT).run()
    assert again == found
    assert f"{found.measured.share:.1%}" in str(found)


def test_it_finds_where_width_matters(slim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4^6 schedules the one that is best, where a width below 1 costs what it does below a time of 500 alone."""
    drawn: list[tuple[float, ...]] = []

    def draw(self: WidthSearch, width: Width, seed: int) -> Candidate:
        times = np.arange(0, 1000, 50) + 25.0
        own = width.widths_at(times)
        drawn.append(tuple(own))
        quality, share = float(((1 - own) * (times < 500)).mean()), float(own.mean())
        return Candidate(width, share, quality, quality + self.weight * share)

    monkeypatch.setattr(WidthSearch, "_draw", draw)
    search = WidthSearch(adadiff.load(slim), 0.5, aim="faithful", bins=6, population=16, generations=15, n=4, steps=3)
    assert search.run().best.width == Width((500.0,), (1.0, 0.25))
    assert {(width,) * 20 for width in WIDTHS} <= set(drawn[:16])
    searched = drawn[: -len(WIDTHS) - 1]
    assert len(set(searched)) == len(searched) < 4**6 / 8  # none is drawn twice, few of all


def test_the_command_writes_a_policy(slim: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "widths.json"
    assert run(f"search {slim} --aim faithful --weight 0.5 {LINE} --out {out}") == 0
    printed = capsys.readouterr().out
    values = strict_json(out.read_text())
    assert len(values["widths"]) == len(values["times"]) + 1
    assert set(values["widths"]) <= set(WIDTHS)
    assert [one["width"] for one in values["quality"]["uniform"]] == list(WIDTHS)
    assert values["settings"]["weight"] == 0.5
    assert values["settings"]["model"] == "slim"
    assert f"{values['quality']['measured']:.4g}" in printed
    _, report = adadiff.sample(adadiff.load(slim), 4, steps=3, policy=f"width:{out}")
    assert report.macs / report.macs_full == pytest.approx(values["share"])
    before = out.read_bytes()
    assert run(f"search {slim} --aim faithful --weight 0.5 {LINE} --out {out}") == 2
    assert "it exists; --force replaces it" in error_line(capsys.readouterr().err)
    assert out.read_bytes() == before
    assert run(f"search {slim} --aim faithful --weight 0.5 {LINE} --out {out} --force") == 0
    assert out.read_bytes() == before
    assert run(f"sample {slim} --n 2 --steps 2 --policy width:{out} --out {tmp_path / 'images'}") == 0
    schedule_again = values | {"times": [123.0], "widths": [0.5, 0.25]}
    out.write_text(json.dumps(schedule_again))
    assert run(f"sample {slim} --n 3 --steps 2 --policy width:{out} --out {tmp_path / 'images'}") == 2
    assert "widths" in error_line(capsys.readouterr().err)
    assert run(f"evaluate {slim} --n 4 --steps 2 --policy width:{out} --policy width:0.5+exit:depth=2") == 0


def test_what_was_found_before_ctrl_c_is_kept(
    slim: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "widths.json"
    interrupt_call(monkeypatch, WidthSearch, "_draw", 7)
    assert run(f"search {slim} --aim faithful --weight 0.5 {LINE} --out {out}") == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    share = strict_json(out.read_text())["share"]
    assert f"{out} holds the best schedule so far, of {share:.1%} of the multiply-adds" in line
    assert adadiff.sample(adadiff.load(slim), 1, steps=2, policy=f"width:{out}")[1].passes == 2
    monkeypatch.undo()
    drawn = calls(monkeypatch, width_search, "sample")
    assert run(f"search {slim} --aim faithful --weight 0.5 {LINE} --out {out} --force") == 0
    again, everything = len(drawn), tmp_path / "everything.json"
    assert run(f"search {slim} --aim faithful --weight 0.5 {LINE} --out {everything}") == 0
    assert len(drawn) - again == again + 6
    assert strict_json(out.read_text()) == strict_json(everything.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["everything.json", "widths.json"]
    monkeypatch.undo()
    interrupt_call(monkeypatch, WidthSearch, "_draw", 1)
    assert run(f"search {slim} --aim faithful --weight 0.5 {LINE} --out {tmp_path / 'none.json'}") == 130
    assert not (tmp_path / "none.json").exists()


def calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list:
    """Grows by one with each call of a function."""
    original, seen = getattr(owner, name), []

    def function(*given: object, **options: object) -> object:
        seen.append(given)
        return original(*given, **options)

    monkeypatch.setattr(owner, name, function)
    return seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--weight -1", "weight must be a finite number >= 0, got -1.0"),
        ("--weight nan", "weight must be a finite number >= 0, got nan"),
        ("--weight 1 --bins 0", "bins must be"),
        ("--weight 1 --bins 1001", "bins must be"),
        ("--weight 1 --population 4", "population must be"),
        ("--weight 1 --generations 0", "generations must be"),
        ("--weight 1 --n 1", "n must be"),
        ("--weight 1 --steps 2,3", "one number of steps"),
        ("--weight 1 --steps 0", "steps"),
        ("--weight 1 --features digits", "the aim 'faithful' .* takes no features"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    slim: str, options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(f"search {slim} --aim faithful --out {tmp_path / 'a.json'} {options}") == 2
    assert re.search(message, error_line(capsys.readouterr().err))
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_searched_are_refused(
    slim: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(f"search digits --weight 1 --out {tmp_path / 'a.json'}") == 2
    assert "this model has one width" in error_line(capsys.readouterr().err)
    with pytest.raises(ValueError, match="no features are known"):
        WidthSearch(adadiff.load(slim), 1.0, yardstick=Yardstick())
    with pytest.raises(ValueError, match="aim must be one of"):
        WidthSearch(adadiff.load(slim), 1.0, aim="fast")
    monkeypatch.setitem(sys.modules, "pymoo", None)
    assert run(f"search {slim} --aim faithful --weight 1 --out {tmp_path / 'a.json'}") == 2
    assert "pip install 'adadiff_kernels[search]'" in error_line(capsys.readouterr().err)


def test_the_tables_of_two_searches_differ_by_their_weight(slim: str) -> None:
    model = adadiff.load(slim)
    dear, cheap = (WidthSearch(model, weight, aim="faithful", **SHORT).run().best for weight in (1e6, 0.0))
    assert dear.width.widths == (WIDTHS[0],)
    assert (cheap.width.widths, cheap.quality) == ((1.0,), 0.0)
    assert dear.share < cheap.share == 1
