"""Checks of the arguments of an engine."""

import math
from numbers import Real


def seconds(name: str, value: float, least: float | None = None) -> float:
    """`value` as a float. Raises ValueError unless it is finite and above 0 or, with `least`, at least that (infinity
    included)."""
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    if least is not None and not number >= least:
        raise ValueError(f"{name} must be a number of seconds >= {least:g}, got {value!r}")
    if least is None and not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
    return number
