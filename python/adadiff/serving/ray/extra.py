"""Whether the packages of the extra `ray` are there."""

import importlib


def check_extra(*modules: str) -> None:
    """ImportError, with the remedy, where one of them, or what it is made of, is missing."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing, package = error.name or name, name.partition(".")[0]
            what = name if missing.partition(".")[0] == package else f"{name}, and that takes {missing}"
            raise ImportError(f"this takes {what}: pip install 'adadiff_kernels[ray]'") from error
