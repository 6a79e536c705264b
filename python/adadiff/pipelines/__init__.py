"""Pipelines of diffusers, and what they take around a network: latents and prompts. Everything here is an extra."""
