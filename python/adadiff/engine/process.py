"""Closes engines at interpreter exit and in forked processes."""

import atexit
import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Engine

EXIT_SECONDS = 60.0  # the longest that interpreter exit waits for the present tick

_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()


def end_with_process(engine: "Engine") -> None:
    _engines.add(engine)


@atexit.register
def _stop() -> None:
    """Cancels all requests that have not finished."""
    for engine in list(_engines):
        try:
            if engine._thread is not None:
                engine.close(drain=False, timeout=EXIT_SECONDS)
        except TimeoutError:
            continue


def _after_fork() -> None:
    for engine in list(_engines):
        engine._end_in_child()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
