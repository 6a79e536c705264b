"""Diffusion transformers whose samples leave early, the sampler around them, and an engine that serves them."""

import importlib

from .checkpoint import load, save
from .conversion.convert import convert
from .forward.forward import ForwardOutput, evaluate
from .model import Model, build
from .sampling.reports import Report
from .sampling.sampler import SamplerRun, sample
from .serving.engine import Engine
from .serving.handles import DeadlineExceeded, EngineClosed, EngineFull, Handle

__version__ = "0.1.0"
__all__ = [
    "AdaDiffPipeline",
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "EngineFull",
    "ForwardOutput",
    "Handle",
    "Model",
    "Report",
    "SamplerRun",
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
    "AdaDiffPipeline": "pipelines.pipeline",
    "disable_early_exit": "pipelines.early_exit",
    "enable_early_exit": "pipelines.early_exit",
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
