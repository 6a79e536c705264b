"""Adapters: image prompts, and low-rank ones that are loaded, scaled and merged after `enable`."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

import adadiff
from pipelines.helpers import RANDOM, STEPS, B, check_rows, difference, own, scripted
from pipelines.zoo import call

FLUX, TOKENS, WIDTH = "FluxTransformer2DModel", 3, 8


class Projection(nn.Module):
    """In place of an adapter's own: of each adapter's images [B, 1, tokens, width] the tokens."""

    def forward(self, image_embeds: list[Tensor]) -> list[Tensor]:
        return [one.flatten(1, 2) for one in image_embeds]


def with_image_prompts(adapters: int) -> nn.Module:
    module = own(FLUX)
    torch.manual_seed(0)
    for block in module.transformer_blocks:
        processor = FluxIPAdapterAttnProcessor(
            module.inner_dim, WIDTH, num_tokens=(TOKENS,) * adapters, scale=[1.0] * adapters
        )
        for value in processor.parameters():
            nn.init.normal_(value, std=0.3)
        block.attn.set_processor(processor)
    module.encoder_hid_proj = Projection()
    return module.eval().requires_grad_(False)


def prompts(lanes: Any, adapters: int) -> list[Tensor]:
    return [
        torch.stack(
            [torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(31 * lane + i)) for lane in lanes]
        )
        for i in range(adapters)
    ]


@pytest.mark.parametrize("adapters", [1, 2])
def test_image_prompts_go_with_their_samples(adapters: int) -> None:
    module = with_image_prompts(adapters)
    plain = call(FLUX, range(B), 0, own(FLUX))

    def more(lanes: list[int], step: int) -> dict[str, Any]:
        return {"joint_attention_kwargs": {"ip_adapter_image_embeds": prompts(lanes, adapters)}}

    assert difference([call(FLUX, range(B), 0, module, **more(list(range(B)), 0))], [plain]) > 0.01
    check_rows(FLUX, module, more)


def test_a_lane_whose_image_prompt_changes_runs_in_full() -> None:
    """With as many adapters as lanes, so that nobody takes one for the other."""
    module, lanes = with_image_prompts(2), range(2)
    record = adadiff.enable(module, scripted("none", 4, 2))
    given = prompts(lanes, 2)
    for step in range(4):
        if step == 2:
            given = [given[0].clone(), given[1]]
            given[0][1] += 1.0
        call(FLUX, lanes, step, module, joint_attention_kwargs={"ip_adapter_image_embeds": given})
    assert [step.full.tolist() for step in record.steps] == [[True, True], [False] * 2, [False, True], [False] * 2]


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="low-rank adapters take peft")
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_low_rank_adapters_that_come_later(name: str) -> None:
    from peft import LoraConfig

    def steps(module: nn.Module) -> list[list[Tensor]]:
        return [call(name, range(B), step, module) for step in range(STEPS)]

    module = own(name)
    adadiff.enable(module, RANDOM)
    before = steps(module)
    torch.manual_seed(0)
    module.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v", "net.2"]), "one")
    after = steps(module)
    assert difference(before, after) > 0.1
    twin = copy.deepcopy(module)  # which is not enabled
    adadiff.enable(twin, RANDOM)
    assert difference(steps(twin), after) == 0
    module.disable_adapters()
    assert difference(steps(module), before) == 0
    module.enable_adapters()
    module.fuse_lora()
    assert difference(steps(module), after) < 1e-5
    module.unfuse_lora()
    adadiff.disable(module)
    check_rows(name, module, lambda lanes, step: {_kwargs(name): {"scale": 0.5}})
    module.delete_adapters("one")
    adadiff.enable(module, RANDOM)
    assert difference(steps(module), before) < 1e-5


def _kwargs(name: str) -> str:
    return "attention_kwargs" if "Wan" in name else "joint_attention_kwargs"


class Low(nn.Module):
    """In place of a layer of peft, with the attributes by which those are known."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self.active_adapters, self.disable_adapters, self.merged_adapters = ["one"], False, []
        self.scaling = {"one": 1.0, "two": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.disable_adapters:
            return y
        return y + self.scaling[self.active_adapters[0]] * self.more(x)


def adapted() -> tuple[nn.Module, list[Low]]:
    module, layers = own(FLUX), []
    torch.manual_seed(0)
    for block in module.transformer_blocks:
        layers.append(Low(block.attn.to_q).eval().requires_grad_(False))
        block.attn.to_q = layers[-1]
    module.peft_config = {"one": None}
    return module, layers


def switched_off(layers: list[Low]) -> None:
    for layer in layers:
        layer.disable_adapters = True


def scaled(layers: list[Low]) -> None:
    layers[-1].scaling["one"] = 0.5


def another(layers: list[Low]) -> None:
    for layer in layers:
        layer.active_adapters = ["two"]


@pytest.mark.parametrize("change", [switched_off, scaled, another, None])
def test_lanes_run_in_full_where_adapters_change_within_a_run(change: Any) -> None:
    """What they have kept was made with the adapters of before."""
    module, layers = adapted()
    record = adadiff.enable(module, scripted("none", 5, B))
    for step in range(5):
        if step == 2 and change is not None:
            change(layers)
        call(FLUX, range(B), step, module)
    full = [bool(step.full.all()) for step in record.steps]
    assert full == [True, False, change is not None, False, False]
    assert [bool(step.full.any()) for step in record.steps] == full


def test_a_scale_of_one_call_counts_as_well() -> None:
    module, _ = adapted()
    record = adadiff.enable(module, scripted("none", 4, B))
    for step, scale in enumerate((1.0, 1.0, 0.5, 0.5)):
        call(FLUX, range(B), step, module, joint_attention_kwargs={"scale": scale})
    assert [bool(step.full.all()) for step in record.steps] == [True, False, True, False]
