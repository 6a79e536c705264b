"""The pilots' arithmetic, by loops, and the whole script in small."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.studies import pilots


def test_depth_needed_is_where_the_error_stays_below() -> None:
    """An error that comes back deeper down means that exiting before was luck."""
    error = torch.tensor([[5.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]).T[None]  # [1, 3, 4]
    assert pilots.depth_needed(error, torch.tensor(2.0)).tolist() == [[2, 3, 1, 4]]


def test_residual_is_what_time_and_class_leave() -> None:
    need = torch.tensor([[1.0, 3.0, 10.0, 10.0], [2.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    assert float(pilots.residual(need, labels)) == pytest.approx((1 + 1 + 4 + 4) / 8)


def test_pilots_run_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name, value in {"SAMPLES": 28, "SAMPLE_STEPS": 3, "REFERENCE": 200, "RECORDED": 14}.items():
        monkeypatch.setattr(pilots, name, value)
    line = f"pilots --out {tmp_path} --steps 2 --data canvases:n=50 --set dim=16 heads=2 depth=4"
    monkeypatch.setattr(sys, "argv", line.split())
    pilots.main()
    results = json.loads((tmp_path / "pilots.json").read_text())
    assert json.loads(capsys.readouterr().out) == {k: v for k, v in results.items() if k not in ("data", "network")}
    assert (results["full"]["steps"], results["shallow"]["steps"]) == (2, 2)
    models = {
        name: pilots.adadiff.load(tmp_path / name / "model.safetensors") for name in ("full", "shallow", "frozen")
    }
    assert {name: model.num_layers for name, model in models.items()} == {"full": 5, "shallow": 3, "frozen": 5}
    assert torch.equal(models["frozen"].backbone.pos_embed, models["full"].backbone.pos_embed)
    assert results["ceiling"]["easy"][0] > results["full"]["easy"][0]
    assert 1 <= results["needs"]["mean_depth"] <= 5
    parts = [results["needs"][f"explained_by_timestep{more}"] for more in ("", "_and_class")]
    assert 0 <= parts[0] <= parts[1] <= 1
    monkeypatch.setattr(pilots.Trainer, "update", lambda self: pytest.fail("trained again"))
    pilots.main()
