"""The command line.

Exit codes: 0: success; 2: unusable input, with a line that says why; 130: Ctrl-C, with a line about results on disk;
141: the reader of the output has closed it, as `| head` does.
"""

import argparse
import difflib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__
from .commands import info
from .commands.formatting import HelpFormatter
from .commands.model_options import add_calibrate, add_calibrate_reuse, add_convert, add_data, add_inspect
from .commands.options import add_command
from .commands.pages import START, SUMMARY
from .commands.reproduce_options import add_reproduce
from .commands.sample_options import add_diff, add_evaluate, add_sample
from .commands.serve_options import add_serve
from .commands.terminal import print_error
from .commands.training_options import add_distill, add_search, add_train, add_train_steps
from .reading import reason
from .sampling.faults import is_memory_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, by default from sys.argv. Returns the exit code (argparse may raise SystemExit)."""
    _usable_streams()
    commands, arguments = parser(), sys.argv[1:] if arguments is None else arguments
    if not arguments:
        commands.print_help()
        return _refused("name one of these commands")
    options = commands.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print_error("", f"interrupted; {str(interrupt) or 'no results are on disk'}")
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        return _refused(reason(error))
    except (MemoryError, RuntimeError) as error:  # PyTorch's allocators raise both
        if not is_memory_error(error):
            raise
        return _refused("not enough memory; a smaller --batch or --n takes less")
    return 0


def _run_line(line: Sequence[str]) -> None:
    options = parser().parse_args(line)
    options.run(options)


def _refused(reason: str) -> int:
    print_error("error", reason)
    try:
        sys.stdout.flush()
    except OSError:  # the output cannot be written
        _drop_output()
    return 2


def _drop_output() -> None:
    """Redirects stdout to the null device, so that flushing its buffer at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usable_streams() -> None:
    """Redirects closed streams (as after `>&-`) to the null device, and escapes characters that the encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """The parser of the program and of its commands. Prints the user's text without escape sequences."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        for option in unknown:
            near = difflib.get_close_matches(option.partition("=")[0], self._option_string_actions, 1)
            if near and option.startswith("--"):
                self.error(f"unrecognized arguments: {option}; did you mean {near[0]}?")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print_error("error", message)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, listed in the order in which a newcomer needs them."""
    top = _Parser(
        prog="adadiff",
        usage="%(prog)s COMMAND [options]",
        description=SUMMARY,
        epilog=START,
        formatter_class=HelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"adadiff {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True, prog="adadiff")
    add_command(commands, "info", info.info)
    for add in (add_sample, add_serve, add_inspect, add_evaluate, add_diff, add_calibrate, add_calibrate_reuse):
        add(commands)
    for add in (add_search, add_train_steps, add_train, add_distill, add_convert, add_data):
        add(commands)
    add_reproduce(commands, _run_line)
    return top
