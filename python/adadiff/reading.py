"""Reading files that somebody else made."""

import errno
import json
import os
import stat
from pathlib import Path

MOST_TEXT = 2**24  # bytes; the longest list of labels that a report can hold takes less


def check_regular(path: Path) -> None:
    """ValueError for a pipe, a device, a socket or a folder, reading which may never end; links are followed.

    FileNotFoundError and PermissionError as the operating system raises them.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no regular file")


def read_text(path: Path) -> str:
    """ValueError for anything but UTF-8 in a regular file of at most MOST_TEXT bytes."""
    check_regular(path)
    with path.open("rb") as file:
        data = file.read(MOST_TEXT + 1)
    if len(data) > MOST_TEXT:
        raise ValueError(f"it has more than {MOST_TEXT:,} bytes")
    return data.decode("utf-8")


def read_json(path: Path) -> object:
    """ValueError for anything that is not JSON in a regular file of at most MOST_TEXT bytes."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def reason(error: Exception) -> str:
    """What a library says of a bad file, in one line; some errors have no text of their own."""
    return " ".join(str(error).split()) or type(error).__name__


def of_system(error: Exception) -> bool:
    """Whether the operating system is the reason, such as a missing permission, rather than the content of a file."""
    # Libraries raise OSError without a number; EINVAL is a seek to nowhere, which a damaged file asks for.
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
