"""From seeds to images: samples in flight, each at its own step, one evaluation after the other."""
