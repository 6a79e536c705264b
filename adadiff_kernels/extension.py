"""The C++ extension: `core` is adadiff_kernels._C, or None where it is missing and PyTorch serves instead.

The extension takes raw pointers, so it must not be called with traced tensors, which have no memory.
"""

import importlib
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def load() -> ModuleType | None:
    """Imports adadiff_kernels._C. Returns None, with one RuntimeWarning that says why, if it was not built.

    ADADIFF_NO_EXTENSION=1 in the environment disables it. An extension that was built but fails to import raises.
    """
    if os.environ.get("ADADIFF_NO_EXTENSION") == "1":
        reason = "ADADIFF_NO_EXTENSION=1 is set"
    else:
        try:
            return importlib.import_module("adadiff_kernels._C")
        except ModuleNotFoundError:
            reason = "it was not built; install a C++ compiler and run `pip install -e .` again"
    warnings.warn(
        f"adadiff_kernels runs on PyTorch alone, without its extension: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


core = load()


def traced(tensor: Tensor) -> bool:
    """Whether operations on `tensor` are being traced: by torch.compile, export, make_fx or FakeTensor."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) in (FakeTensor, FunctionalTensor)
        or (is_in_torch_dispatch_mode() and get_proxy_mode() is not None)
    )
