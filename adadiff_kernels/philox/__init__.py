"""Counter-based random numbers: formula in reference.py, C++ in csrc/philox.h; the GPU version is part of
solver_step/kernel.py."""

from adadiff_kernels.philox.reference import philox4x32, philox_normal

__all__ = ["philox4x32", "philox_normal"]
