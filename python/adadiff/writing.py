"""Atomic writing of files, and which files may be replaced.

A file is written under a temporary name in the same folder, flushed to disk and renamed. A reader, or a later run, sees
the old file or the new one, never a part, even after a power failure (unless it is written with flush=False). Links,
devices, pipes and folders are never replaced or written through.
"""

import errno
import os
import re
import resource
import secrets
import shutil
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NAME_MARGIN = 2 * len(".0123456789abcdef.part")  # characters that nested temporary names add
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}  # the file system has no hard links


def check_outputs(
    force: bool, *paths: Path | None, inputs: Sequence[str | Path | None] = (), replaced_by: str = "--force"
) -> None:
    """Checks before a command's work that each of `paths` (except None) can be written, and that they differ.

    Raises ValueError for a file that exists, unless `force` (its message names `replaced_by`); for one that the command
    reads (`inputs`); for a link, a device, a pipe or a folder; and if the file's folder is missing or not writable.
    """
    outputs = [path for path in paths if path is not None]
    for number, path in enumerate(outputs):
        if any(same_file(path, other) for other in outputs[:number]):
            raise ValueError(f"cannot write two results to {path}; name two files")
        if any(same_file(path, Path(read)) for read in inputs if read is not None):
            raise ValueError(f"cannot write {path}: this command reads it; name another file")
        folder = path.parent
        if not folder.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {folder}")
        check_replaceable(path)
        if path.exists() and not force:
            raise ValueError(f"cannot write {path}: it exists; {replaced_by} replaces it")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write {path}: no permission to write in {folder}")
        if len(os.fsencode(path.name)) + NAME_MARGIN > os.pathconf(folder, "PC_NAME_MAX"):
            raise ValueError(f"cannot write {path}: its name is too long")


def check_replaceable(path: Path) -> None:
    """Raises ValueError for a link, a device, a pipe, a socket or a folder; passes a regular or a missing file."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    kinds = {stat.S_IFLNK: "link", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    if not stat.S_ISREG(mode):
        raise ValueError(f"cannot write {path}: it is a {kinds.get(stat.S_IFMT(mode), 'device')}")


def replace_file(
    path: Path, write: Callable[[Path], T], rank: int | None = None, force: bool = True, flush: bool = True
) -> T:
    """Calls `write` with a temporary path, at which it must create a file, and renames that file to `path`. Returns the
    result of `write`.

    The temporary name contains `rank`, or a random number. Raises ValueError as `check_replaceable` does, and OSError,
    naming `path`, if it cannot be written; with force=False also if it exists by now. The old file is then kept.
    flush=False does not wait for the disk: a power failure may leave a damaged file (a killed process does not), so it
    is for files that are checked when read.
    """
    check_replaceable(path)
    temporary = path.with_name(f"{path.name}.{rank}.part")
    if rank is None or os.path.lexists(temporary):
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        result = write(temporary)
        if flush:
            _flush(temporary)
        _rename(temporary, path, force)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        raise
    if flush:
        with suppress(OSError):  # not every file system flushes folders
            _flush(path.parent)
    return result


def drop_parts(folder: Path, names: str) -> None:
    """Removes temporary files that a killed process left, for files whose names match the regular expression `names`.
    No process may be writing them."""
    part = re.compile(rf"(?:{names})\.[0-9a-f]+\.part")
    for path in folder.iterdir():
        if part.fullmatch(path.name):
            path.unlink()


def check_space(path: Path, size: int) -> None:
    """Raises OSError if a file of `size` bytes does not fit at `path`: so long work does not end at a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    for number, most in (
        (errno.ENOSPC, shutil.disk_usage(path.parent).free),
        (errno.EFBIG, size if limit == resource.RLIM_INFINITY else limit),
    ):
        if size > most:
            raise OSError(number, f"{os.strerror(number)} ({size / 1e6:,.1f} MB are needed)", str(path))


def same_file(path: Path, other: Path) -> bool:
    """Whether both paths are the same file, which need not exist."""
    with suppress(OSError):
        if path.samefile(other):
            return True
    return os.path.realpath(path) == os.path.realpath(other)


def _rename(temporary: Path, path: Path, force: bool) -> None:
    if not force:
        try:
            os.link(temporary, path)  # unlike a rename, fails if the file exists
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        else:
            temporary.unlink()
            return
    os.replace(temporary, path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
