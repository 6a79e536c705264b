"""Diffusion transformers with adaptive computation per sample: networks with exits, samplers, and an engine."""

import importlib

from .checkpoint import load, save
from .conversion.convert import convert
from .engine.engine import Engine
from .engine.handles import DeadlineExceeded, EngineClosed, EngineFull, Handle
from .forward.forward import forward
from .forward.options import ExecutionOptions
from .forward.output import ForwardOutput
from .model import Model, build
from .policies.exits import Replay
from .policies.interface import ExitContext, ExitPolicy
from .sampling.params import SamplingParams
from .sampling.reports import Report
from .sampling.sampler import SamplerRun, sample
from .sampling.trace import Trace, trace

__version__ = "0.1.0"
__all__ = [
    "AdaDiffPipeline",
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "EngineFull",
    "ExecutionOptions",
    "ExitContext",
    "ExitPolicy",
    "ForwardOutput",
    "Handle",
    "Model",
    "Replay",
    "Report",
    "SamplerRun",
    "SamplingParams",
    "Trace",
    "build",
    "calibrate",
    "convert",
    "disable",
    "enable",
    "forward",
    "load",
    "sample",
    "save",
    "summary",
    "trace",
]

_DIFFUSERS = {
    "AdaDiffPipeline": "pipelines.pipeline",
    "calibrate": "pipelines.calibrating",
    "disable": "pipelines.enable",
    "enable": "pipelines.enable",
    "summary": "pipelines.enable",
}


def __getattr__(name: str) -> object:
    """Imports names that need diffusers, an extra, on first use. Raises ImportError without diffusers."""
    if name not in _DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_DIFFUSERS[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError(f"adadiff.{name} takes diffusers: pip install 'adadiff_kernels[diffusers]'") from error
