"""Networks, policies and requests for tests of branches that are reused, and a batch that draws them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from torch import Tensor

from adadiff.config import ModelConfig
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.forward.reuse_lanes import NONE, ReuseLanes
from adadiff.model import Model
from adadiff.models.dit import DiTConfig
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.uem import PAPER
from sampler.tiny import SERVED, served

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
SELDOM = ExecutionOptions(count_sync="sync:4")  # so that rows are launched that have left
INVARIANT = ExecutionOptions(batch_invariant=True)
EXECUTIONS = [
    pytest.param(HOST, id="host"),
    pytest.param(GROUPS, id="groups"),
    pytest.param(SYNC, id="sync"),
    pytest.param(LAGGED, id="lagged"),
    pytest.param(SELDOM, id="seldom"),
    pytest.param(INVARIANT, id="lane by lane"),
]


@dataclass
class Watched:
    """Forward passes of a batch. told: by lane, the latest of an entry last: step, steps left, x, t, context, and what
    it got: prediction and exit layer."""

    told: dict[int, list[list[tuple]]] = field(default_factory=dict)

    def __call__(self, model: Model, x: Tensor, t: Tensor, context: Tensor, **given: object) -> ForwardOutput:
        output = run_forward(model, x, t, context, **given)
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
    batch, waiting, images, slots = (
        Batch(model, 4, execution=execution, forward=forward),
        list(enumerate(requests)),
        {},
        {},
    )
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
