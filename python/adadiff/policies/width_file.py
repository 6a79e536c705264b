"""Width schedules as JSON files, and the text after "width:"."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from reprlib import repr as shortly
from typing import Any

from ..reading import read_json
from .width import Width

FORMAT_VERSION = 1
KEYS = ("format_version", "times", "widths", "network", "share", "quality", "settings")


def width_from(text: str) -> Width:
    """The policy for the text after "width:": one width for all times, as in "0.5", the name of a shipped schedule, or
    a file.

    Raises ValueError for a file that cannot be read or was not written by `width_json`.
    """
    try:
        value = float(text)
    except ValueError:
        return _read(text)
    return Width((), (value,))


def width_json(width: Width, network: Mapping[str, Any], **notes: object) -> str:
    """The content of a schedule file. network: the configuration that the schedule is for. notes: share (of the whole
    network's multiply-adds), quality and settings, for information. Raises ValueError for other notes."""
    if unknown := set(notes) - set(KEYS):
        raise ValueError(f"a schedule of widths has no {', '.join(sorted(unknown))}")
    values = {"format_version": FORMAT_VERSION, "times": width.times, "widths": width.widths}
    return json.dumps({**values, "network": dict(network), **notes}, indent=2) + "\n"


def _read(path: str) -> Width:
    shipped = resources.files("adadiff").joinpath("checkpoints", f"{path}.json")
    try:
        values = read_json(Path(str(shipped)) if path.isidentifier() and shipped.is_file() else Path(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path!r} is neither a number nor a file") from None
    except OSError as error:
        raise ValueError(str(error)) from None
    try:
        return _checked(values, path)
    except ValueError as error:
        raise ValueError(f"{error}; `adadiff search` writes such files") from None


def _checked(values: object, path: str) -> Width:
    if not isinstance(values, dict):
        raise ValueError(f"a schedule of widths is a table of values, got {shortly(values)}")
    if (version := values.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"it has format_version {shortly(version)}, this release reads {FORMAT_VERSION}")
    if unknown := sorted(set(values) - set(KEYS)):
        raise ValueError(f"unknown key {shortly(unknown[0])}; known: {', '.join(KEYS)}")
    if missing := [key for key in ("times", "widths", "network") if key not in values]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for key, kind, what in (("times", list, "a list"), ("widths", list, "a list"), ("network", dict, "a table")):
        if not isinstance(values[key], kind):
            raise ValueError(f"{key} must be {what}, got {shortly(values[key])}")
    network = json.dumps(values["network"], sort_keys=True)
    return Width(tuple(values["times"]), tuple(values["widths"]), path, network)
