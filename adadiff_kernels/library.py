"""Operators as torch.compile, export and CUDA graphs see them: torch.ops.adadiff_kernels.<name>.

An eager call goes straight to its implementation; the dispatcher would add about a third of what a small call costs. A
call that is traced becomes one of the registered operator, which runs the same implementation, with the same checks,
when the graph runs. Where PyTorch serves instead of a kernel, its operators are left for the compiler to fuse.

The operators are opaque. `torch.library.triton_op` would show the kernels to the compiler, but there is nothing for it
to fuse, it would compile them again with options of its own, and it could use neither the C++ core nor Triton's
interpreter, which the tests run them in.
"""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("adadiff_kernels", "DEF")
# Kernels and core need contiguous memory, so a compiler must not choose another layout.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def register(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Registers an operator. fake: what `run` returns for tensors without values, and the errors it raises."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adadiff_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.adadiff_kernels, name).default
