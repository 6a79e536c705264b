"""Check for the packages of the extra `ray`."""

import importlib


def check_extra(*modules: str) -> None:
    """ImportError, with the pip command to run, if a module or one of its dependencies is missing."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing, package = error.name or name, name.partition(".")[0]
            what = name if missing.partition(".")[0] == package else f"{name}, which needs {missing}"
            raise ImportError(f"this needs {what}: pip install 'adadiff_kernels[ray]'") from error
