"""Samples that reuse single branches of an earlier step of theirs, against the same done by hand, one lane alone."""

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.forward import runner
from adadiff.forward.options import ExecutionOptions
from adadiff.policies.reuse import Reuse, ReuseContext
from sampler.branches_by_hand import OneLane, pass_by_hand
from sampler.cached_branches import CONFIGS, EXECUTIONS, LAYERS, SELDOM, SYNC, Watched, mixed, run
from sampler.tiny import served


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes after a branch are one, as on a GPU; here PyTorch makes them."""
    monkeypatch.setattr(runner, "is_fused", lambda x, outputs: True)


def check_by_hand(kind: str, execution: ExecutionOptions) -> None:
    model, watched = served(CONFIGS[kind]), Watched()
    run(kind, mixed(), execution, watched)
    passes, taken_ever, older = 0, 0, 0
    for histories in watched.told.values():
        for history in histories:
            policy = history[0][0]
            if not isinstance(policy, Reuse) or policy.level == "block":
                continue
            lane, said = OneLane(policy, LAYERS + (kind == "uvit")), {}
            for _, step, left, x, t, context, prediction, exit_layer in history:
                taken, kept, full = lane.step(step, left)
                wanted = pass_by_hand(model.backbone, model.exits, x, t, context, taken, said, exit_layer)
                torch.testing.assert_close(prediction, wanted, rtol=1e-4, atol=1e-5)
                older += bool(not full and lane.chosen() - taken)
                lane.ends(step, kept, full, exit_layer)
                passes, taken_ever = passes + 1, taken_ever + len(taken)
    assert passes > 25
    assert taken_ever > 50
    assert older > 1  # steps that reuse, in which branches behind an earlier exit are computed


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_every_lane_has_what_it_has_alone_by_hand(kind: str, execution: ExecutionOptions) -> None:
    check_by_hand(kind, execution)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("execution", [SYNC, SELDOM], ids=["sync", "seldom"])
def test_so_it_has_where_passes_are_fused(kind: str, execution: ExecutionOptions) -> None:
    check_by_hand(kind, execution)


class Fresh(Reuse):
    """Keeps every branch at every step, and takes none."""

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return torch.zeros_like(context.step, dtype=torch.bool)


@pytest.mark.parametrize("policy", [Reuse(1, "layer"), Fresh(2, "layer")], ids=["every step is full", "all is kept"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_plan_that_takes_nothing_is_the_plain_network_bit_for_bit(
    kind: str, execution: ExecutionOptions, policy: Reuse
) -> None:
    model, given = served(CONFIGS[kind]), {"steps": 3, "seed": 4, "class_labels": torch.arange(5) % 3}
    for exits in ("full", "exit:0.5"):
        plain, _ = adadiff.sample(model, 5, policy=exits, execution=execution, **given)
        ours, report = adadiff.sample(model, 5, policy=[policy, exits], execution=execution, **given)
        assert torch.equal(ours, plain)
        assert report.reuses == 0
