"""Checkpoints that an earlier version of this package wrote."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import FORMAT_VERSION, opened, read_all, read_header
from ..weights import plain_names


def is_earlier(path: Path) -> bool:
    """Whether an earlier version wrote the file, so that `upgraded` reads it."""
    version = _version(path)
    return type(version) is int and version in range(1, FORMAT_VERSION)


def upgraded(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of the file, as this version writes them.

    Calibrations of version 1 had `layers`, now `num_layers`, and `guidance`, now `guidance_scale`, which is larger by 1
    (1: no guidance). Raises ValueError for a calibration that lacks these.
    """
    with opened(path) as file:
        metadata, tensors = read_header(file, path), plain_names(read_all(file), str(path))
    del metadata["format_version"]
    if (calibration := metadata.get("calibration")) is not None:
        try:
            calibration["num_layers"] = calibration.pop("layers")
            calibration["guidance_scale"] = calibration.pop("guidance") + 1
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the calibration in {path} is damaged: {error!r}") from None
    return tensors, metadata


def _version(path: Path) -> object:
    """The file's format_version; None for files of other programs."""
    try:
        with opened(path) as file:
            return json.loads((file.metadata() or {}).get("format_version", "null"))
    except (ValueError, RecursionError):
        return None
