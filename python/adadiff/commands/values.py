"""Parsers of option values."""

import argparse
import tomllib
from typing import Any

from ..policies.step_selector import AUTO


class Settings(argparse.Action):
    """Gathers KEY=VALUE pairs in a dictionary."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, dict(values))


def setting(text: str) -> tuple[str, Any]:
    """Key and value of "depth=2", "time=false" or "head=mlp"; the value is read as TOML, or else stays text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"takes KEY=VALUE, as in depth=2, got {text!r}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def shares(text: str) -> list[float]:
    """The numbers of "0.4,0.55"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes numbers separated by commas, as in 0.4,0.55, got {text!r}") from None


def interval(text: str) -> tuple[float, float]:
    """The two numbers of "100,800"."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes two numbers, LOW,HIGH, as in 100,800, got {text!r}") from None
    return low, high


def steps(text: str) -> list[int] | list[str]:
    """The numbers of "20,30", or ["auto"]."""
    if text == AUTO:
        return [AUTO]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"takes {AUTO}, or whole numbers separated by commas, as in 20,30, got {text!r}"
        ) from None


def whole_numbers(text: str) -> list[int]:
    """The numbers of "20,30"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"takes whole numbers separated by commas, as in 20,30, got {text!r}"
        ) from None
