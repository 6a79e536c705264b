"""Checkpoints of others become ours."""
