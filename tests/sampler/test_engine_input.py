"""What a request or a call of an engine cannot be: one line that says so, and nothing has begun."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from adadiff.engine.engine import Engine
from sampler.tiny import is_empty, served, stepped

HUGE = 10**400  # no float
SHORT = {"seed": 0, "steps": 1, "policy": "exit:depth=1"}
TIMES = [0, 1, True, 0.5, math.inf, HUGE, Fraction(1, 3), np.float32(2), np.int64(3)]
OTHER_TYPES = [True, 1.0, "1", None, np.int64(1), Fraction(1), torch.tensor(1)]
NO_SECONDS = ["1", math.nan, -1, -math.inf, Decimal(1), torch.tensor(1.0), [1.0], 1j]


def short(value: object) -> str:
    return str(value)[:20]


@pytest.mark.parametrize("value", [*NO_SECONDS, 0, math.inf, HUGE, Fraction(1, HUGE)], ids=short)
@pytest.mark.parametrize("name", ["deadline", "max_wait"])
def test_no_number_of_seconds(name: str, value: object) -> None:
    engine = stepped(1)
    with pytest.raises(ValueError, match=rf"^{name} must be a positive number of seconds, got .*$"):
        stepped(1, max_wait=value) if name == "max_wait" else engine.submit(deadline=value, **SHORT)
    assert is_empty(engine)


@pytest.mark.parametrize("value", NO_SECONDS, ids=short)
@pytest.mark.parametrize("name", ["wait", "timeout"])
def test_no_time_to_wait(name: str, value: object) -> None:
    engine = stepped(1)
    with pytest.raises(ValueError, match=rf"^{name} must be a number of seconds >= 0, got .*$"):
        engine.submit(wait=value, **SHORT) if name == "wait" else engine.close(timeout=value)
    assert is_empty(engine)
    assert engine.submit(**SHORT)  # it is open


@pytest.mark.parametrize("value", TIMES, ids=short)
def test_times_to_wait(value: object) -> None:
    for threaded in (False, True):
        engine = Engine(served(), 1, queue=1, threaded=threaded)
        handle = engine.submit(wait=value, **SHORT)
        engine.close(timeout=value or math.inf)
        assert handle.result(60).isfinite().all()


@pytest.mark.parametrize("value", [-1, 101, HUGE, *OTHER_TYPES], ids=short)
def test_no_priority(value: object) -> None:
    engine = stepped(1)
    with pytest.raises(ValueError, match=r"^priority must be .*got"):
        engine.submit(priority=value, **SHORT)
    assert is_empty(engine)
