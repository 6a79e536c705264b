"""Files of estimated errors, and the text after "estimate:"."""

import json
from dataclasses import asdict, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from reprlib import repr as shortly
from typing import Any

from ..reading import read_json
from .estimated import ErrorEstimates, EstimatedReuse, Spent

FORMAT, FORMAT_VERSION = "adadiff estimated errors", 3


def estimated_from(path: str, share: float, by: str | None = None) -> EstimatedReuse:
    """The policy for a file of `adadiff calibrate-reuse`, or the name of a shipped one. share: of the multiply-adds.
    Raises ValueError for a file that cannot be read, and for a share or `by` that it does not have."""
    return EstimatedReuse(read_estimates(path), share, by, source=path)


def estimates_json(estimates: ErrorEstimates) -> str:
    """The content of a file."""
    return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(estimates)}) + "\n"


def read_estimates(path: str) -> ErrorEstimates:
    """Reads a file of `estimates_json`. Raises ValueError for anything else."""
    shipped = resources.files("adadiff").joinpath("checkpoints", f"{path}.json")
    try:
        file = Path(str(shipped)) if path.isidentifier() and shipped.is_file() else Path(path)
        found = file.stat()
        return _read(file, found.st_mtime_ns, found.st_size)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no file {path!r}; `adadiff calibrate-reuse` writes such files") from None
    except OSError as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(f"{error}; `adadiff calibrate-reuse` writes such files") from None


@lru_cache(maxsize=16)
def _read(file: Path, changed: int, size: int) -> ErrorEstimates:
    """changed, size: so that a file that was written anew is read anew."""
    values = read_json(file)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{file} does not hold {FORMAT!r}")
    if (version := values.pop("format_version", None)) != FORMAT_VERSION or version is True:
        raise ValueError(f"{file} has format_version {shortly(version)}, this release reads {FORMAT_VERSION}")
    try:
        return ErrorEstimates(**_typed(values))
    except (TypeError, KeyError) as error:  # a field too many, one missing, or of another kind
        raise ValueError(f"the fields of {file} are not those of such a file: {error}") from None
    except ValueError as error:
        raise ValueError(f"cannot use {file}: {error}") from None


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    for key, kind in {"network": str, "solver": str, "samples": int, "seed": int}.items():
        if type(values[key]) is not kind:
            raise TypeError(f"{key} is {shortly(values[key])}")
    for key in ("by_sample", "by_step"):
        if not isinstance(values[key], list) or not all(isinstance(one, dict) for one in values[key]):
            raise TypeError(f"{key} is {shortly(values[key])}")
        values[key] = tuple(Spent(**one) for one in values[key])
    if not isinstance(values["weights"], list) or not all(isinstance(row, list) for row in values["weights"]):
        raise TypeError(f"weights is {shortly(values['weights'])}")
    values["weights"] = tuple(map(tuple, values["weights"]))
    known = {field.name for field in fields(ErrorEstimates)}
    return {key: tuple(value) if isinstance(value, list) and key in known else value for key, value in values.items()}
