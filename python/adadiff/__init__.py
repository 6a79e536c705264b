"""Diffusion transformers whose samples leave early, the sampler around them, and an engine that serves them."""

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
    "evaluate",
    "load",
    "sample",
    "save",
]
