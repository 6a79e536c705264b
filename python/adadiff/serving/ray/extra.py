"""Whether the packages of the extra `ray` are there."""

import importlib


def check_extra(*modules: str) -> None:
    """ImportError, with the remedy, where one of them, or what it is made of, is missing."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = f"{name} ({error})" if error.name and error.name != name.partition(".")[0] else name
            raise ImportError(f"this takes {missing}: pip install 'adadiff_kernels[ray]'") from error
