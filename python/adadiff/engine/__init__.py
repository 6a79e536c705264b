"""Requests that arrive at any time and share every forward pass."""
