"""Operators as torch.compile, export and CUDA graphs see them: torch.ops.adadiff_kernels.<name>.

Eager calls bypass PyTorch's dispatcher, which would add about a third to the cost of a small call. A traced call
becomes a call of the registered operator, which runs the same implementation with the same checks when the graph runs.
Where PyTorch serves instead of a kernel, its operators stay visible to the compiler, which can fuse them.

The operators are opaque. `torch.library.triton_op` would show the kernels to the compiler, but there is nothing to fuse
into them, the compiler would rebuild them with its own options, and it could use neither the C++ core nor Triton's
interpreter, in which the tests run.
"""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("adadiff_kernels", "DEF")
# Kernels and the C++ core need contiguous memory, so a compiler must not choose another layout.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def register(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Registers an operator. fake: its shape function, which returns tensors without values and raises run's errors."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adadiff_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.adadiff_kernels, name).default
