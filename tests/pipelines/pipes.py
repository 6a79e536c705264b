"""Whole pipelines of diffusers around tiny transformers, without text encoders; images are latents."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from torch import Tensor

from pipelines.zoo import _normal, network

TRANSFORMERS = {
    "dit": "DiTTransformer2DModel",
    "pixart": "PixArtTransformer2DModel",
    "flux": "FluxTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "wan": "WanTransformer3DModel",
    "zimage": "ZImageTransformer2DModel",
}


def pipeline(name: str) -> Any:
    """With a transformer of its own."""
    transformer = copy.deepcopy(network(TRANSFORMERS[name]))
    if name == "dit":
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=6).eval().requires_grad_(False)
        made = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
    elif name == "pixart":
        scheduler = DPMSolverMultistepScheduler()
        made = PixArtAlphaPipeline(None, None, None, transformer, scheduler)
    elif name == "flux":
        scheduler = FlowMatchEulerDiscreteScheduler()
        made = FluxPipeline(scheduler, None, None, None, None, None, transformer)
    elif name == "sd3":
        scheduler = FlowMatchEulerDiscreteScheduler()
        made = StableDiffusion3Pipeline(transformer, scheduler, None, None, None, None, None, None, None)
    elif name == "wan":
        made = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer)
    else:
        made = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    made.set_progress_bar_config(disable=True)
    return made


def _texts(images: Sequence[int], *shape: int) -> Tensor:
    return torch.stack([_normal(shape, "prompt", image) for image in images])


def arguments(name: str, images: Sequence[int], guided: bool = True) -> Mapping[str, Any]:
    """Of a call that draws some images, each with a prompt and noise of its own."""
    n = len(images)
    given: dict[str, Any] = {"generator": [torch.Generator().manual_seed(image) for image in images]}
    if name == "dit":
        return {**given, "class_labels": [image % 20 for image in images], "guidance_scale": 4.0 if guided else 1.0}
    given |= {"output_type": "latent", "prompt_embeds": _texts(images, 7, 16)}
    if name == "pixart":
        masks = torch.ones(n, 7)
        return {
            **given,
            "prompt_attention_mask": masks,
            "negative_prompt": None,
            "negative_prompt_embeds": _texts([-1] * n, 7, 16),
            "negative_prompt_attention_mask": masks,
            "guidance_scale": 4.5 if guided else 1.0,
            "height": 48,
            "width": 48,
            "use_resolution_binning": False,
        }
    if name == "flux":
        given["prompt_embeds"] = _texts(images, 7, 32)
        return {**given, "pooled_prompt_embeds": _texts(images, 32), "height": 48, "width": 48, "guidance_scale": 1.0}
    if name == "sd3":
        return {
            **given,
            "pooled_prompt_embeds": _texts(images, 24),
            "negative_prompt_embeds": _texts([-1] * n, 7, 16),
            "negative_pooled_prompt_embeds": _texts([-1] * n, 24),
            "guidance_scale": 5.0 if guided else 1.0,
            "height": 48,
            "width": 32,
        }
    if name == "wan":
        return {
            **given,
            "negative_prompt_embeds": _texts([-1] * n, 7, 16),
            "guidance_scale": 5.0 if guided else 1.0,
            "height": 48,
            "width": 64,
            "num_frames": 5,
        }
    return {
        **given,
        "prompt_embeds": list(given["prompt_embeds"]),
        "negative_prompt_embeds": list(_texts([-1] * n, 7, 16)),
        "guidance_scale": 3.0 if guided else 0.0,
        "height": 64,
        "width": 48,
    }


def draw(pipe: Any, name: str, images: Sequence[int], steps: int = 6, guided: bool = True, **more: Any) -> Tensor:
    """[n, ...]"""
    given = {**arguments(name, images, guided), **more}
    if name == "dit":
        return pipe(**given, num_inference_steps=steps, output_type="pt").images
    found = pipe(**given, num_inference_steps=steps)
    found = found.frames if name == "wan" else found.images
    return torch.stack(list(found)) if isinstance(found, list) else found
