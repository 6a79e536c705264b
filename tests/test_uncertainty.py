"""The uncertainty benchmark: its statistics by hand, and the whole script in small."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import uncertainty


def test_rank_correlation_sees_order_only() -> None:
    """Two timesteps, one layer, four samples: the order itself, and one with two neighbours swapped (1 - 6 * 2 / 60).
    The scale of each timestep is of no account."""
    error = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]]])
    u = torch.tensor([[[0.1, 0.2, 0.3, 0.9]], [[100.0, 300.0, 200.0, 400.0]]])
    assert uncertainty.rank_correlation(u, error) == pytest.approx((1 + 0.8) / 2)
    assert uncertainty.rank_correlation(-u, error) == pytest.approx(-(1 + 0.8) / 2)


def test_share_within_a_timestep() -> None:
    assert uncertainty.share_within(torch.tensor([[3, 3, 3], [7, 7, 7]])) == 0  # time says all
    assert uncertainty.share_within(torch.tensor([[1, 3], [1, 3]])) == 1  # and nothing
    assert uncertainty.share_within(torch.tensor([[1, 3], [3, 5]])) == pytest.approx(0.5)
    assert uncertainty.share_within(torch.full((2, 2), 4)) == 0


@pytest.mark.slow
def test_the_script_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(uncertainty, "STEPS", 3)
    monkeypatch.setattr(uncertainty, "BUDGETS", (0.5, 0.8))
    kept = {
        name: uncertainty.VARIANTS[name] for name in ("relative", "relative, bias by time", "relative, fitted anew")
    }
    monkeypatch.setattr(uncertainty, "VARIANTS", kept)
    arguments = ["--data", "digits", "--out", str(tmp_path), "--steps", "2", "-n", "8"]
    uncertainty.main(arguments)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in table] == ["exits", "---", *kept]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == list(kept)
    assert all([b["share"] for b in row["budgets"]] == [0.5, 0.8] for row in rows)
    monkeypatch.setattr(uncertainty.Trainer, "update", lambda self: pytest.fail("trained again"))
    uncertainty.main(arguments)
    assert capsys.readouterr().out.splitlines() == table
