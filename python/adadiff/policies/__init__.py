"""Who computes what, sample by sample: small policies without side effects."""
