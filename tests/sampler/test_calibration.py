"""A calibration's file, and the policies that read it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff.checkpoint import load, save
from adadiff.policies.calibrated import Budget, Calibration, Measured
from adadiff.policies.interface import ExitContext
from adadiff.sampling.sample_batch import SampleBatch
from sampler.tiny import SERVED, served

MEASURED = Measured(0.5, 2.0, 0.01, 0.005, 0.02, 30.0, None)
T = (900.0, 500.0, 100.0)


def made(*budgets: tuple[float, list, list]) -> Calibration:
    own = tuple(
        Budget(share, tuple(map(tuple, rows)), tuple(depths), MEASURED, MEASURED, (0.5, 0.4, 0.6))
        for share, rows, depths in budgets
    )
    return Calibration("faithful", "ddim", 3, 1.0, 8, 0, 5, T, (3.0, 2.0, 1.0), own)


HALF = (0.5, [[0, 0.3, 0, 2], [0, 0.6, 0, 0], [0, 0, 0, 0.45]], [2, 3, 5])
MOST = (0.9, [[0, 0, 0, 0.5]] * 3, [4, 4, 5])


def test_a_lane_is_asked_at_its_own_time_and_budget() -> None:
    policy = made(HALF, MOST).policy("budget", 0.5)
    assert policy.exit_layers(5) == [2, 4]
    t = torch.tensor([999.0, 701.0, 699.0, 301.0, 299.0, 1.0, 1.0])
    share = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9])
    u = torch.full((7,), 0.47)
    context = ExitContext(5, t, share, state=torch.zeros(7))
    assert policy.exit_mask(u, 2, context).tolist() == [False, False, True, True, False, False, False]
    assert policy.exit_mask(u, 4, context).tolist() == [True, True, False, False, False, False, True]
    assert not bool(policy.exit_mask(u * torch.nan, 4, context).any())
    table = made(HALF, MOST).policy("table", 0.9)
    assert table.exit_layers(5) == [2, 3, 4]
    depth = [next(k for k in range(1, 6) if k == 5 or bool(table.exit_mask(None, k, context)[i])) for i in range(7)]
    assert depth == [2, 2, 3, 3, 5, 5, 5]


def test_policies_of_one_calibration_are_one_kind() -> None:
    """Samples that differ in their budget share every forward pass of a batch."""
    calibration = made(HALF, MOST)
    a, b = calibration.policy("budget", 0.5), calibration.policy("budget", 0.9)
    assert a.tables is b.tables
    assert a != b
    assert (a.threshold, b.threshold) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit:budget=0.6", "calibrated for budgets 0.5, 0.9, got"),
        (
            "exit:budget=half",
            "cannot use policy 'exit:budget=half': budget must be a number, got 'half'.*budget=SHARE",
        ),
        ("exit:table=0", r"cannot use policy 'exit:table=0': a share of the work lies in \(0, 1\].*exit:budget=SHARE"),
        (
            "exit:budget=1.5",
            r"cannot use policy 'exit:budget=1.5': a share of the work lies in \(0, 1\].*exit:budget=SHARE",
        ),
        (
            "exit:budget=nan",
            r"cannot use policy 'exit:budget=nan': a share of the work lies in \(0, 1\].*exit:budget=SHARE",
        ),
    ],
)
def test_budgets_it_lacks_are_refused(text: str, message: str) -> None:
    model = adadiff.Model(SERVED).eval()
    model.calibration = made(HALF, MOST)
    with pytest.raises(ValueError, match=message):
        SampleBatch.of(model, 2, policy=text)
    with pytest.raises(ValueError, match="calibrated for budgets"):
        SampleBatch.of(model, 2, policy="exit:budget=0.5", thresholds=[0.5, 0.7])


def test_a_model_without_calibration_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match=r"adadiff calibrate MODEL --budget 0\.5"):
        SampleBatch.of(served(), 1, policy="exit:budget=0.5")


def test_a_calibration_is_for_its_own_number_of_blocks() -> None:
    small = adadiff.Model(dataclasses.replace(SERVED, network=dataclasses.replace(SERVED.network, depth=2)))
    small.calibration = made(HALF)
    with pytest.raises(ValueError, match="a network of 5 blocks, this one has 3"):
        SampleBatch.of(small, 1, policy="exit:budget=0.5")


@pytest.mark.parametrize(
    "change",
    [
        {"t": T[:2]},
        {"num_layers": 4},
        {"weights": (1.0,)},
        {"budgets": ()},
        {"t": ()},
    ],
)
def test_tables_of_another_shape_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="a calibration has tables of"):
        dataclasses.replace(made(HALF), **change)


def test_numbers_that_cannot_be_are_refused() -> None:
    for rows, depths in (
        ([[0, math.nan, 0, 0]] * 3, [1, 2, 3]),
        ([[0, 3, 0, 0]] * 3, [1, 2, 3]),
        ([[0] * 4] * 3, [0, 1, 2]),
    ):
        with pytest.raises(ValueError, match="thresholds lie in"):
            made((0.5, rows, depths))
    with pytest.raises(ValueError, match="no calibration"):
        Calibration.from_dict({"aim": "faithful"})
    with pytest.raises(ValueError, match="no calibration"):
        Calibration.from_dict({**made(HALF).to_dict(), "colour": 1})


def test_it_travels_in_the_model_file(tmp_path: Path) -> None:
    model = adadiff.Model(SERVED)
    model.calibration = made(HALF, MOST)
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert again.calibration == model.calibration
    assert Calibration.from_dict(json.loads(json.dumps(model.calibration.to_dict()))) == model.calibration
    save(adadiff.Model(SERVED), tmp_path / "n.safetensors")
    assert load(tmp_path / "n.safetensors").calibration is None
