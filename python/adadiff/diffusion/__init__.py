"""Noise schedules, solvers and noise: diffusion without the network."""
