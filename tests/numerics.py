"""How far a result may lie from the exact one: a rule, instead of a tolerance for each test."""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """The error of `actual` is at most twice that of `same_dtype`, and four roundings of the largest value.

    same_dtype: what plain PyTorch makes of the same inputs in the dtype of `actual`. exact: float64.
    """
    assert actual.dtype == same_dtype.dtype
    assert actual.shape == same_dtype.shape == exact.shape
    assert exact.dtype == torch.float64
    if not actual.numel():
        return
    error, allowed = ((value.double() - exact).abs().max() for value in (actual, same_dtype))
    allowed = 2 * allowed + 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"  # NaN fails too
