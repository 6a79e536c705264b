"""The compiled core: `core` is adadiff_kernels._C, or None where PyTorch has to serve.

It is given raw pointers, so it must not see a tensor that is only traced.
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
    """adadiff_kernels._C, or None with one warning that says why. A core that is there but broken raises.

    ADADIFF_NO_EXTENSION=1 in the environment leaves it aside.
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
    """Whether what is done with `tensor` is recorded instead of done, or done to be recorded: by torch.compile, export,
    make_fx or FakeTensor."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) in (FakeTensor, FunctionalTensor)
        or (is_in_torch_dispatch_mode() and get_proxy_mode() is not None)
    )
