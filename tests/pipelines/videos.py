"""Tiny transformers of video and audio pipelines. No dimension is 5, the batch of most tests."""

# ruff: noqa: C408
# fmt: off

import torch

from pipelines.specs import ByCount, Case, Lane, Listed, Time, ones, same, x

WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=3, cross_attn_norm=True,
)
WAN_IN = dict(hidden_states=x(4, 2, 6, 8), timestep=Time(), encoder_hidden_states=Lane((7, 16)))
HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=3,
    num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
    pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
)
HUNYUAN_IN = dict(
    hidden_states=x(4, 1, 4, 3), timestep=Time(), encoder_hidden_states=Lane((7, 16)),
    pooled_projections=Lane((8,)), encoder_attention_mask=ones(7), guidance=same(6000.0),
)
COGVIDEO = dict(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
    num_layers=3, sample_width=8, sample_height=8, patch_size=2, temporal_compression_ratio=4,
    max_text_seq_length=7,
)

VIDEOS: dict[str, Case] = {
    "AceStepTransformer1DModel": Case(
        dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, sliding_window=16,
        ),
        dict(
            hidden_states=x(8, 8), timestep=Time(unit=1), timestep_r=ByCount(lambda B: torch.full((B,), 0.1)),
            encoder_hidden_states=Lane((7, 32)), context_latents=Lane((8, 16)),
        ),
    ),
    "AllegroTransformer3DModel": Case(
        dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=3,
            cross_attention_dim=24, sample_width=8, sample_height=6, sample_frames=2, caption_channels=8,
        ),
        dict(hidden_states=x(4, 2, 6, 8), encoder_hidden_states=Lane((7, 8)), timestep=Time()),
    ),
    "AnyFlowTransformer3DModel": Case(
        {**WAN, "rope_max_seq_len": 16, "gate_value": 0.25, "deltatime_type": "r"},
        dict(
            hidden_states=x(2, 4, 6, 8), timestep=Time((2,)), r_timestep=Time((2,), 500.0),
            encoder_hidden_states=Lane((7, 16)),
        ),
    ),
    "ChronoEditTransformer3DModel": Case(
        {
            **WAN, "in_channels": 16, "out_channels": 16, "text_dim": 32, "attention_head_dim": 8,
            "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 64, "rope_temporal_skip_len": 8,
        },
        dict(hidden_states=x(16, 2, 6, 8), timestep=Time(), encoder_hidden_states=Lane((7, 32))),
    ),
    "CogVideoXTransformer3DModel": Case(
        {**COGVIDEO, "patch_size_t": None, "sample_frames": 8},
        dict(hidden_states=x(2, 4, 8, 8), encoder_hidden_states=Lane((7, 8)), timestep=Time()),
    ),
    "ConsisIDTransformer3DModel": Case(
        {
            **COGVIDEO, "sample_frames": 8, "cross_attn_interval": 1, "is_kps": False, "is_train_face": True,
            "cross_attn_dim_head": 1, "cross_attn_num_heads": 1, "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5,
            "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10,
            "LFE_ff_mult": 1, "LFE_num_scale": 1,
        },
        dict(
            hidden_states=x(2, 4, 8, 8), encoder_hidden_states=Lane((7, 8)), timestep=Time(),
            id_vit_hidden=Listed((2, 2), layers=1), id_cond=Lane((2,)),
        ),
    ),
    "CosmosTransformer3DModel": Case(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3, mlp_ratio=2,
            text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16), patch_size=(1, 2, 2),
            rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False, extra_pos_embed_type="learnable",
        ),
        dict(
            hidden_states=x(4, 1, 6, 8), timestep=Time(), encoder_hidden_states=Lane((7, 16)),
            attention_mask=ones(7), fps=30,
        ),
    ),
    "EasyAnimateTransformer3DModel": Case(
        dict(
            attention_head_dim=16, num_attention_heads=2, in_channels=4, mmdit_layers=2, num_layers=3,
            out_channels=4, patch_size=2, sample_height=6, sample_width=8, text_embed_dim=16, time_embed_dim=8,
            time_position_encoding_type="3d_rope", timestep_activation_fn="silu",
        ),
        dict(hidden_states=x(4, 2, 6, 8), timestep=Time(), encoder_hidden_states=Lane((7, 16))),
    ),
    "HeliosTransformer3DModel": Case(
        {
            **WAN, "freq_dim": 32, "qk_norm": "rms_norm_across_heads", "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True, "guidance_cross_attn": True, "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        dict(
            hidden_states=x(4, 2, 16, 16), timestep=Time(), encoder_hidden_states=Lane((7, 16)),
            indices_hidden_states=ones(2), indices_latents_history_short=ones(1),
            indices_latents_history_mid=ones(1), indices_latents_history_long=ones(4),
            latents_history_short=Lane((4, 1, 16, 16)), latents_history_mid=Lane((4, 1, 16, 16)),
            latents_history_long=Lane((4, 4, 16, 16)),
        ),
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=3,
            num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16,
            text_embed_2_dim=8, image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
        ),
        dict(
            hidden_states=x(4, 1, 4, 3), timestep=Time(), encoder_hidden_states=Lane((7, 16)),
            encoder_hidden_states_2=Lane((4, 8)), encoder_attention_mask=ones(7), encoder_attention_mask_2=ones(4),
            image_embeds=ByCount(lambda B: torch.zeros(B, 3, 12)),
        ),
    ),
    "HunyuanVideoTransformer3DModel": Case(
        {**HUNYUAN, "image_condition_type": None},
        HUNYUAN_IN,
    ),
    "HunyuanVideo, tokens replaced": Case(
        {**HUNYUAN, "image_condition_type": "token_replace"},
        {**HUNYUAN_IN, "hidden_states": x(4, 2, 4, 3)},
        kind="HunyuanVideoTransformer3DModel",
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        {
            **HUNYUAN, "patch_size": 2, "image_condition_type": None, "has_image_proj": True, "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        {
            **HUNYUAN_IN, "hidden_states": x(4, 3, 4, 4), "image_embeds": Lane((6, 16)),
            "indices_latents": ByCount(lambda B: torch.ones(3)), "latents_clean": Lane((4, 2, 4, 4)),
            "indices_latents_clean": ByCount(lambda B: torch.ones(2)), "latents_history_2x": Lane((4, 2, 4, 4)),
            "indices_latents_history_2x": ByCount(lambda B: torch.ones(2)),
            "latents_history_4x": Lane((4, 8, 4, 4)),
            "indices_latents_history_4x": ByCount(lambda B: torch.ones(8)),
        },
    ),
    "Kandinsky5Transformer3DModel": Case(
        dict(
            in_visual_dim=4, in_text_dim=16, in_text_dim2=12, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
            model_dim=24, ff_dim=32, num_text_blocks=1, num_visual_blocks=4, axes_dims=(4, 4, 4), visual_cond=False,
        ),
        dict(
            hidden_states=x(1, 6, 8, 4), encoder_hidden_states=Lane((7, 16)), timestep=Time(),
            pooled_projections=Lane((12,)),
            visual_rope_pos=ByCount(lambda B: [torch.arange(1), torch.arange(3), torch.arange(4)]),
            text_rope_pos=ByCount(lambda B: torch.arange(7)),
        ),
    ),
    "LTXVideoTransformer3DModel": Case(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=3, qk_norm="rms_norm_across_heads", caption_channels=16,
        ),
        dict(
            hidden_states=x(24, 4), encoder_hidden_states=Lane((7, 16)), timestep=Time(),
            encoder_attention_mask=ones(7, dtype=torch.bool), num_frames=2, height=4, width=3,
        ),
    ),
    "LTX2VideoTransformer3DModel": Case(
        dict(
            in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2,
            attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
            audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=3,
            caption_channels=16, qk_norm="rms_norm_across_heads", rope_double_precision=False,
        ),
        dict(
            hidden_states=x(24, 4), audio_hidden_states=x(9, 4), encoder_hidden_states=Lane((7, 16)),
            audio_encoder_hidden_states=Lane((7, 16)), timestep=Time(),
            encoder_attention_mask=ones(7, dtype=torch.bool), num_frames=2, height=4, width=3, audio_num_frames=9,
            fps=25.0,
        ),
    ),
    "LatteTransformer3DModel": Case(
        dict(
            sample_size=6, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=2,
            caption_channels=8, in_channels=4, cross_attention_dim=16, out_channels=8, num_embeds_ada_norm=1000,
            attention_bias=True, activation_fn="gelu-approximate", norm_type="ada_norm_single",
            norm_elementwise_affine=False, video_length=3,
        ),
        dict(hidden_states=x(4, 3, 6, 6), encoder_hidden_states=Lane((7, 8)), timestep=Time()),
    ),
    "LongCatAudioDiTTransformer": Case(
        dict(dit_dim=32, dit_depth=3, dit_heads=2, dit_text_dim=16, latent_dim=8, text_conv=False),
        dict(
            hidden_states=x(12, 8), encoder_hidden_states=Lane((7, 16)), timestep=Time(unit=1),
            encoder_attention_mask=ones(7, dtype=torch.bool), attention_mask=ones(12, dtype=torch.bool),
        ),
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        dict(
            in_channels=8, condition_dim=16, num_layers=3, num_attention_heads=2, attention_head_dim=8,
            ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=8,
        ),
        dict(hidden_states=x(8, 12), encoder_hidden_states=Lane((12, 16)), timestep=Time(unit=1)),
    ),
    "MochiTransformer3DModel": Case(
        dict(
            patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=3, pooled_projection_dim=16,
            in_channels=4, qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4, max_sequence_length=7,
        ),
        dict(
            hidden_states=x(4, 2, 6, 8), encoder_hidden_states=Lane((7, 16)), timestep=Time(),
            encoder_attention_mask=ones(7, dtype=torch.bool),
        ),
    ),
    "MotifVideoTransformer3DModel": Case(
        dict(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
            num_single_layers=3, num_decoder_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1,
            text_embed_dim=16, image_embed_dim=4, rope_axes_dim=(4, 4, 4),
        ),
        dict(hidden_states=x(9, 2, 3, 4), encoder_hidden_states=Lane((7, 16)), timestep=Time()),
    ),
    "SanaVideoTransformer3DModel": Case(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
            sample_size=8, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
        dict(hidden_states=x(4, 2, 6, 8), encoder_hidden_states=Lane((7, 16)), timestep=Time()),
    ),
    "SkyReelsV2Transformer3DModel": Case(
        {**WAN, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32},
        WAN_IN,
    ),
    "WanTransformer3DModel": Case(
        {**WAN, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32},
        WAN_IN,
    ),
    "WanAnimateTransformer3DModel": Case(
        {
            **WAN, "num_layers": 4, "in_channels": 12, "latent_channels": 4, "qk_norm": "rms_norm_across_heads",
            "image_dim": 16, "rope_max_seq_len": 32, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        },
        {
            **WAN_IN, "hidden_states": x(12, 4, 6, 8), "encoder_hidden_states_image": Lane((6, 16)),
            "pose_hidden_states": Lane((4, 3, 6, 8)), "face_pixel_values": Lane((3, 9, 16, 16)),
        },
        slow=True,
    ),
    "WanVACETransformer3DModel": Case(
        {
            **WAN, "num_layers": 4, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
            "vace_layers": [0, 2], "vace_in_channels": 12,
        },
        {**WAN_IN, "control_hidden_states": Lane((12, 2, 6, 8))},
    ),
    "StableAudioDiTModel": Case(
        dict(
            sample_size=12, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
            global_states_input_dim=12, cross_attention_input_dim=16,
        ),
        dict(
            hidden_states=x(4, 12), timestep=Time(unit=1), encoder_hidden_states=Lane((7, 16)),
            global_hidden_states=Lane((1, 12)),
            rotary_embedding=ByCount(lambda B: (torch.full((13, 4), 0.8), torch.full((13, 4), 0.6))),
        ),
    ),
}
