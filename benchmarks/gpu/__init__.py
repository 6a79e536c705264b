"""Measurements on a CUDA device. Run from the project's root by `make gpu-verdict` and `make gpu-bench`."""

from benchmarks.gpu import lacking as lacking  # first: the package imports what may be missing
