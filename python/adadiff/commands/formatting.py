"""Layout of help pages."""

import argparse
import textwrap
from typing import Any

COMMAND_COLUMNS = 19  # longest command name with its indent; argparse leaves command names out of its own count


class HelpFormatter(argparse.HelpFormatter):
    """Wraps prose to the terminal and keeps lines that are indented, such as examples, as they are. Words with a
    hyphen, such as options, are not broken."""

    def __init__(self, prog: str, **settings: Any):
        super().__init__(prog, **settings)
        self._action_max_length = COMMAND_COLUMNS

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            indent + line
            if line.startswith(" ")
            else textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
            for line in text.splitlines()
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)
