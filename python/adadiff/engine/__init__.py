"""The engine: requests arrive at any time and share forward passes (continuous batching)."""
