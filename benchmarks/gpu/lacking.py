"""Stand-ins for modules that a machine may lack and that GPU suites do not need: tqdm, safetensors and hypothesis.

Also a pytest plugin (-p benchmarks.gpu.lacking), with which tests that need hypothesis are skipped.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, TextIO
from unittest.mock import MagicMock


class Bar:
    """tqdm without a progress bar."""

    def __init__(self, iterable: Iterable[Any] = (), **_: object) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, *_: object) -> None: ...

    def set_postfix(self, **_: object) -> None: ...

    @staticmethod
    def write(text: str, file: TextIO | None = None) -> None:
        print(text, file=file, flush=True)


def no_file(*_: object, **__: object) -> None:
    raise ImportError("safetensors is not installed here")


def given(*_: object, **__: object) -> Callable[[Callable], Callable]:
    import pytest

    def decorate(test: Callable) -> Callable:
        return pytest.mark.skip(reason="hypothesis is not installed here")(functools.wraps(test)(lambda **_: None))

    return decorate


def unchanged(**_: object) -> Callable[[Callable], Callable]:
    return lambda test: test


files = SimpleNamespace(
    SafetensorError=type("SafetensorError", (Exception,), {}), safe_open=no_file, save_file=no_file, load_file=no_file
)
# package -> its modules' stand-ins. MagicMock stands in for hypothesis' strategies
STAND_INS = {
    "tqdm": {"tqdm": SimpleNamespace(tqdm=Bar)},
    "safetensors": {"safetensors": files, "safetensors.torch": files},
    "hypothesis": {"hypothesis": MagicMock(given=given, settings=MagicMock(side_effect=unchanged))},
}


def missing() -> list[str]:
    return [name for name in STAND_INS if name not in sys.modules and find_spec(name) is None]


def install(names: Iterable[str]) -> None:
    for name in names:
        for path, module in STAND_INS[name].items():
            module.__spec__ = ModuleSpec(path, None)  # read by importlib's find_spec
            sys.modules[path] = module


STOOD_IN = missing()
install(STOOD_IN)
