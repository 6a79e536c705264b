"""Checks shared by the Triton launchers, and whether Triton is available at all."""

import functools
import importlib
import os
import re
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

OLDEST = (3, 6)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size, to copy bits unchanged


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used on this machine, or None."""
    try:
        triton = importlib.import_module("triton")  # not its distribution, whose name varies
    except ModuleNotFoundError:
        return "Triton is not installed; pip install 'adadiff_kernels[gpu]'"
    if tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) < OLDEST:
        return f"Triton {'.'.join(map(str, OLDEST))} or newer is needed, got {triton.__version__}"
    return None


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Makes x's device current: Triton launches on the current device, not on that of its tensors."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def need(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int | str, ...],
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    rows_apart: bool = False,
) -> None:
    """Raises ValueError unless `tensor` has this shape, one of the dtypes, and the device of `like`; None passes.

    shape: a string matches any size. The tensor must be contiguous; with `rows_apart`, only each of its rows must be.
    """
    if tensor is None:
        return
    size = tensor.shape
    if size != shape and not _fits(size, shape):
        raise ValueError(f"{name} must be [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    if not (tensor.is_contiguous() or (rows_apart and rows_are_contiguous(tensor))):
        what = "have contiguous rows" if rows_apart else "be contiguous"
        raise ValueError(f"{name} must {what}, got strides {tensor.stride()}")


def _fits(size: tuple[int, ...], shape: tuple[int | str, ...]) -> bool:
    if len(size) != len(shape):
        return False
    return all(want == got or isinstance(want, str) for want, got in zip(shape, size, strict=True))


def rows_are_contiguous(tensor: Tensor) -> bool:
    """Whether tensor[i] is contiguous, for every i. Ten times faster than asking a view tensor[i]."""
    wanted = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if stride != wanted and size != 1:
            return False
        wanted *= size
    return True


# Triton's own versions of these are made for kernels; called on the host they take microseconds.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is n or more; n: 1 or more."""
    return 1 << (n - 1).bit_length()
