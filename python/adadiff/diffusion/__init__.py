"""Noise schedules, solvers and noise: what diffusion is without the network."""
