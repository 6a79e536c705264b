"""Conversion of other projects' checkpoints."""
