"""What callers of an engine may give."""

import math
from numbers import Real


def seconds(name: str, value: float, least: float | None = None) -> float:
    """A finite number above 0; where `least` is given, any of at least that. Raises ValueError."""
    try:
        given = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        given = math.inf
    if least is not None and not given >= least:
        raise ValueError(f"{name} must be a number of seconds >= {least:g}, got {value!r}")
    if least is None and not 0 < given < math.inf:
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
    return given
