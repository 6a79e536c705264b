"""Files that are written: which ones may be replaced, and how each is written whole.

A file is written under a temporary name beside its own, flushed to the disk and renamed. A reader, or a later run, sees
the old file or the new one, never a part, also after a power failure (unless it is written with flush=False). Links,
devices, pipes and folders are never replaced and never written through.
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

NAME_MARGIN = 2 * len(".0123456789abcdef.part")  # what temporary names add, one inside another
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}  # by this file system


def check_outputs(force: bool, *paths: Path | None, inputs: Sequence[str | Path | None] = ()) -> None:
    """For a command, before its work: each of `paths`, None aside, can be written, and they are different files.

    Raises ValueError for a file that exists, unless `force`; for one that the command reads (`inputs`), for a link, a
    device, a pipe or a folder, and where there is no folder that can be written in.
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
            raise ValueError(f"cannot write {path}: it exists; --force replaces it")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write {path}: no permission to write in {folder}")
        if len(os.fsencode(path.name)) + NAME_MARGIN > os.pathconf(folder, "PC_NAME_MAX"):
            raise ValueError(f"cannot write {path}: its name is too long")


def check_replaceable(path: Path) -> None:
    """ValueError for a link, a device, a pipe, a socket or a folder. A missing file is as good as a regular one."""
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
    """Calls `write` with a temporary path, at which it must make a file, and gives that file the name `path`. Returns
    what `write` does.

    The temporary name holds `rank`, or else a random number. Raises ValueError where `check_replaceable` does, and
    OSError, which names `path`, where it cannot be written; with force=False also where it exists by now. The old
    file, if any, is kept then. flush=False is for files that whoever reads them checks: it costs no wait for the disk,
    and a power failure may leave a damaged file, but a killed process none.
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
    """Removes what a killed process left of files whose names match the pattern `names`. Nobody may be writing them."""
    part = re.compile(rf"(?:{names})\.[0-9a-f]+\.part")
    for path in folder.iterdir():
        if part.fullmatch(path.name):
            path.unlink()


def check_space(path: Path, size: int) -> None:
    """OSError where a file of `size` bytes does not fit at `path`: so that hours of work do not end at a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    for number, most in (
        (errno.ENOSPC, shutil.disk_usage(path.parent).free),
        (errno.EFBIG, size if limit == resource.RLIM_INFINITY else limit),
    ):
        if size > most:
            raise OSError(number, f"{os.strerror(number)} ({size / 1e6:,.1f} MB are needed)", str(path))


def same_file(path: Path, other: Path) -> bool:
    """Whether both are one file, which need not exist."""
    with suppress(OSError):
        if path.samefile(other):
            return True
    return os.path.realpath(path) == os.path.realpath(other)


def _rename(temporary: Path, path: Path, force: bool) -> None:
    if not force:
        try:
            os.link(temporary, path)  # unlike a rename, this fails where the file exists
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
