"""Which implementation of an operator serves a call.

backend: "reference" is plain PyTorch on any device; "cpu" the C++ core; "triton" a Triton kernel on a CUDA device, or
in Triton's interpreter. A backend that cannot be honoured raises RuntimeError and says what is missing. None: Triton on
a CUDA device, C++ on the CPU, and PyTorch where those are missing or gradients are needed.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from adadiff_kernels import extension
from adadiff_kernels.launch import interpreted, triton_missing

Backend = Literal["reference", "cpu", "triton"]


def choose(backend: Backend | None, x: Tensor, core: bool = True, needs_grad: bool = False) -> Backend | None:
    """The backend for tensors on x's device; None: PyTorch, with C++ for the parts that the core can do.

    core: the C++ core has this operator. needs_grad: gradients have to flow through it.
    Raises RuntimeError for a backend that cannot serve, ValueError for an unknown one.
    """
    if backend is None:
        return "triton" if x.is_cuda and not needs_grad and triton_missing() is None else None
    if backend in ("cpu", "triton") and needs_grad:
        raise RuntimeError(f"backend={backend!r} has no gradients; use 'reference', or call it under torch.no_grad()")
    if backend == "triton":
        if (missing := triton_missing()) is not None:
            raise RuntimeError(f"backend='triton': {missing}")
        if not x.is_cuda and not (x.is_cpu and interpreted()):
            raise RuntimeError(f"backend='triton' needs tensors on a CUDA device, got {x.device}")
    elif backend == "cpu":
        if not core:
            raise RuntimeError("backend='cpu': the C++ core does not have this operator; use 'reference'")
        if extension.core is None:
            raise RuntimeError("backend='cpu': the extension is not built; install a C++ compiler and install again")
        if not x.is_cpu:
            raise RuntimeError(f"backend='cpu' needs tensors on the CPU, got {x.device}")
    elif backend != "reference":
        raise ValueError(f"backend must be one of {get_args(Backend)} or None, got {backend!r}")
    return backend


def is_opaque(backend: Backend | None, x: Tensor) -> bool:
    """Whether a compiler should see the call as one opaque operator: true where a kernel or the core serves it."""
    return backend in ("cpu", "triton") or (backend is None and x.is_cuda)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether gradients have to flow through a call with these arguments."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
