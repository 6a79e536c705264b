"""What commands print: bold and colour on a terminal alone, wrapped to its width; whole lines in a pipe."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable

import pytest

from adadiff.commands import terminal

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
ROWS = [{"": "full", "Fréchet distance": "1.23", "empty": ""}, {"": "exit:0.1", "Fréchet distance": "4", "empty": ""}]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Screen]:
    """A terminal of so many columns in the place of stdout and stderr."""

    def of(columns: int) -> Screen:
        shown = Screen()
        monkeypatch.setattr(sys, "stdout", shown)
        monkeypatch.setattr(sys, "stderr", shown)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        return shown

    return of


@pytest.mark.parametrize("columns", [40, 41, 63, 200])
def test_values_are_wrapped_to_the_terminal_and_lose_no_word(columns: int, screen) -> None:
    shown = screen(columns)
    terminal.show({"short": 1, "nested": {"name": LONG, "list": [1, 2]}, "none": None})
    text = shown.getvalue()
    assert max(map(len, text.splitlines())) <= columns
    assert text.split() == ["short", "1", "nested.name", *LONG.split(), "nested.list", "1,2", "none", "none"]


def test_a_word_longer_than_the_terminal_stays_whole(screen) -> None:
    """Such as a path, to be copied."""
    shown = screen(40)
    terminal.show({"file": "/" + "folder/" * 12 + "name"})
    assert "/" + "folder/" * 12 + "name" in shown.getvalue()


def test_in_a_pipe_every_value_is_one_line(capsys) -> None:
    terminal.show({"name": LONG * 3})
    assert capsys.readouterr().out == f"name  {LONG * 3}\n"


def test_a_table_fits_or_becomes_blocks(screen, capsys) -> None:
    terminal.print_table(ROWS)
    assert capsys.readouterr().out == "\n          Fréchet distance\nfull      1.23\nexit:0.1  4\n\n"
    wide = [{"": "full", **{f"column {i}": "123456" for i in range(9)}}]
    shown = screen(50)
    terminal.print_table(wide)
    lines = re.sub(r"\033\[\d+m", "", shown.getvalue()).splitlines()
    assert lines[1] == "full"
    assert lines[2:-1] == [f"  column {i}  123456" for i in range(9)]


@pytest.mark.parametrize(
    ("environment", "styled"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
    ids=str,
)
def test_styles_can_be_switched_off(environment: dict[str, str], styled: bool, screen, monkeypatch) -> None:
    shown = screen(80)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal.print_error("error", "no such file")
    terminal.print_table(ROWS)
    assert ("\033[" in shown.getvalue()) == styled
    assert re.sub(r"\033\[[\d;]*m", "", shown.getvalue()).startswith("adadiff: error: no such file\n")


def test_errors_in_a_pipe_are_plain(capsys) -> None:
    terminal.print_error("", "interrupted")
    assert capsys.readouterr().err == "adadiff: interrupted\n"


@pytest.mark.parametrize("watched", [True, False])
def test_bars_are_for_somebody_who_watches(watched: bool, tmp_path) -> None:
    """Of a command as it is typed, its stderr a terminal or a pipe."""
    command = [sys.executable, "-m", "adadiff", "sample", "digits", "--out", str(tmp_path), "--n", "2", "--steps", "1"]
    ours, theirs = pty.openpty() if watched else os.pipe()
    if watched:
        termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120, check=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # a terminal whose other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert (b"image/s" in shown) == watched
    assert "image/s" not in done.stdout


def test_warnings_are_one_line_of_the_command() -> None:
    """Of the command itself: elsewhere warnings are Python's."""
    code = "import sys, warnings, adadiff.cli as c; c.main = lambda: warnings.warn('left\\nout') or 0; "
    code += "import adadiff_command; sys.exit(adadiff_command.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "adadiff: warning: left out\n"


def test_ctrl_c_while_pytorch_is_imported_is_one_line() -> None:
    """Also where an import loses exceptions, as PyTorch's of NumPy does."""
    code = "import sys, builtins, signal; real = builtins.__import__\n"
    code += "def late(name, *rest):\n    if name == 'torch':\n        try: signal.raise_signal(signal.SIGINT)\n"
    code += "        except BaseException: pass\n    return real(name, *rest)\n"
    code += "import adadiff_command; builtins.__import__ = late; sys.exit(adadiff_command.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "adadiff: interrupted; nothing was begun\n")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", ">/dev/full"])
def test_closed_streams_and_full_ones(closed: str) -> None:
    command = f"{sys.executable} -m adadiff inspect digits {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if "full" in closed else 0)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_letters_that_an_encoding_lacks_are_escaped() -> None:
    command = [sys.executable, "-m", "adadiff", "inspect", "canvases"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert "Fr\\xe9chet" in done.stdout
