"""Tiny transformers of image pipelines. No dimension is 5, the batch of most tests."""

# ruff: noqa: C408
# fmt: off

from dataclasses import replace

import torch
from torch import Tensor

from pipelines.specs import ByCount, ByLane, Case, Lane, Listed, Table, Time, ones, same, x

FLUX = dict(
    patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
)
FLUX_IN = dict(
    hidden_states=x(9, 4), encoder_hidden_states=Lane((7, 32)), timestep=Time(unit=1), img_ids=Table((9, 3)),
    txt_ids=Table((7, 3)),
)
QWEN = dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
)
QWEN_IN = dict(
    hidden_states=x(12, 16), encoder_hidden_states=Lane((7, 16)),
    encoder_hidden_states_mask=ones(7, dtype=torch.int64), timestep=Time(unit=1),
    img_shapes=ByCount(lambda B: [(1, 4, 3)] * B),
)
IMAGE = dict(hidden_states=x(4, 8, 6), encoder_hidden_states=Lane((7, 16)), timestep=Time())
SIZES = dict(original_size=same(64.0, 48.0), target_size=same(64.0, 48.0), crop_coords=same(0.0, 0.0))


def _ideogram(B: int, part: str) -> Tensor:
    text, image = 3, 4
    if part == "segment":
        return torch.ones(B, text + image, dtype=torch.int64)
    from diffusers.models.transformers import transformer_ideogram4 as own

    if part == "indicator":
        kinds = [own.LLM_TOKEN_INDICATOR] * text + [own.OUTPUT_IMAGE_INDICATOR] * image
        return torch.tensor([kinds] * B)
    spots = [(i, i, i) for i in range(text)] + [
        tuple(own.IMAGE_POSITION_OFFSET + one for one in (0, i // 2, i % 2)) for i in range(image)
    ]
    return torch.tensor([spots] * B)


IMAGES: dict[str, Case] = {
    "DiTTransformer2DModel": Case(
        dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=4,
            sample_size=6, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
            activation_fn="gelu-approximate",
        ),
        dict(hidden_states=x(4, 6, 6), timestep=Time(), class_labels=ByLane(lambda lane: 3 * lane)),
    ),
    "PixArtTransformer2DModel": Case(
        dict(
            sample_size=6, num_layers=4, patch_size=2, attention_head_dim=6, num_attention_heads=2, in_channels=4,
            cross_attention_dim=12, out_channels=8, caption_channels=16, use_additional_conditions=False,
        ),
        dict(
            hidden_states=x(4, 6, 6), timestep=Time(), encoder_hidden_states=Lane((7, 16)),
            encoder_attention_mask=ones(7), added_cond_kwargs={"aspect_ratio": None, "resolution": None},
        ),
    ),
    "FluxTransformer2DModel": Case(
        {**FLUX, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]},
        {**FLUX_IN, "pooled_projections": Lane((32,))},
    ),
    "Flux2Transformer2DModel": Case(
        {**FLUX, "joint_attention_dim": 32, "timestep_guidance_channels": 32, "axes_dims_rope": [4, 4, 4, 4]},
        {**FLUX_IN, "img_ids": ones(9, 4), "txt_ids": ones(7, 4), "guidance": same(1.0)},
    ),
    "SD3Transformer2DModel": Case(
        dict(
            sample_size=6, patch_size=1, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=24, out_channels=4,
            pos_embed_max_size=12,
        ),
        dict(
            hidden_states=x(4, 6, 4), encoder_hidden_states=Lane((7, 16)), pooled_projections=Lane((24,)),
            timestep=Time(),
        ),
    ),
    "SD3.5": Case(
        dict(
            sample_size=6, patch_size=1, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=24, out_channels=4,
            pos_embed_max_size=12, dual_attention_layers=(0, 1), qk_norm="rms_norm",
        ),
        dict(
            hidden_states=x(4, 6, 4), encoder_hidden_states=Lane((7, 16)), pooled_projections=Lane((24,)),
            timestep=Time(),
        ),
        kind="SD3Transformer2DModel",
    ),
    "AuraFlowTransformer2DModel": Case(
        dict(
            sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=3,
            attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
            out_channels=4, pos_embed_max_size=64,
        ),
        {**IMAGE, "timestep": Time(unit=1)},
    ),
    "BriaTransformer2DModel": Case(
        {**FLUX, "joint_attention_dim": 32, "pooled_projection_dim": None, "axes_dims_rope": [4, 4, 8]},
        {**FLUX_IN, "timestep": Time()},
    ),
    "BriaFiboTransformer2DModel": Case(
        {
            **FLUX, "in_channels": 12, "joint_attention_dim": 64, "text_encoder_dim": 32,
            "pooled_projection_dim": None, "axes_dims_rope": [4, 4, 8],
        },
        {
            **FLUX_IN, "hidden_states": x(9, 12), "encoder_hidden_states": Lane((7, 64)), "timestep": Time(),
            "text_encoder_layers": Listed((7, 32), layers=6),
        },
    ),
    "ChromaTransformer2DModel": Case(
        {
            **FLUX, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8], "approximator_num_channels": 8,
            "approximator_hidden_dim": 16, "approximator_layers": 1,
        },
        FLUX_IN,
    ),
    "CogView3PlusTransformer2DModel": Case(
        dict(
            patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=16, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
        ),
        {**IMAGE, **SIZES},
    ),
    "CogView4Transformer2DModel": Case(
        dict(
            patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=16, time_embed_dim=8, condition_dim=4, sample_size=8,
        ),
        {**IMAGE, **SIZES},
    ),
    "ErnieImageTransformer2DModel": Case(
        dict(
            hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=24, in_channels=12,
            out_channels=12, patch_size=1, text_in_dim=16, rope_theta=256, rope_axes_dim=(8, 4, 4),
            qk_layernorm=True,
        ),
        dict(
            hidden_states=x(12, 4, 3), timestep=Time(unit=1), text_bth=Lane((7, 16)),
            text_lens=ByCount(lambda B: torch.tensor([7] * B)),
        ),
    ),
    "GlmImageTransformer2DModel": Case(
        dict(
            patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=16, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=64,
        ),
        dict(
            hidden_states=x(4, 8, 6), encoder_hidden_states=Lane((7, 16)), timestep=Time(),
            prior_token_id=ByLane(lambda lane: (torch.arange(12) + 12 * lane) % 64),
            prior_token_drop=ByCount(lambda B: torch.zeros(B, 12, dtype=torch.bool)), target_size=same(8.0, 6.0),
            crop_coords=same(0.0, 0.0),
        ),
    ),
    "HiDreamImageTransformer2DModel": Case(
        dict(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=8,
            num_attention_heads=2, caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=2,
            num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32),
            llama_layers=(0, 1, 0, 1, 0), force_inference_output=True,
        ),
        dict(
            hidden_states=x(4, 8, 6), encoder_hidden_states_t5=Lane((7, 8)),
            encoder_hidden_states_llama3=Lane((7, 4)), pooled_embeds=Lane((8,)), timesteps=Time(),
        ),
        extra={"stack": ("encoder_hidden_states_llama3", 2)},
    ),
    "HunyuanImageTransformer2DModel": Case(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_single_layers=3, num_refiner_layers=1, mlp_ratio=2.0, patch_size=(1, 1), text_embed_dim=16,
            text_embed_2_dim=None, rope_axes_dim=(4, 4), guidance_embeds=False,
        ),
        dict(
            hidden_states=x(4, 4, 3), timestep=Time(), encoder_hidden_states=Lane((7, 16)),
            encoder_attention_mask=ones(7),
        ),
    ),
    "Ideogram4Transformer2DModel": Case(
        dict(
            in_channels=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, intermediate_size=32,
            adaln_dim=16, llm_features_dim=12, rope_theta=10000, mrope_section=(2, 1, 1),
        ),
        dict(
            hidden_states=x(7, 8), encoder_hidden_states=Lane((7, 12)), timestep=Time(unit=1),
            position_ids=ByCount(lambda B: _ideogram(B, "position")),
            segment_ids=ByCount(lambda B: _ideogram(B, "segment")),
            indicator=ByCount(lambda B: _ideogram(B, "indicator")),
        ),
    ),
    "JoyImageEditTransformer3DModel": Case(
        dict(
            patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=3,
            rope_dim_list=[4, 6, 6], theta=256,
        ),
        dict(hidden_states=x(16, 1, 4, 6), encoder_hidden_states=Lane((7, 16)), timestep=Time()),
    ),
    "Krea2Transformer2DModel": Case(
        dict(
            in_channels=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=12, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
        ),
        dict(
            hidden_states=x(6, 8), encoder_hidden_states=Lane((7, 2, 12)), timestep=Time(unit=1),
            position_ids=Table((13, 3)), encoder_attention_mask=ones(7, dtype=torch.bool),
        ),
    ),
    "LongCatImageTransformer2DModel": Case(
        {**FLUX, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]},
        {**FLUX_IN, "guidance": same(3.5)},
    ),
    "Lumina2Transformer2DModel": Case(
        dict(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=3, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, axes_dim_rope=(4, 2, 2),
            axes_lens=(64, 64, 64), cap_feat_dim=16,
        ),
        {**IMAGE, "timestep": Time(unit=1), "encoder_attention_mask": ones(7, dtype=torch.bool)},
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        {**QWEN, "moe_enabled": False, "capacity_factors": [8.0, 8.0, 8.0]},
        QWEN_IN,
    ),
    "OvisImageTransformer2DModel": Case(
        {**FLUX, "out_channels": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)},
        FLUX_IN,
    ),
    "PRXTransformer2DModel": Case(
        dict(
            in_channels=4, patch_size=2, context_in_dim=16, hidden_size=24, mlp_ratio=2.0, num_heads=2, depth=4,
            axes_dim=[6, 6], theta=10000,
        ),
        {**IMAGE, "timestep": Time(unit=1)},
    ),
    "QwenImageTransformer2DModel": Case(
        {**QWEN, "guidance_embeds": False},
        QWEN_IN,
    ),
    "QwenImage, edit": Case(
        {**QWEN, "guidance_embeds": False, "zero_cond_t": True},
        {**QWEN_IN, "img_shapes": ByCount(lambda B: [[(1, 4, 2), (1, 2, 2)]] * B)},
        kind="QwenImageTransformer2DModel",
    ),
    "SanaTransformer2DModel": Case(
        dict(
            patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
            sample_size=8,
        ),
        IMAGE,
    ),
    "ZImageTransformer2DModel": Case(
        dict(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=4, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        dict(x=Listed((4, 1, 8, 6), moves=True), cap_feats=Listed((7, 16)), t=Time(unit=1)),
    ),
    "OmniGenTransformer2DModel": Case(
        dict(
            hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_layers=4,
            pad_token_id=0, vocab_size=50, in_channels=4, time_step_dim=4,
            rope_scaling={"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
        ),
        dict(
            hidden_states=x(4, 8, 6), timestep=Time(unit=1),
            input_ids=ByLane(lambda lane: (torch.arange(7) + 7 * lane) % 50),
            input_img_latents=ByCount(lambda B: []), input_image_sizes={}, attention_mask=ones(20, 20),
            position_ids=ByCount(lambda B: torch.arange(20).expand(B, 20)),
        ),
    ),
    "HunyuanDiT2DModel": Case(
        dict(
            sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
            cross_attention_dim=8, cross_attention_dim_t5=16, pooled_projection_dim=4, hidden_size=16, text_len=4,
            text_len_t5=3, activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=False,
        ),
        dict(
            hidden_states=x(4, 8, 8), encoder_hidden_states=Lane((4, 8)), text_embedding_mask=ones(4),
            encoder_hidden_states_t5=Lane((3, 16)), text_embedding_mask_t5=ones(3), timestep=Time(),
            image_rotary_emb=ByCount(lambda B: [torch.full((16, 8), 0.8), torch.full((16, 8), 0.6)]),
        ),
    ),
    "LuminaNextDiT2DModel": Case(
        dict(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=3, num_attention_heads=3,
            num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None, learn_sigma=False, qk_norm=True,
            cross_attention_dim=16, scaling_factor=1.0,
        ),
        dict(
            hidden_states=x(4, 8, 6), encoder_hidden_states=Lane((7, 16)), timestep=Time(unit=1),
            encoder_mask=ones(7), image_rotary_emb=ByCount(lambda B: torch.ones(384, 384, 4, dtype=torch.complex64)),
            cross_attention_kwargs={},
        ),
    ),
}

# whose later blocks join the outputs of earlier ones, which have the shape of the hidden states
DEEP = IMAGES["HunyuanDiT2DModel"]
IMAGES["HunyuanDiT, long skips"] = replace(DEEP, config={**DEEP.config, "num_layers": 8}, kind="HunyuanDiT2DModel")
