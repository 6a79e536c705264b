"""Checks and conversions of weights when they are written or read."""

from collections.abc import Mapping

import torch
from torch import Tensor

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPILED = "_orig_mod"  # torch.compile adds it to the names of weights


def check_dtype(key: str, value: Tensor, source: str) -> None:
    """Raises ValueError unless `value` is a dense tensor of floating-point values."""
    if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        raise ValueError(f"{key} in {source} is not a dense tensor with values, as weights must be")
    if value.dtype not in WEIGHT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise ValueError(f"{key} in {source} is {value.dtype}; weights are floating point ({names})")


def check_weights(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError for weights that are not floating point, and for NaN or infinity in them."""
    for key, value in tensors.items():
        check_dtype(key, value, source)
        if not bool(value.isfinite().all()):
            raise ValueError(f"{key} in {source} holds NaN or infinity")


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: str) -> dict[str, Tensor]:
    """The tensors in `dtype` (None: unchanged). Raises ValueError for values beyond its range."""
    made = {key: value.to(dtype) for key, value in tensors.items()}
    for key, value in made.items():
        if value.dtype != tensors[key].dtype and not bool(value.isfinite().all()):
            raise ValueError(f"{key} in {source} has values beyond the range of {dtype}; take bfloat16 or float32")
    return made


def plain_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors under their names in the uncompiled module. Raises ValueError if two would get one name, and for
    unprintable names."""
    if odd := [key for key in tensors if not key.isprintable()]:
        raise ValueError(f"{source} holds a tensor of the name {odd[0]!a}")
    made = {".".join(part for part in key.split(".") if part != COMPILED): value for key, value in tensors.items()}
    if len(made) < len(tensors):
        raise ValueError(f"{source} holds tensors compiled and not compiled under one name")
    return made


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and without shared memory: shared weights are written twice to a file."""
    made = {key: value.detach().contiguous() for key, value in tensors.items()}
    end = 0
    for key, value in sorted(made.items(), key=lambda pair: pair[1].data_ptr()):
        if value.data_ptr() < end:
            made[key] = value.clone()
        end = max(end, value.data_ptr() + value.nbytes)
    return made


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of memory of the tensors; shared and expanded memory counts once."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    return sum(storages.values())
