"""Which implementation serves each operator on a kind of device."""

import torch

from adadiff_kernels import extension
from adadiff_kernels.compaction.device_set import kernel_missing
from adadiff_kernels.launch import triton_missing

OPERATORS = ("residual_uem", "compaction", "settle_rows", "join_skip", "solver_step", "philox")
_IN_CORE = ("residual_uem", "compaction", "settle_rows")  # operators in the C++ core


def backends(device: torch.device | str) -> dict[str, str]:
    """Implementation by operator name: "C++", "CUDA", "Triton" or "PyTorch", with the reason where a kernel is missing.

    device: "cpu" or "cuda"; need not be present.
    """
    if torch.device(device).type == "cpu":
        core = "C++" if extension.core is not None else "PyTorch: the extension is not built"
        return {name: core if name in _IN_CORE else "PyTorch" for name in OPERATORS}
    found = dict.fromkeys(OPERATORS, _named("Triton", triton_missing()))
    return found | {"compaction": _named("CUDA", kernel_missing(torch.device("cuda")))}


def _named(kernel: str, missing: str | None) -> str:
    return kernel if missing is None else f"PyTorch: {missing}"
