"""Reading of untrusted files."""

import errno
import json
import os
import stat
from pathlib import Path

MOST_TEXT = 2**24  # bytes; more than the longest list of labels in a report


def check_regular(path: Path) -> None:
    """Raises ValueError for a pipe, a device, a socket or a folder, whose reading may never end; follows links.

    Raises FileNotFoundError and PermissionError as the operating system does.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no regular file")


def read_text(path: Path) -> str:
    """The text of a file. Raises ValueError for anything but UTF-8 in a regular file of at most MOST_TEXT bytes."""
    check_regular(path)
    with path.open("rb") as file:
        data = file.read(MOST_TEXT + 1)
    if len(data) > MOST_TEXT:
        raise ValueError(f"it has more than {MOST_TEXT:,} bytes")
    return data.decode("utf-8")


def read_json(path: Path) -> object:
    """The values in a file. Raises ValueError for anything but JSON in a regular file of at most MOST_TEXT bytes."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def reason(error: Exception) -> str:
    """The message of an error in one line, or its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def of_system(error: Exception) -> bool:
    """Whether the operating system caused the error (such as a missing permission), not the content of a file."""
    # Libraries raise OSError without a number; EINVAL is an invalid seek, as a damaged file can cause.
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
