"""Arrays that others pickled, without running what a pickle may hold: only numpy's own constructors are called."""

import pickle
from pathlib import Path
from typing import BinaryIO

import numpy as np

# (module, name) -> as numpy 2 has it. Older releases wrote numpy.core, and Python 2 strings that go through _codecs.
ALLOWED = {
    (module, name): (module.replace("numpy.core", "numpy._core"), name)
    for module, name in (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy.core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
    )
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(*ALLOWED[module, name])


def unpickle(path: Path) -> object:
    """Lists, dictionaries, numbers, strings and arrays from a pickle, strings of Python 2 as bytes.

    Raises ValueError for anything else.
    """
    with path.open("rb") as file:
        return _read(file, path)


def load_npy(path: Path) -> np.ndarray:
    """A .npy file, also one of dtype object, which is a pickle. ValueError for anything else."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            _, _, dtype = header(file)
            if not dtype.hasobject:
                file.seek(0)
                return np.load(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} is no .npy file that can be read: {error}") from error
        value = _read(file, path)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an array")
    return value


def _read(file: BinaryIO, path: Path) -> object:
    try:
        return _Unpickler(file, encoding="bytes").load()
    except (pickle.UnpicklingError, AttributeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not read: {error}") from error
