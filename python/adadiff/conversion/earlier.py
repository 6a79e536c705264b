"""Checkpoints that an earlier version of this package wrote."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import FORMAT_VERSION, opened, read_all, read_header
from ..weights import plain_names


def is_earlier(path: Path) -> bool:
    """Whether `upgraded` reads it."""
    version = _version(path)
    return type(version) is int and version in range(1, FORMAT_VERSION)


def upgraded(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata as this version writes them.

    Version 1 had `layers` and `guidance`, counted from 0, in its calibrations: now `num_layers` and `guidance_scale`,
    counted from 1. Raises ValueError for a calibration that has neither.
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
    """None for files of others."""
    try:
        with opened(path) as file:
            return json.loads((file.metadata() or {}).get("format_version", "null"))
    except (ValueError, RecursionError):
        return None
