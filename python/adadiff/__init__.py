"""Diffusion transformers whose samples leave early, and the sampler around them."""

from .checkpoint import load, save
from .engine import Evaluation, evaluate
from .model import Model, build
from .sampler import Report, Sampling, sample

__version__ = "0.1.0"
__all__ = ["Evaluation", "Model", "Report", "Sampling", "build", "evaluate", "load", "sample", "save"]
