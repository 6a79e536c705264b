"""Policies of order 1: what lanes reuse grows from step to step as it did between their last two full steps."""

import pytest
import torch
from torch import Tensor, nn

import adadiff
from adadiff.policies.reuse import Cache, ReusePolicy
from pipelines.helpers import STEPS, B, Scripted, difference, of_lane, own, run, scripted, with_policy
from pipelines.zoo import call, inputs, network, parts_of

# one stream; two streams, and two lists one after the other; lists that take turns; rows along the second dimension
CLASSES = (
    *("DiTTransformer2DModel", "FluxTransformer2DModel", "LatteTransformer3DModel"),
    "ErnieImageTransformer2DModel",
)


class Growing(nn.Module):
    """Blocks whose later ones add what is linear in the time and differs from lane to lane."""

    class Block(nn.Module):
        def __init__(self, later: bool):
            super().__init__()
            self.later = later

        def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
            return hidden_states + (0.5 + 2 * temb[:, None, None] if self.later else hidden_states.sin())

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(later=i > 0) for i in range(3))

    def forward(self, hidden_states: Tensor, timestep: Tensor, slope: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep * slope)
        return hidden_states


def test_what_grows_linearly_is_reused_exactly() -> None:
    """Lane 0 is full at steps 0, 1, 4, lane 1 at 0, 2, lane 2 at 0 alone, so that it knows no growth."""
    full = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).bool()
    x, slope = torch.randn(3, 5, 6), torch.tensor([1.0, -3.0, 2.0])

    def output(module: nn.Module, step: int) -> list[Tensor]:
        return [module(x + 0.1 * step, torch.tensor(9.0 - step), slope)]

    module = Growing().eval()
    plain = [output(module, step) for step in range(len(full))]
    found = {}
    for order in (0, 1):
        policy = Scripted(tuple(map(tuple, full.tolist())), order=order)
        record = adadiff.enable(module, policy, blocks=["blocks"])
        found[order] = [output(module, step) for step in range(len(full))]
        adadiff.disable(module)
        assert [step.full.tolist() for step in record.steps] == full.tolist()
    for lane, known in ((0, 1), (1, 2)):  # the step from which on the growth is known
        later = [of_lane(outputs[known:], lane) for outputs in (plain, found[1], found[0])]
        assert difference(later[0], later[1]) < 1e-4
        assert difference(later[0], later[2]) > 1.0
    assert difference(of_lane(found[1], 2), of_lane(found[0], 2)) == 0
    assert difference(found[1][:2], found[0][:2]) == 0


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("pattern", ["alternating", "single", "random"])
def test_each_row_is_its_run_alone(name: str, pattern: str) -> None:
    policy, held = (scripted(pattern, STEPS + 2, B, order=order) for order in (1, 0))
    outputs = run(name, range(B), STEPS + 2, policy)
    assert difference(outputs, run(name, range(B), STEPS + 2, held)) > 1e-4
    plain = run(name, range(B), STEPS + 2)
    for lane in range(B):
        solo = difference(of_lane(plain, lane), run(name, [lane], STEPS + 2))
        largest = max(float(part.abs().max()) for parts in outputs for part in parts)
        allowed = 8 * max(solo, torch.finfo(torch.float32).eps * largest)  # a growth over a step adds three roundings
        assert difference(of_lane(outputs, lane), run(name, [lane], STEPS + 2, policy.column(lane))) <= allowed


def test_a_text_that_changes_begins_the_growth_anew() -> None:
    """Lane 3 runs in full where its text changes, at step 2, and then reuses that step's features as they are."""
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")

    def make(step: int) -> list[Tensor]:
        given = inputs(name, range(B), step)
        given["encoder_hidden_states"][3] += float(step >= 2)
        with torch.no_grad():
            return parts_of(module(**given, return_dict=False))

    full = ((True,) * B, *((False,) * B,) * (STEPS - 1))
    held, grown = (with_policy(module, Scripted(full, order=order), make) for order in (0, 1))
    assert difference(held, grown) == 0


def test_the_cache_takes_twice_the_memory_and_says_so() -> None:
    kept = {}
    for order in (0, 1):
        module = own("DiTTransformer2DModel")
        record = adadiff.enable(module, scripted("none", STEPS, B, order=order))
        for step in range(STEPS):
            call("DiTTransformer2DModel", range(B), step, module)
        kept[order] = record.cache_bytes
        adadiff.disable(module)
    assert kept[1] == 2 * kept[0] > 0


def test_text_and_refusals() -> None:
    class Quadratic(ReusePolicy):
        order = 2

    module = network("DiTTransformer2DModel")
    with pytest.raises(ValueError, match=r"order of .* must be 0 or 1, got 2"):
        adadiff.enable(module, Quadratic())
    record = adadiff.enable(module, "cache:threshold=0.1,order=1")
    adadiff.disable(module)
    assert str(Cache(0.1, order=1)) in str(record)
