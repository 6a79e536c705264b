"""What would go wrong without a word: blocks exchanged after the check, halves that are none, control that ends."""

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

import adadiff
from adadiff.pipelines.enable import enabled
from adadiff.policies.reuse import ReuseContext, ReusePolicy
from pipelines.helpers import RANDOM, STEPS, B, difference, own, scripted
from pipelines.pipes import draw, pipeline
from pipelines.zoo import call, call_in, inputs

SD3, PIXART = "SD3Transformer2DModel", "PixArtTransformer2DModel"


class ReadsAllLanes(JointAttnProcessor2_0):
    """As processors that keep a figure the same in several images do."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **more: Any) -> Any:
        return super().__call__(attn, hidden_states + hidden_states.mean(0, keepdim=True), *args, **more)


def leak(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda hidden_states, **more: forward(hidden_states + hidden_states.mean(0), **more)


def leak_of_what_is_added(block: nn.Module, share: float) -> None:
    forward = block.forward

    def leaky(hidden_states: Tensor, **more: Any) -> Tensor:
        output = forward(hidden_states, **more)
        return output + share * (output - hidden_states).roll(1, 0)

    block.forward = leaky


@pytest.mark.parametrize("exchange", ["processor", "forward"])
def test_blocks_are_checked_again_after_an_exchange(exchange: str) -> None:
    module = own(SD3)
    adadiff.enable(module, RANDOM)
    for step in range(STEPS):
        call(SD3, range(B), step, module)
    if exchange == "processor":
        module.set_attn_processor(ReadsAllLanes())
    else:
        leak(module.transformer_blocks[2])
    with pytest.raises(ValueError, match=r"transformer_blocks\[\d\] of .* its rows give other results without their"):
        call(SD3, range(B), 0, module)


def test_blocks_are_checked_again_after_a_batch_of_one_picture() -> None:
    module = own(PIXART)
    leak(module.transformer_blocks[2])
    adadiff.enable(module, RANDOM)
    call(PIXART, [0] * B, 0, module)
    with pytest.raises(ValueError, match="its rows give other results without their neighbours"):
        call(PIXART, range(B), 0, module)


@pytest.mark.parametrize("lanes", [2, 3, B])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_hundredth_of_what_a_neighbour_adds_is_found_in_any_dtype(dtype: torch.dtype, lanes: int) -> None:
    module = own(PIXART).to(dtype)
    adadiff.enable(module, RANDOM)
    call_in(dtype, PIXART, range(lanes), 0, module)  # nothing is found
    adadiff.disable(module)
    leak_of_what_is_added(module.transformer_blocks[2], 0.01)
    adadiff.enable(module, RANDOM)
    with pytest.raises(ValueError, match=r"transformer_blocks\[2\] of .* its rows give other results"):
        call_in(dtype, PIXART, range(lanes), 0, module)


def test_blocks_are_checked_once_where_nothing_was_exchanged() -> None:
    module, ran = own(PIXART), list[int]()
    module.transformer_blocks[2].register_forward_pre_hook(
        lambda _, args, kwargs: ran.append(len(kwargs.get("hidden_states", args[0] if args else None))),
        with_kwargs=True,
    )
    adadiff.enable(module, "reuse:every=1")
    for _ in range(2):
        call(PIXART, range(B), 0, module)
        call(PIXART, range(B), 1, module)
    assert [rows == B for rows in ran] == [True, False, False, False, True, True, True]


def test_tied_is_refused_where_no_two_halves_come() -> None:
    pipe = pipeline("sd3")
    adadiff.enable(pipe, "cache:threshold=0.2", tied=True)
    draw(pipe, "sd3", [1, 2], steps=2)
    with pytest.raises(ValueError, match=r"this pipeline runs without guidance; use tied=False$"):
        draw(pipe, "sd3", [1, 2, 3, 4], steps=2, guided=False)
    module = own("AuraFlowTransformer2DModel")
    adadiff.enable(module, "cache:threshold=0.2", tied=True)
    call("AuraFlowTransformer2DModel", [0, 1, 0, 1], 0, module)
    with pytest.raises(ValueError, match=r"this pipeline makes several calls a step; use tied=False$"):
        call("AuraFlowTransformer2DModel", [0, 1, 0, 1], 0, module)
    module = own("FluxTransformer2DModel")
    adadiff.enable(module, "cache:threshold=0.2", tied=True)
    with module.cache_context("cond_uncond"):
        call("FluxTransformer2DModel", [0, 1, 0, 1], 0, module)
    for name in ("cond", "pred_cond"):
        message = f"this one has 4 lanes of '{name}'; use tied=False$"
        with module.cache_context(name), pytest.raises(ValueError, match=message):
            call("FluxTransformer2DModel", range(4), 0, module)


@pytest.mark.parametrize("name", ["dit", "pixart", "zimage"])
def test_tied_is_refused_where_the_halves_of_a_batch_are_not_of_the_same_samples(name: str) -> None:
    """An even batch without guidance: nothing else tells of DiT and PixArt, whose pipelines do not say."""
    pipe = pipeline(name)
    record = adadiff.enable(pipe, "cache:threshold=0.3", tied=True)
    draw(pipe, name, [1, 2], steps=3)
    assert all(step.full[:2].equal(step.full[2:]) for step in record.steps)
    calls = record.calls
    with pytest.raises(
        ValueError, match=r"tied needs both halves in one call of twice the batch, .*; use tied=False$"
    ) as told:
        draw(pipe, name, [1, 2, 3, 4], steps=3, guided=False)
    assert "other samples" in str(told.value) or name == "zimage"  # which says that there is no guidance
    assert record.calls == calls  # before anything was left out
    assert torch.isfinite(draw(pipe, name, [1, 2], steps=3)).all()


def test_a_lane_whose_control_begins_or_ends_runs_in_full() -> None:
    name = "FluxTransformer2DModel"
    module = own(name)
    record = adadiff.enable(module, scripted("none", 9, B))
    residuals = [torch.ones(B, 9, module.inner_dim) for _ in range(2)]
    strengths = [[1.0] * 5, [0.5] * 5, [0.5, 0, 0.5, 0.5, 0.5], [0.0] * 5, [0.0] * 5, [0.0, 0, 0, 1, 0]]
    for step, scale in enumerate(strengths):
        control = [one * torch.tensor(scale)[:, None, None] for one in residuals]
        call(name, range(B), step, module, controlnet_block_samples=control)
    assert [step.full.tolist() for step in record.steps] == [
        *([True] * 5, [False] * 5, [False, True, False, False, False]),
        *([True, False, True, True, True], [False] * 5, [False, False, False, True, False]),
    ]
    call(name, range(B), 7, module)
    assert record.steps[-1].full.all()


@dataclass(frozen=True)
class Mine(ReusePolicy):
    first: Any = 1
    last: Any = 0
    gate: Any = None

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return torch.ones_like(context.step, dtype=torch.bool)

    def __str__(self) -> str:
        return "mine"


@pytest.mark.parametrize("gate", ["residual", "input"])
def test_a_change_is_nan_where_nothing_can_be_reused(gate: str) -> None:
    seen: list[Tensor] = []

    class Noting(Mine):
        def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
            seen.append(change)
            return torch.ones_like(context.step, dtype=torch.bool)

    module = own(SD3)
    adadiff.enable(module, Noting(gate=gate))
    for step in range(3):
        call(SD3, range(B), step, module)
    assert [bool(change.isnan().all()) for change in seen] == [True, False, False]


def test_policies_of_ones_own_are_checked() -> None:
    module = own(SD3)
    for settings, message in (
        ({"gate": "residuals"}, "gate of 'mine' must be None or one of residual, input, estimate, got 'residuals'"),
        ({"first": 0}, "first of 'mine' must be a whole number of 1 or more, got 0"),
        ({"first": True}, "first of 'mine' must be a whole number of 1 or more, got True"),
        ({"first": 1.5}, "first of 'mine' must be a whole number of 1 or more, got 1.5"),
        ({"last": -1}, "last of 'mine' must be a whole number of 0 or more, got -1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            adadiff.enable(module, Mine(**settings))
    assert enabled(module) is None
    adadiff.enable(module, Mine(gate="input"))


def test_gradients_of_what_goes_in_are_refused() -> None:
    module = own(SD3)
    adadiff.enable(module, "reuse:every=2")
    for key in ("hidden_states", "encoder_hidden_states"):
        given = inputs(SD3, range(B))
        given[key].requires_grad_(True)
        with pytest.raises(ValueError, match=r"has gradients to track; call it under torch.no_grad\("):
            module(**given)
        with torch.no_grad():
            module(**given)


@pytest.mark.parametrize("policy", ["reuse:every=2", "cache:threshold=0.3,gate=input"])
def test_a_transformer_saved_as_a_whole_comes_back_as_it_was(policy: str) -> None:
    module = own(SD3)
    plain = [call(SD3, range(B), step, module) for step in range(STEPS)]
    adadiff.enable(module, policy)
    call(SD3, range(B), 0, module)
    back = pickle.loads(pickle.dumps(module))
    assert enabled(back) is None
    assert difference(plain, [call(SD3, range(B), step, back) for step in range(STEPS)]) == 0
    adadiff.enable(back, policy)
    adadiff.disable(back)
    assert enabled(module) is not None


def test_a_module_under_two_names_is_enabled_once() -> None:
    pipe = pipeline("wan")
    pipe.register_modules(transformer_2=pipe.transformer)
    record = adadiff.enable(pipe, "reuse:every=2")
    assert record.name == "transformer"
    assert adadiff.summary(pipe).count("policy") == 1
    adadiff.disable(pipe)
    assert not any(module._compiled_call_impl for module in pipe.transformer.modules())


def test_transformers_with_a_word_before_it_are_enabled_and_other_parts_are_not() -> None:
    class Looped:
        def __init__(self, **parts: Any):
            self.components = parts

    encoder = nn.Module()
    encoder.layers = nn.ModuleList([nn.Linear(2, 2)])  # takes no time
    pipe = Looped(unconditional_transformer=own(SD3), text_transformer=encoder.eval(), transformer=own(SD3))
    record = adadiff.enable(pipe, "reuse:every=2")
    assert record.name == "transformer"
    assert enabled(pipe.components["unconditional_transformer"]) is not None
    assert enabled(encoder) is None
    adadiff.disable(pipe)
    assert enabled(pipe.components["unconditional_transformer"]) is None
