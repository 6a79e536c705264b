"""The command `adadiff`. Importing PyTorch takes a second or two: Ctrl-C in that time ends in one line, too."""

import os
import signal
from contextlib import suppress
from typing import NoReturn


def main() -> int:
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    import warnings

    from adadiff.cli import main as run
    from adadiff.commands.terminal import show_warning

    signal.signal(signal.SIGINT, before)
    warnings.showwarning = show_warning
    return run()


def _end(*_: object) -> NoReturn:
    """Ends the process at once: an exception might be lost in an import, where PyTorch does without NumPy if that
    cannot be imported."""
    with suppress(OSError):  # stderr may be closed
        os.write(2, b"adadiff: interrupted; nothing was begun\n")
    os._exit(130)
