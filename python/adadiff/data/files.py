"""Reading files that somebody else made."""

import errno
import json
import os
import stat
from pathlib import Path


def check_regular(path: Path) -> None:
    """ValueError for a pipe, a device, a socket or a folder, reading which may never end; links are followed.

    FileNotFoundError and PermissionError as the operating system raises them.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no regular file")


def read_json(path: Path) -> object:
    """ValueError for anything that is not JSON in a regular file."""
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def reason(error: Exception) -> str:
    """What a library says of a bad file, in one line; some errors have no text of their own."""
    return " ".join(str(error).split()) or type(error).__name__


def of_system(error: Exception) -> bool:
    """Whether the operating system is the reason, such as a missing permission, rather than the content of a file."""
    # Libraries raise OSError without a number; EINVAL is a seek to nowhere, which a damaged file asks for.
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
