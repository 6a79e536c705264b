"""What others may have set for the whole process, for the length of a `with`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

Value = TypeVar("Value")


@contextmanager
def changed(read: Callable[[], Value], change: Callable[[Value], object], value: Value) -> Iterator[None]:
    before = read()
    change(value)
    try:
        yield
    finally:
        change(before)


default_dtype = partial(changed, torch.get_default_dtype, torch.set_default_dtype)
deterministic = partial(changed, torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    """Afterwards there is none: the device that `torch.get_default_device` tells, set, would be one."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
