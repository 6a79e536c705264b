"""Arrays from untrusted files.

A pickle can call only the constructors below, and a file is read only if its size matches its header.
"""

import errno
import io
import math
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ..reading import check_regular, of_system, reason

# A compressed .npz may unpack to FREE bytes, or to MOST_RATIO times its size if that is more. Images compress to about
# a half, zeros to a thousandth.
FREE, MOST_RATIO = 2**28, 100


def _reconstruct(kind: object, shape: object, code: object) -> np.ndarray:
    """An empty array, as in numpy's pickles: the array's state follows."""
    return np.empty(0, "u1")


def _dtype(name: str | bytes, align: object = False, copy: object = False) -> np.dtype:
    if len(name) > 8:
        raise ValueError("a name of a dtype has at most 8 characters")
    return np.dtype(name if isinstance(name, str) else name.decode("ascii"))


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype, 1)[0]


def _frombuffer(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """For bytes in pickles of Python 2 and of old protocols."""
    if encoding != "latin1":
        raise ValueError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


# Globals in pickles of arrays. numpy._core was numpy.core in older releases.
ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): "the first argument of _reconstruct",
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Unpickler(pickle._Unpickler):
    """Based on the unpickler in Python: the one in C allocates memory for any memo index, up to 2^32, in a file."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return ALLOWED[module, name]


def unpickle(path: Path) -> object:
    """Lists, dictionaries, numbers, strings and arrays from a pickle, strings of Python 2 as bytes.

    Raises ValueError for anything else.
    """
    check_regular(path)
    return _unpickled(path.read_bytes(), path)


def load_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, also of dtype object (a pickle). Raises ValueError for anything else."""
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            header = Header.read(file)
            if not header.dtype.hasobject:
                header.check(size - file.tell())
                file.seek(0)
                return np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python
            if of_system(error):
                raise
            raise ValueError(f"{path} is no .npy file that can be read: {reason(error)}") from error
        value = _unpickled(file.read(), path)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an array")
    return value


@dataclass(frozen=True)
class Header:
    """Header of a .npy file."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @staticmethod
    def read(file: IO[bytes]) -> "Header":
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        return Header(dtype, shape)

    @property
    def size(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self, left: int) -> None:
        """left: bytes after the header. ValueError unless the array has this size and holds numbers."""
        if self.dtype.hasobject:
            raise ValueError("it holds objects, expected numbers")
        if min(self.shape, default=0) < 0 or self.size != left:
            raise ValueError(f"{self.dtype} {list(self.shape)} takes {self.size} bytes, but {left} follow its header")


def npz_headers(path: Path) -> dict[str, Header]:
    """Header of every array in a .npz file. Raises ValueError for any other file, OSError if it cannot be read."""
    with _Npz(path) as npz:
        return npz.headers(npz.members)


def read_npz(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of these names, or all; checksums are verified.

    Raises ValueError for a file that is damaged or unpacks to far more than its size, OSError if it cannot be read or
    does not fit in memory.
    """
    with _Npz(path) as npz:
        names = list(npz.members if names is None else names)
        npz.check_size(npz.headers(names))
        return {name: npz.array(name) for name in names}


class _Npz:
    """An open .npz file. The many exception types of zipfile and zlib become ValueError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "_Npz":
        check_regular(self.path)
        try:
            self._archive = zipfile.ZipFile(self.path)
        except Exception as error:
            self._refuse(error)
        self.members = {
            info.filename.removesuffix(".npy"): info
            for info in self._archive.infolist()
            if info.filename.endswith(".npy")
        }
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._archive.close()
        if isinstance(error, Exception):
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        if isinstance(error, MemoryError):
            raise OSError(errno.ENOMEM, "not enough memory for its arrays", str(self.path)) from error
        if of_system(error):
            raise error
        raise ValueError(f"{self.path} is damaged or no .npz file that can be read: {reason(error)}") from error

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        return {name: self._header(name) for name in names}

    def _header(self, name: str) -> Header:
        if name not in self.members:
            raise ValueError(f"it holds no {name}")
        info = self.members[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed as numpy never does")
        with self._archive.open(info) as file:
            header = Header.read(file)
            header.check(info.file_size - file.tell())
        return header

    def check_size(self, headers: dict[str, Header]) -> None:
        unpacked = sum(header.size for header in headers.values())
        packed = min(sum(self.members[name].compress_size for name in headers), self.path.stat().st_size)
        if unpacked > max(FREE, MOST_RATIO * packed):
            raise ValueError(
                f"{packed:,} bytes unpack to {unpacked:,}, more than {MOST_RATIO} times as many; save it uncompressed, "
                "with np.savez"
            )

    def array(self, name: str) -> np.ndarray:
        with self._archive.open(self.members[name]) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _unpickled(data: bytes, path: Path) -> object:
    try:
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a pickle can make numpy's constructors raise anything
        raise ValueError(f"{path} is not read: {reason(error)}") from error
