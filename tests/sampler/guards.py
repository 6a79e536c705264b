"""Fixtures for what could hang or take all memory."""

import gc
import resource
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def memory_below(most: int) -> Iterator[None]:
    """Fails where the process takes `most` bytes more than before, at any moment. Nobody gets four times as many: what
    asks for them ends in a MemoryError, instead of ending the machine."""
    gc.collect()  # else what earlier tests left may be freed meanwhile, and hide what is taken
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, begins anew
    before = _status("VmHWM")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4 * most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    taken = _status("VmHWM") - before
    assert taken < most, f"took {taken:,} bytes"


def _status(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
