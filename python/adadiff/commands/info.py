"""adadiff info: versions, devices, and the implementation of each kernel."""

import argparse
import importlib
import os
import platform

import torch

from adadiff_kernels import OPERATORS, backends

from .. import __version__
from .terminal import show

INDENT = 26  # column at which values start


def info(options: argparse.Namespace) -> None:
    show(
        {
            "adadiff": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            "triton": _version("triton"),
            "diffusers": _version("diffusers"),
            "numpy": _version("numpy"),
        },
        indent=INDENT,
    )
    print()
    show(
        {
            "cpu": f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}",
            "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
            **{f"cuda:{i}": _gpu(i) for i in range(torch.cuda.device_count())},
        },
        indent=INDENT,
    )
    if not torch.cuda.is_available():
        print(f"{'gpu':{INDENT}} none: {_why_no_gpu()}")
    print()
    cpu, gpu = backends("cpu"), backends("cuda") if torch.cuda.is_available() else {}
    width = max(map(len, cpu.values())) + 2
    print(f"{'kernels':{INDENT}} {'on the CPU':{width}} on a GPU")
    for name in OPERATORS:
        print(f"{name:{INDENT}} {cpu[name]:{width}} {gpu.get(name, 'no GPU')}")


def _version(package: str) -> str:
    try:
        return getattr(importlib.import_module(package), "__version__", "unknown")
    except ImportError:
        return "not installed"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    return f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return "PyTorch finds no CUDA device; see nvidia-smi"
