"""Pipelines of diffusers: ours, and adaptive compute in those that exist (`enable`); what they take around a network,
latents and prompts. Everything here is an extra."""
