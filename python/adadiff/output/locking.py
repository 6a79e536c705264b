"""File locks that let only one launch fill a folder at a time.

Every process locks the file of its rank. The operating system releases the lock when the process ends, even if it is
killed; a file that is left behind is used again by the next run.
"""

import errno
import fcntl
import itertools
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

LOCK = re.compile(r"\.rank-(\d+)\.lock")
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # file systems without locks: folders are unguarded


@contextmanager
def only_launch(folder: Path, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Locks the folder for one of `world` processes that fill it together. A missing folder is created, and removed
    again if it stays empty, as after a failed start.

    Besides the lock of its rank, a process takes those of other ranks whose shards would be its own, so that launches
    of different world sizes exclude each other. Raises ValueError if another launch is running, or if the folder cannot
    be written.
    """
    with ExitStack() as held:
        try:
            made = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
            held.callback(_remove_empty, made)
            for path in reversed(made):  # `parents=True` recurses, and paths can have thousands of parts
                path.mkdir(exist_ok=True)
            found = [int(name[1]) for path in folder.iterdir() if (name := LOCK.fullmatch(path.name))]
            for other in sorted({rank, *(other for other in found if other % world == rank)}):
                held.enter_context(_locked(folder / f".rank-{other}.lock"))
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
        yield


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with ExitStack() as opened:
        while True:
            file = opened.enter_context(open(_open(path), "r+b", buffering=0))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                whose = file.read(200).decode(errors="replace").strip() or "another process"
                raise ValueError(f"{path.parent} is being filled by {whose}; wait for it, or choose another") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            with suppress(FileNotFoundError):  # its previous holder may have removed it in the meantime
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break
        with suppress(OSError):  # the lock is held, even where a full disk leaves no room for the holder's name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held


def _open(path: Path) -> int:
    """Opens or creates a regular file. Links are refused, and pipes and devices, which might block."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise OSError(errno.EINVAL, f"{path.name} is no regular file")
