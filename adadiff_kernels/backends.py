"""What serves each operator, for people who want to know."""

import torch

from adadiff_kernels import extension
from adadiff_kernels.compaction.device_set import kernel_missing
from adadiff_kernels.launch import triton_missing

OPERATORS = ("residual_uem", "compaction", "settle_rows", "join_skip", "solver_step", "philox")
_IN_CORE = ("residual_uem", "compaction", "settle_rows")  # operators that the C++ core has


def backends(device: torch.device | str) -> dict[str, str]:
    """By operator: "C++", "CUDA", "Triton", or "PyTorch" and why, for tensors on a device of this kind ("cpu" or
    "cuda"). Needs no such device."""
    if torch.device(device).type == "cpu":
        core = "C++" if extension.core is not None else "PyTorch: the extension is not built"
        return {name: core if name in _IN_CORE else "PyTorch" for name in OPERATORS}
    found = dict.fromkeys(OPERATORS, _named("Triton", triton_missing()))
    return found | {"compaction": _named("CUDA", kernel_missing(torch.device("cuda")))}


def _named(kernel: str, missing: str | None) -> str:
    return kernel if missing is None else f"PyTorch: {missing}"
