"""Sampling: a batch of samples, each at its own step, advanced tick by tick (continuous batching)."""
