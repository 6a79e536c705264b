"""Data-parallel training: this process among those that `accelerate launch` or torchrun started, or alone."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..output.filling import Process


class Processes:
    """`rank` of `world` processes; rank 0 is `main`. `device`: of this process.

    Several processes communicate through Hugging Face accelerate (NCCL on GPUs, gloo on CPUs). Raises ImportError, with
    the pip command to run, if it is needed and missing.
    """

    def __init__(self) -> None:
        process = Process.of(os.environ)
        self.rank, self.world = process.rank, process.world
        self._accelerator = None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.world > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise ImportError("several processes need accelerate: pip install 'adadiff_kernels[train]'") from error
            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
            self.device = self._accelerator.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def join(self, module: nn.Module) -> nn.Module:
        """The module on this process's device, its gradients averaged over all processes after every backward."""
        module = module.to(self.device)
        return module if self._accelerator is None else self._accelerator.prepare(module)

    def apart(self, module: nn.Module) -> AbstractContextManager:
        """Context in which backward accumulates gradients locally; the next backward outside of it averages them over
        the processes."""
        return nullcontext() if self._accelerator is None else self._accelerator.no_sync(module)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over all processes. A collective call: every process must make it."""
        return value if self._accelerator is None else self._accelerator.reduce(value, reduction="mean")
