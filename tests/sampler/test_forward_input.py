"""What a forward pass refuses, and lanes of several policies in one."""

import math
from types import SimpleNamespace

import pytest
import torch

from adadiff.forward.forward import forward
from adadiff.policies.exits import Depth, Full, Replay, Threshold
from adadiff.uem import PAPER
from sampler.test_engine import F32, run
from sampler.tiny import BATCH, case, inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": torch.full((BATCH - 1,), 0.5)}, "one number per lane"),
        ({"threshold": torch.full((BATCH,), 1.0)}, "strictly between 0 and 1"),
        ({"threshold": torch.full((BATCH,), math.nan)}, "strictly between 0 and 1"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -3}, "group_size"),
    ],
)
def test_bad_input_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(case("uvit", PAPER, F32), Threshold(0.5), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "2 policies need policy_index"),
        ({"policy_index": torch.zeros(BATCH)}, "policy_index must be int64"),
        ({"policy_index": torch.zeros(BATCH - 1, dtype=torch.int64)}, "policy_index must be int64"),
        ({"policy_index": torch.full((BATCH,), 2)}, r"policy_index must lie in \[0, 2\)"),
        ({"policy_index": torch.full((BATCH,), -1)}, r"policy_index must lie in \[0, 2\)"),
        ({"policy_index": torch.arange(BATCH) % 2, "threshold": torch.full((BATCH,), 3.0)}, "strictly between 0 and 1"),
        (
            {"policy_index": torch.arange(BATCH) % 2, "cfg_partner": torch.tensor([1, 0, *range(2, BATCH)])},
            "partners exit together, so they need one policy",
        ),
    ],
)
def test_lanes_that_do_not_fit_their_policies_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(case("uvit", PAPER, F32), [Threshold(0.5), Depth(3)], **options)


def test_policies_and_their_spellings_side_by_side() -> None:
    c, index = case("uvit", PAPER, F32), torch.arange(BATCH) % 3
    found = run(c, ["exit:0.48", "full", Depth(2)], policy_index=index)
    alone = [run(c, policy).exit_layer for policy in (Threshold(0.48), Full(), Depth(2))]
    assert torch.equal(found.exit_layer, torch.stack(alone).gather(0, index[None])[0])
    torch.testing.assert_close(found.prediction, c.exiting(found.exit_layer), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_run_is_refused() -> None:
    c = case("uvit", PAPER, F32)
    given = inputs(c.backbone)
    with pytest.raises(ValueError, match="no exits"):
        forward(SimpleNamespace(backbone=c.backbone, exits=None), *given.all, policy=Threshold(0.5))
    with pytest.raises(ValueError, match="'full' takes no thresholds"):
        run(c, Full(), threshold=torch.full((BATCH,), 0.5))
    with pytest.raises(ValueError, match="threshold"):
        run(c, Replay())
    given.x.requires_grad_()
    with pytest.raises(ValueError, match="require grad"):
        run(c, Full(), given=given)
