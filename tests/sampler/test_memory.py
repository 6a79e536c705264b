"""A capacity in bytes: what fits is measured, and what would not fit is not promised."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from adadiff.config import ModelConfig
from adadiff.engine.engine import Engine
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.structure import structure_of
from adadiff.model import Model
from adadiff.models.uvit import UViTConfig
from adadiff.policies.exits import Full, Replay
from adadiff.sampling import capacity as memory
from adadiff.sampling.batch import Batch
from adadiff.sampling.capacity import capacity_of, lane_bytes, peak_bytes
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from sampler.tiny import UVIT, served

TEXT = UViTConfig(8, 3, 2, 48, 6, 3, context_tokens=7, context_dim=33)
MODELS = {
    "paper": (ModelConfig(UVIT, "linear", null_label=4, exits=PAPER), torch.float32),
    "map": (ModelConfig(UVIT, "linear", null_label=4, exits=OFFICIAL), torch.float32),
    "bfloat16 map": (ModelConfig(UVIT, "linear", null_label=4, exits=OFFICIAL), torch.bfloat16),
    "no exits": (ModelConfig(UVIT, "linear", null_label=4), torch.float32),
    "text": (ModelConfig(TEXT, "linear", exits=PAPER), torch.float32),
    "larger": (
        ModelConfig(dataclasses.replace(UVIT, image_size=16), "linear", null_label=4, exits=PAPER),
        torch.float32,
    ),
}


def model(name: str) -> Model:
    config, dtype = MODELS[name]
    return Model(config).requires_grad_(False).eval().to(dtype)


def forward_pass(made: Model, n: int, exit_layer: list[int] | None) -> int:
    """Peak bytes of a forward pass of n lanes, which exit after the blocks given, in turn."""
    network = made.config.network
    context = torch.zeros(n, dtype=torch.int64)
    if network.context_tokens:
        context = torch.zeros(n, network.context_tokens, network.context_dim)
    x, t = torch.zeros(n, *made.backbone.sample_shape), torch.zeros(n)
    policy, threshold = Full(), None
    if exit_layer is not None and made.exits is not None:
        policy, threshold = Replay(), torch.tensor([float(exit_layer[i % len(exit_layer)]) for i in range(n)])
    return peak_bytes(lambda: forward(made, x, t, context, policy=policy, threshold=threshold))


def serving(made: Model, n: int) -> int:
    """Peak bytes of a batch of n slots, from its making to its third step, the first in another order, with the solvers
    that keep most: three predictions, and where a step began."""
    network = made.config.network
    text = torch.zeros(n, network.context_tokens, network.context_dim) if network.context_tokens else None
    policy = "full" if made.exits is None else "exit:0.5"

    def run() -> None:
        batch = Batch(made, n)
        for own, solver in zip(np.split(np.arange(n), [max(1, n - 1)]), ("unipc:order=3", "heun"), strict=True):
            samples = SampleBatch.of(made, n, solver=solver, steps=9, policy=policy, text_embeds=text)
            if len(own):
                batch.admit(samples, own)
        for _ in range(3):
            assert not batch.tick().failed

    return peak_bytes(run)


TABLES = 12 * 1024  # bytes of coefficients and of the schedule, whatever the capacity


def kept(made: Model) -> int:
    """Bytes of a sample's own, between forward passes and beside them."""
    network = made.config.network
    context = 4 * network.context_tokens * network.context_dim or 8  # text or label
    return 9 * 4 * math.prod(made.backbone.sample_shape) + 3 * context


# 64 lanes of 66 tokens and 150 of 18 are more than one group
@pytest.mark.parametrize(
    ("name", "lanes"),
    [("paper", 1), ("paper", 64), ("paper", 150), ("larger", 64)]
    + [(name, 5) for name in ("map", "bfloat16 map", "no exits", "text", "larger")],
)
def test_as_many_lanes_as_fit(name: str, lanes: int) -> None:
    """Whoever exits when, and a third more would not fit."""
    made = model(name)
    each, shared, group = lane_bytes(made)
    budget = lanes * each + min(lanes, group) * shared
    bytes_ = -(-budget // 1024) * 1024
    fit = capacity_of(made, f"{bytes_ // 1024}KiB")
    assert fit >= lanes
    for exit_layer in (None, [7], [1, 7], list(range(1, 8)), [1], [6]):
        assert forward_pass(made, fit, exit_layer) <= bytes_
    assert serving(made, fit) <= bytes_ + TABLES
    if lanes >= 5:
        more = -(-fit * 13 // 10)
        assert forward_pass(made, more, [7]) + kept(made) * more > bytes_


def test_on_a_device_the_way_that_holds_most_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head for every lane, where the host does not know who exited where; else those of a layer share one."""
    config = dataclasses.replace(MODELS["paper"][0], exits=ExitConfig(head="block"))
    made = Model(config).requires_grad_(False).eval()
    x, t, context = torch.zeros(5, 3, 8, 8), torch.zeros(5), torch.zeros(5, dtype=torch.int64)

    def run(execution: ExecutionOptions) -> None:
        forward(made, x, t, context, policy=Replay(), threshold=torch.arange(5.0) + 1, execution=execution)

    peaks = {how: peak_bytes(lambda how=how: run(ExecutionOptions(count_sync=how))) for how in ("sync", "lagged")}
    weights = sum(parameter.nbytes for parameter in made.exits.heads[0].parameters())
    assert peaks["lagged"] > 5 * weights > peaks["sync"]
    ways = []
    monkeypatch.setattr(memory, "forward", lambda *_, **options: ways.append(options["execution"].count_sync))
    lane_bytes(made.to("meta"))
    assert {str(way) for way in ways} == {str(ExecutionOptions(count_sync="lagged").count_sync)}


def test_bytes_of_a_call_by_hand() -> None:
    """Only what operators returned counts, storages once, and only while they are alive; inputs do not."""
    given = torch.zeros(1000)

    def call() -> Tensor:
        a = given + 1  # 4000
        b = a.view(10, 100)[2:].t()  # the same storage
        b.add_(1)
        a = a.double()  # 4000 for b, 8000
        del b
        return a[:5].clone()  # 8000 and 20 more

    assert peak_bytes(call) == 12000
    assert peak_bytes(lambda: given.view(-1).add_(1)) == 0
    assert peak_bytes(lambda: [given + k for k in range(5)]) == 20000
    assert peak_bytes(lambda: [float((given + k).sum()) for k in range(5)]) <= 4000 + 100


@pytest.mark.parametrize(("lanes", "tokens"), [(114, 18), (31, 66)])
def test_lanes_of_a_group(lanes: int, tokens: int) -> None:
    made = model("paper" if tokens == 18 else "larger")
    assert (made.backbone.tokens, structure_of(made.backbone).group_size, lane_bytes(made)[2]) == (tokens, lanes, lanes)


def test_units_are_powers_of_two() -> None:
    made = served()
    assert capacity_of(made, "1MiB") == capacity_of(made, "1024KiB")
    assert capacity_of(made, "1GiB") == capacity_of(made, "1024MiB")
    assert capacity_of(made, "0.5MiB") == capacity_of(made, "512KiB") < capacity_of(made, "1MiB")
    assert capacity_of(made, 7) == 7


def test_an_engine_of_so_many_bytes_draws_its_samples() -> None:
    engine = Engine(served(), "200KiB", threaded=False)
    assert engine.capacity == capacity_of(served(), "200KiB") > 1
    request = {"seed": 3, "steps": 2, "class_labels": 1}
    handles = [engine.submit(**request) for _ in range(3 * engine.capacity)]
    engine.close()
    assert handles[0].samples.context.tolist() == [1]
    assert all(handle.result(0).isfinite().all() for handle in handles)
    assert engine.report.batch.ticks == 6


BAD = ["", "512", "512MB", "1e3MiB", "-1GiB", " 1GiB", "1 GiB", "1gib", "MiB", ".5GiB", "1GiB\n", "nanMiB"]


@pytest.mark.parametrize("capacity", BAD)
def test_other_spellings_are_refused(capacity: str) -> None:
    with pytest.raises(ValueError, match=r"such as '512MiB' or '2GiB', got " + re.escape(repr(capacity))):
        Engine(served(), capacity)


@pytest.mark.parametrize("capacity", [0, -3, 2.5, None, True])
def test_other_numbers_are_refused(capacity: object) -> None:
    with pytest.raises(ValueError, match="capacity must be an integer >= 1"):
        Engine(served(), capacity)


@pytest.mark.parametrize("capacity", ["0MiB", "1KiB"])
def test_bytes_for_not_one_lane_are_refused(capacity: str) -> None:
    with pytest.raises(ValueError, match=rf"one lane of this model takes .* MiB, more than {capacity}"):
        Engine(served(), capacity)


def test_peak_counts_what_is_alive_at_once_and_nothing_that_was_there() -> None:
    weight = torch.randn(100, 100)  # 40,000 bytes, not ours

    def call() -> None:
        a = weight @ weight
        b = a + 1  # 80,000 alive
        del a
        c = b.view(-1) * 2  # 80,000
        part = c[:10]  # a view keeps all of c
        del b, c
        weight.t().mul_(1.0)
        torch.empty(20_000), part  # 120,000

    assert peak_bytes(call) == 120_000
    assert peak_bytes(lambda: weight.t()) == 0
