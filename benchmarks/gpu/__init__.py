"""Measurements on a CUDA device. Run from the project's root by `make gpu-check` and `make gpu-bench`."""
