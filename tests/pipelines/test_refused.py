"""What is refused, in one line, with nothing left half done."""

import copy

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from diffusers.models.attention_processor import PAGJointAttnProcessor2_0
from torch import nn

import adadiff
from adadiff.pipelines import private
from adadiff.pipelines.enable import enabled
from adadiff.pipelines.families import FAMILIES
from pipelines.helpers import RANDOM, STEPS, B, difference, of_lane, own
from pipelines.pipes import pipeline
from pipelines.zoo import call, inputs
from sampler.test_early_exit import exits


def refused(module: nn.Module, message: str) -> None:
    """By `enable`, which leaves nothing behind."""
    before = [(m.forward, m._compiled_call_impl, dict(vars(m))) for m in module.modules()]
    with pytest.raises(ValueError, match=message) as error:
        adadiff.enable(module, "cache:threshold=0.1")
    assert "\n" not in str(error.value)
    assert [(m.forward, m._compiled_call_impl, dict(vars(m))) for m in module.modules()] == before


def test_other_caches() -> None:
    module = own("FluxTransformer2DModel")
    module.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    refused(module, "FirstBlockCacheConfig is enabled; call disable_cache")
    module._cache_config = None  # as a failed enable_cache leaves it
    refused(module, "a hook 'fbc_.*' of another cache is on its blocks")
    module = own("FluxTransformer2DModel")
    adadiff.enable(module, "cache:threshold=0.1")
    module.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="FirstBlockCacheConfig is enabled"):
        call("FluxTransformer2DModel", range(B), 0, module)


def test_perturbed_attention() -> None:
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    adadiff.enable(module, "cache:threshold=0.1")
    call(name, range(B), 0, module)
    module.transformer_blocks[2].attn.processor = PAGJointAttnProcessor2_0()
    with pytest.raises(ValueError, match="PAGJointAttnProcessor2_0 works on thirds of the batch"):
        call(name, range(B), 0, module)  # a run begins
    adadiff.disable(module)
    refused(module, "PAGJointAttnProcessor2_0 works on thirds of the batch")


def test_training() -> None:
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    refused(module.train(), "training mode; call eval")
    adadiff.enable(module.eval(), "cache:threshold=0.1")
    module.proj_out.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"call it under torch.no_grad\("):
        module(**inputs(name, range(B), 0))
    call(name, range(B), 0, module)
    module.enable_gradient_checkpointing()
    call(name, range(B), 1, module)


def test_transformers_that_cannot_be() -> None:
    class MiniMaxH3Transformer3DModel(nn.Module):
        """The table goes by names of classes."""

    refused(MiniMaxH3Transformer3DModel().eval(), "cannot skip blocks by sample: its blocks look times up")
    refused(nn.Linear(2, 2).eval(), "Linear keeps no blocks in lists; name its lists with blocks=")
    layers = nn.Module()
    layers.layers = nn.ModuleList([nn.Linear(2, 2)] * 3)
    refused(layers.eval(), "takes none of timestep, timesteps, t, so the start of a run cannot be detected")


def test_bad_input() -> None:
    flux = pipeline("flux")
    for wrong in (object(), None):
        with pytest.raises(ValueError, match=r"(object|NoneType) has no transformer"):
            adadiff.enable(wrong, "reuse:every=2")
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    refused(unet.eval(), "UNet2DConditionModel keeps no blocks in lists")
    for policy, message in {
        "exit:0.1": "is for a DiTPipeline, got FluxPipeline",
        "exit:budget=0.5": "not calibrated",
        "exit:depth=2.5": "takes a whole number of blocks",
        "exit:depth=6": "leaves nothing out: transformer has 6 blocks",
        "reuse:every=2,level=layer": "pipelines support level=block only",
        "cache:threshold=0.1,first=4,last=2": "leaves nothing out",
        "cache": "cache needs threshold",
    }.items():
        with pytest.raises(ValueError, match=message):
            adadiff.enable(flux, policy)
    with pytest.raises(ValueError, match="needs a pipeline with its scheduler"):
        adadiff.enable(flux.transformer, "reuse:every=2,dense_late=1")
    with pytest.raises(ValueError, match=r"has no list of blocks 'blocks'; it has transformer_blocks, single_tr"):
        adadiff.enable(flux, blocks=["blocks"])
    for names in ([], "blocks"):
        with pytest.raises(ValueError, match=r"keeps no blocks in lists|has no list of blocks 'blocks'"):
            adadiff.enable(flux, blocks=names)
    for settings in ({"fused": True}, {"exits": exits()}):
        with pytest.raises(ValueError, match="does not take exits or fused"):
            adadiff.enable(flux, "reuse:every=2", **settings)
    assert enabled(flux.transformer) is None
    assert not any(module._compiled_call_impl for module in flux.transformer.modules())
    adadiff.enable(flux, "reuse:every=2")
    for again in (flux, flux.transformer):
        with pytest.raises(ValueError, match="is enabled already; call disable first"):
            adadiff.enable(again, "reuse:every=3")
    adadiff.disable(flux)
    with pytest.raises(ValueError, match="FluxPipeline is not enabled"):
        adadiff.disable(flux)


def test_tied_halves_need_an_even_batch() -> None:
    module = own("SD3Transformer2DModel")
    adadiff.enable(module, "cache:threshold=0.1", tied=True)
    with pytest.raises(ValueError, match="tied needs both halves in one call of twice the batch, this one has 5 lanes"):
        call("SD3Transformer2DModel", range(B), 0, module)


def test_blocks_that_were_replaced_are_noticed() -> None:
    module = own("SD3Transformer2DModel")
    adadiff.enable(module, "cache:threshold=0.1")
    module.transformer_blocks[1] = copy.deepcopy(module.transformer_blocks[1])
    with pytest.raises(ValueError, match="has other blocks now; call disable, then enable"):
        call("SD3Transformer2DModel", range(B), 0, module)
    adadiff.disable(module)
    assert (
        difference([call("SD3Transformer2DModel", range(B), 0, module)], [call("SD3Transformer2DModel", range(B))]) == 0
    )


def test_lists_may_be_named() -> None:
    """The double blocks alone: the single ones run for everybody."""
    name, module = "FluxTransformer2DModel", own("FluxTransformer2DModel")
    record = adadiff.enable(module, RANDOM, blocks=["transformer_blocks"])
    outputs = [call(name, range(B), step, module) for step in range(STEPS)]
    assert record.num_blocks == 3
    adadiff.disable(module)
    for lane in range(B):
        adadiff.enable(module, RANDOM.column(lane), blocks=["transformer_blocks"])
        alone = [call(name, [lane], step, module) for step in range(STEPS)]
        adadiff.disable(module)
        assert difference(of_lane(outputs, lane), alone) <= 2e-6


def test_other_versions_of_diffusers_are_refused() -> None:
    private.check_version()
    for version in ("0.40.2", "0.43.0.dev0", "1.0"):
        with pytest.raises(ImportError, match=rf"needs diffusers >= 0.41 and < 0.43, found {version}"):
            private.check_version(version)


def test_nothing_is_hooked_when_one_of_two_transformers_is_refused() -> None:
    pipe = pipeline("wan")
    second = own("WanTransformer3DModel").train()
    pipe.register_modules(transformer_2=second)
    with pytest.raises(ValueError, match="transformer_2 cannot skip blocks: it is in training mode"):
        adadiff.enable(pipe, "reuse:every=2")
    assert enabled(pipe.transformer) is None
    assert not any(m._compiled_call_impl for part in (pipe.transformer, second) for m in part.modules())


def test_settings_of_families_name_classes_that_are_there() -> None:
    assert all(hasattr(diffusers, name) or name == "AdaDiffTransformer" for name in FAMILIES)


def test_group_offloading_of_several_blocks_is_refused() -> None:
    module, cpu = own("SD3Transformer2DModel"), torch.device("cpu")
    apply_group_offloading(module, cpu, cpu, "block_level", num_blocks_per_group=2)
    refused(module, "group offloading fetches blocks ahead; use use_stream=False and num_blocks_per_group=1")
