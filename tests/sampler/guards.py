"""Fixtures for what could hang or take all memory."""

import signal
import tracemalloc
from collections.abc import Iterator

import pytest

GUARD = 60  # seconds; what is guarded takes milliseconds


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Ends a test that waits for ever, such as for a pipe."""

    def give_up(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(GUARD)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Fails a test that allocates more than 128 MB at once, used or not."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27
