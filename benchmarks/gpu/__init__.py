"""Measurements on a CUDA device. Run from the project's root by `make gpu-verdict` and `make gpu-bench`."""

from benchmarks.gpu import lacking as lacking  # before anything imports the package, which asks for what may be missing
