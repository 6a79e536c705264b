"""The command `adadiff`. Importing PyTorch takes a second or two: Ctrl-C in that time ends in one line, too."""

import sys


def main() -> int:
    try:
        import warnings

        from adadiff.cli import main as run
        from adadiff.commands.terminal import show_warning
    except KeyboardInterrupt:
        print("adadiff: interrupted; nothing was begun", file=sys.stderr)
        return 130
    warnings.showwarning = show_warning
    return run()
