"""One launch fills a folder at a time.

Every process locks a file of its rank. The kernel holds the lock, so it ends with the process, a killed one, too; the
file may stay, and the next run takes it.
"""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

LOCK = re.compile(r"\.rank-(\d+)\.lock")
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # on a file system without them nobody guards


@contextmanager
def only_launch(folder: Path, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Holds the folder, made if it is missing, for one of `world` processes that fill it together.

    Of another launch, whatever its world, some process meets one of this one's here: besides its own rank it asks for
    those whose work would be its own. Raises ValueError where they still run, or the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [int(name[1]) for path in folder.iterdir() if (name := LOCK.fullmatch(path.name))]
            for other in sorted({rank, *(other for other in found if other % world == rank)}):
                held.enter_context(_locked(folder / f".rank-{other}.lock"))
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with ExitStack() as opened:
        while True:
            file = opened.enter_context(path.open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                whose = file.read().strip() or "another process"
                raise ValueError(f"{path.parent} is being filled by {whose}; wait for it, or choose another") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            with suppress(FileNotFoundError):  # who held it may have removed it in the meantime
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held
