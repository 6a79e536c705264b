"""Measurements: what early exit is worth on this machine, beside the fastest thing a user would run instead."""
