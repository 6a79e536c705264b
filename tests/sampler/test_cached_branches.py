"""Samples that reuse single branches of an earlier step of theirs, against the same done by hand, one lane alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adadiff
from adadiff.config import ModelConfig
from adadiff.forward import runner
from adadiff.forward.branch_plan import BranchPlan
from adadiff.forward.forward import directly, run_forward
from adadiff.forward.decision import decide
from adadiff.forward.layers import Asked
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.forward.reuse_lanes import NONE, ReuseLanes
from adadiff.forward.structure import structure_of
from adadiff.model import Model
from adadiff.models.dit import DiTConfig
from adadiff.models.layers import Attention, Mlp
from adadiff.policies.exits import Full, Replay
from adadiff.policies.reuse import Reuse
from adadiff.policies.spelling import parts_from
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.uem import PAPER
from sampler.branches_by_hand import OneLane, pass_by_hand
from sampler.tiny import SERVED, case, served

# T = 4 tokens, 4 blocks, a variance beside the noise
SMALL_DIT = ModelConfig(
    DiTConfig(image_size=4, channels=1, patch=2, dim=16, depth=4, heads=2, num_classes=4),
    "linear",
    null_label=3,
    exits=PAPER,
)
CONFIGS = {"uvit": SERVED, "dit": SMALL_DIT}
LAYERS = 4  # that both have
POLICIES = [
    "reuse:every=2,level=layer",
    "reuse:every=3,level=unit,unit=mlp,layers=2-3+exit:0.45",
    "reuse:every=2,level=layer,dense_early=2,dense_late=1+exit:0.5",
    "reuse:every=3,level=unit,unit=attention+exit:depth=2.5",
    "reuse:every=2,level=layer+exit:patience=0.5",
]
OTHERS = ["full", "exit:0.5", "cache:threshold=0.4", "reuse:every=2"]
HOST, GROUPS = ExecutionOptions(), ExecutionOptions(group_size=2)
SYNC, LAGGED = ExecutionOptions(count_sync="sync"), ExecutionOptions(count_sync="lagged:2")
INVARIANT = ExecutionOptions(batch_invariant=True)
EXECUTIONS = [
    pytest.param(HOST, id="host"),
    pytest.param(GROUPS, id="groups"),
    pytest.param(SYNC, id="sync"),
    pytest.param(LAGGED, id="lagged"),
    pytest.param(INVARIANT, id="lane by lane"),
]


@dataclass
class Watched:
    """Forward passes of a batch. told: by lane, the latest of an entry last: step, steps left, x, t, context, and what
    it got: prediction and exit layer. rows: of every pass, how many rows each branch computed, by module."""

    told: dict[int, list[list[tuple]]] = field(default_factory=dict)
    macs: int = 0
    reused: int = 0

    def __call__(self, model: Model, x: Tensor, t: Tensor, context: Tensor, **given: object) -> ForwardOutput:
        output = run_forward(model, x, t, context, **given)
        self.macs += output.macs
        reuse: ReuseLanes | None = given.get("reuse")
        for b in range(len(x)):
            if reuse is None or reuse.index[b] == NONE:
                continue
            step, left = int(reuse.step[b]), int(reuse.steps_left[b])
            histories = self.told.setdefault(int(reuse.entry[b]), [])
            if step == 0:
                histories.append([])
            own = [None if v is None else v[b : b + 1].clone() for v in (x, t, context)]
            policy = reuse.policies[int(reuse.index[b])]
            got = output.prediction[b : b + 1].clone(), int(output.exit_layer[b])
            histories[-1].append((policy, step, left, *own, *got))
        return output


def run(kind: str, requests: list[tuple[int, dict]], execution: ExecutionOptions, forward: Callable = run_forward):
    """Requests, each admitted at its tick, drawn in one batch of four slots. Returns their images."""
    model = served(CONFIGS[kind])
    batch, waiting, images, slots = Batch(model, 4, execution=execution, forward=forward), list(enumerate(requests)), {}, {}
    tick = 0
    while waiting or batch.count:
        while waiting and batch.free and waiting[0][1][0] <= tick:
            number, (_, request) = waiting.pop(0)
            slots[int(batch.admit(SampleBatch.of(model, 1, **request), np.zeros(1, dtype=np.int64))[0])] = number
        made = batch.tick()
        assert not made.failed
        for slot, image in zip(made.done.tolist(), batch.take(made.done), strict=True):
            images[slots.pop(slot)] = image
        tick += 1
    return [images[i] for i in range(len(requests))], batch


def mixed(others: bool = True) -> list[tuple[int, dict]]:
    """Requests at different steps, guided ones among them, some of which reuse nothing or whole blocks."""
    made = []
    for i, policy in enumerate(POLICIES + (OTHERS if others else [])):
        request = {"seed": 10 + i, "steps": 4 + i % 3, "policy": policy, "class_labels": i % 3}
        if i % 3 == 1:
            request |= {"guidance_scale": 2.0, "tied": i == 1}
        made.append((i // 2, request))
    return made


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
@pytest.mark.parametrize("execution", [SYNC, LAGGED], ids=["sync", "lagged"])
def test_so_it_has_where_passes_are_fused(kind: str, execution: ExecutionOptions) -> None:
    check_by_hand(kind, execution)
