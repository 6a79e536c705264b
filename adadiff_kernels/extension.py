"""The compiled core: `core` is adadiff_kernels._C, or None where PyTorch has to serve."""

import importlib
import os
import warnings
from types import ModuleType


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
