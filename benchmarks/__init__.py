"""Measurements of early exit on this machine, compared with the fastest alternatives that a user has."""
