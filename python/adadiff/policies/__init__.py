"""Who computes what, sample by sample: pure, small policies."""
