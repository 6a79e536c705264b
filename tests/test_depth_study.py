"""The study of what depth follows: its statistics by hand, and the whole script in small."""

import json
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff.calibration.stopping import Work, total
from benchmarks.studies import depth


def test_variance_between_timesteps_and_groups_by_hand() -> None:
    groups = {"class": torch.tensor([0, 0, 0, 1, 1, 1])}
    time_alone = torch.tensor([[2] * 6, [8] * 6])
    assert depth.variance(time_alone, groups) == depth.Variance(1.0, {"class": 0.0})
    class_alone = torch.tensor([[2, 2, 2, 8, 8, 8]] * 2)
    found = depth.variance(class_alone, groups)
    assert (found.timestep, found.groups["class"], found.rest) == pytest.approx((0, 1, 0))
    assert depth.variance(torch.full((3, 6), 4), groups).groups == {"class": 0.0}


def test_groups_explain_nothing_by_chance() -> None:
    """Random depths in 100 groups of 5: the plain share of explained squares would be 99 / 499."""
    generator = torch.Generator().manual_seed(0)
    layers = torch.randint(1, 14, (20, 500), generator=generator)
    found = depth.variance(layers, {"class": torch.arange(500) % 100})
    assert abs(found.groups["class"]) < 0.02
    own = torch.arange(500) % 100 / 10
    mixed = torch.randn(20, 500, generator=generator) * float(own.std()) + own
    assert depth.variance(mixed, {"class": torch.arange(500) % 100}).groups["class"] == pytest.approx(0.5, abs=0.05)


def test_the_oracle_spends_where_it_helps() -> None:
    """Two samples at one timestep, of four layers: one is right from the first block on, the other from the third."""
    error = torch.tensor([[[0.0, 5.0], [0.0, 5.0], [0.0, 0.0]]])
    work = Work(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), 0.0)
    layers = depth.oracle(error, work, 0.5)
    assert layers.tolist() == [[1, 3]]
    assert total(layers, error, work) == (0.0, 0.5)


def test_errors_are_compared_at_equal_work() -> None:
    one, other = [(0.2, 4.0), (0.6, 1.0)], [(0.4, 8.0), (0.8, 2.0)]
    assert depth.error_over(one, other, 0.4) == pytest.approx(2 / 8)
    assert depth.error_over(one, other, 0.6) == pytest.approx(1 / 4)


@pytest.mark.slow
def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(depth, "STEPS", 4)
    depth.main(["canvases", "-n", "40", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    rows = {row["kind"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert set(rows) == {"drawn", "bounds"}
    assert rows["drawn"]["timestep"] + rows["drawn"]["groups"]["class"] + rows["drawn"]["rest"] == pytest.approx(1)
    for ours, best in zip(*(rows["bounds"]["curves"][name] for name in ("timestep alone", "oracle")), strict=True):
        assert best[1] <= ours[1]  # with error known, less of it is left for the same work
    assert f"| drawn | {rows['drawn']['timestep']:.0%} |" in shown
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    plain = tmp_path / "plain.safetensors"
    adadiff.save(adadiff.build("digits"), plain)
    with pytest.raises(ValueError, match="no calibration"):
        depth.main([str(plain), "--out", str(tmp_path)])
    depth.main(["canvases", "-n", "40", "--out", str(tmp_path)])
    assert capsys.readouterr().out == shown
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows)  # nothing was measured again
