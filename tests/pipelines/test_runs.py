"""What lanes reuse is of their own run, step and text, whatever calls come in between."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adadiff
from adadiff.policies.reuse import Cache
from pipelines.helpers import STEPS, B, difference, own, scripted, with_policy
from pipelines.zoo import call, inputs, parts_of


def test_time_that_goes_back_begins_a_run() -> None:
    name, module = "FluxTransformer2DModel", own("FluxTransformer2DModel")
    record = adadiff.enable(module, scripted("none", 9, B))
    first = [call(name, range(B), step, module) for step in (0, 1, 2)]
    again = [call(name, range(B), step, module) for step in (0, 1, 2)]
    assert difference(first, again) == 0
    assert [step.full.any().item() for step in record.steps] == [True, False, False]  # of the latest run


def test_two_calls_for_the_same_step_keep_apart() -> None:
    """As pipelines call for the halves of guidance, some without naming a context."""
    name, module = "AuraFlowTransformer2DModel", own("AuraFlowTransformer2DModel")

    def half(step: int, text: float) -> list[Tensor]:
        given = inputs(name, range(B), step)
        given["encoder_hidden_states"] = given["encoder_hidden_states"] * text
        with torch.no_grad():
            return parts_of(module(**given, return_dict=False))

    policy = scripted("none", STEPS, B)
    apart = [with_policy(module, policy, lambda step, text=text: half(step, text)) for text in (1.0, -2.0)]
    both = with_policy(module, policy, lambda step: [*half(step, 1.0), *half(step, -2.0)])
    for i in (0, 1):
        assert difference([[parts[i]] for parts in both], apart[i]) == 0


def test_a_lane_whose_text_changes_runs_in_full() -> None:
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    record = adadiff.enable(module, scripted("none", STEPS + 1, B))
    text = inputs(name, range(B))["encoder_hidden_states"]
    for step in range(STEPS):
        if step == 2:
            text = text.clone()
            text[3] += 1
        with torch.no_grad():
            module(**{**inputs(name, range(B), step), "encoder_hidden_states": text})
    assert [step.full.tolist() for step in record.steps] == [
        *([True] * 5, [False] * 5, [False, False, False, True, False], [False] * 5),
    ]
    with torch.no_grad():
        text += 1  # in place: every lane's
        module(**{**inputs(name, range(B), STEPS), "encoder_hidden_states": text})
    assert record.steps[-1].full.all()


def test_another_sample_at_the_same_time_begins_a_run() -> None:
    name, module = "DiTTransformer2DModel", own("DiTTransformer2DModel")
    record = adadiff.enable(module, Cache(1e9))
    for given in (
        inputs(name, range(B), 3),
        {**inputs(name, range(B), 5), "timestep": inputs(name, range(B), 3)["timestep"]},
    ):
        with torch.no_grad():
            module(**given)
    assert record.steps[-1].full.all()
    assert record.steps[-1].step == 0


def test_a_run_that_begins_where_another_ended_takes_nothing_from_it() -> None:
    """One step, then two from the same time on, for the same labels."""
    name, module = "DiTTransformer2DModel", own("DiTTransformer2DModel")

    def at(step: int, moved: float) -> list[Tensor]:
        given = inputs(name, range(B), step)
        with torch.no_grad():
            return parts_of(module(**{**given, "hidden_states": given["hidden_states"] + moved}, return_dict=False))

    adadiff.enable(module, Cache(1e9))
    at(3, 0.0)
    later = [at(3, 1.0), at(4, 1.0)]
    adadiff.disable(module)
    adadiff.enable(module, Cache(1e9))
    assert difference([at(3, 1.0), at(4, 1.0)], later) == 0


class Keeping(nn.Module):
    """Keeps what goes through its blocks, and changes in place what they give."""

    class Block(nn.Module):
        def __init__(self, i: int):
            super().__init__()
            self.map = nn.Linear(6, 6)
            nn.init.normal_(self.map.weight, std=0.2 + 0.1 * i)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states + torch.tanh(self.map(hidden_states))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(i) for i in range(4))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        kept = []
        for block in self.blocks:
            hidden_states = block(hidden_states)
            kept.append(hidden_states)
            if len(kept) in (2, 3):
                hidden_states += 1.0
        return hidden_states + kept[0]


def test_values_that_a_transformer_keeps_are_not_written_to() -> None:
    module = Keeping().eval().requires_grad_(False)
    x = torch.randn(B, 3, 6)
    plain = module(x, torch.tensor(0.5))
    adadiff.enable(module, scripted("none", 2, B))
    assert torch.equal(module(x, torch.tensor(0.5)), plain)
    torch.testing.assert_close(module(x, torch.tensor(0.4)), plain, rtol=0, atol=1e-5)
    adadiff.disable(module)


def test_an_error_in_the_middle_forgets_the_run() -> None:
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    adadiff.enable(module, scripted("none", STEPS, B))
    first = [call(name, range(B), step, module) for step in range(STEPS)]
    call(name, range(B), 0, module)
    block = module.transformer_blocks[1]
    handle = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(name, range(B), 0, module)
    handle.remove()
    assert difference([call(name, range(B), step, module) for step in range(STEPS)], first) == 0


def test_one_call_at_a_time() -> None:
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    adadiff.enable(module, "cache:threshold=0.1")
    errors: list[BaseException] = []

    def beside(*_: Any) -> None:
        def other() -> None:
            try:
                call(name, range(B), 0, module)
            except ValueError as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    handle = module.transformer_blocks[2].register_forward_pre_hook(beside)
    call(name, range(B), 0, module)
    handle.remove()
    assert "use a copy for each thread" in str(errors[0])
    call(name, range(B), 1, module)
