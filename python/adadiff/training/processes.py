"""This process among those that train together: started by `accelerate launch` or torchrun, or alone."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..output.filling import Process


class Processes:
    """`rank` of `world` processes; the first is `main`. `device` is this one's own.

    Several are joined by Hugging Face accelerate (NCCL on GPUs, gloo on CPUs). Raises ImportError, with the remedy,
    where it is missing and needed.
    """

    def __init__(self) -> None:
        place = Process.of(os.environ)
        self.rank, self.world = place.rank, place.world
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
        """Inside, a joined module keeps its gradients to itself, to be averaged with those of a later backward."""
        return nullcontext() if self._accelerator is None else self._accelerator.no_sync(module)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, which must all ask."""
        return value if self._accelerator is None else self._accelerator.reduce(value, reduction="mean")
