"""From seeds to images: samples in flight, each at its own step, one tick after the other."""
