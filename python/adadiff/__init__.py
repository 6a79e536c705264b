"""Diffusion transformers whose samples leave early, the sampler around them, and an engine that serves them."""

import importlib

from .checkpoint import load, save
from .conversion import convert
from .engine import Evaluation, evaluate
from .handles import DeadlineExceeded, EngineClosed, EngineFull, Handle
from .model import Model, build
from .reports import Report
from .sampler import Sampling, sample
from .serving import Engine

__version__ = "0.1.0"
__all__ = [
    "AdaDiffPipeline",
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "EngineFull",
    "Evaluation",
    "Handle",
    "Model",
    "Report",
    "Sampling",
    "build",
    "convert",
    "disable_early_exit",
    "enable_early_exit",
    "evaluate",
    "load",
    "sample",
    "save",
]

_DIFFUSERS = {
    "AdaDiffPipeline": "pipeline",
    "disable_early_exit": "early_exit",
    "enable_early_exit": "early_exit",
}


def __getattr__(name: str) -> object:
    """What needs diffusers, an extra, is imported when it is asked for."""
    if name not in _DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_DIFFUSERS[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError(f"adadiff.{name} takes diffusers: pip install 'adadiff_kernels[latents]'") from error
