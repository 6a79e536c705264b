"""What passes of one network keep on a device from one to the next: memory at addresses that stay, and pieces."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adadiff_kernels import DeviceSet

from ..models.interface import Backbone
from ..uem import Exits
from .count_sync import Measured
from .decision import ExitDecision, PolicyFailure
from .memory import Memory
from .pieces import CudaGraphs, Graphs, Pieces
from .runner import BlockRunner
from .structure import Structure

KEPT = 3  # spaces of a network, in one thread; those used least recently are dropped


class Space:
    """For up to `lanes` lanes of inputs such as x [B, C, H, W] and context [B, ...] or None. One pass uses it at a
    time, of one thread.

    active, pieces, count_sync: of its passes. x, t, context: the lanes' own, loaded before each pass. memory: None
    until the network has been called once.
    """

    def __init__(self, lanes: int, x: Tensor, context: Tensor | None, graphs: Graphs) -> None:
        self.lanes, self.active, self.pieces = lanes, DeviceSet(lanes, x.device), Pieces(graphs)
        self.count_sync = Measured()
        self.x = x.new_zeros(lanes, *x.shape[1:])
        self.t = torch.zeros(lanes, dtype=torch.float32, device=x.device)
        self.context = None
        if context is not None:
            self.context = torch.zeros((lanes, *context.shape[1:]), dtype=context.dtype, device=x.device)
        self.memory: Memory | None = None
        self._limits: Tensor | None = None
        self._tied = False

    def begin(self, runner: BlockRunner, structure: Structure, x: Tensor, t: Tensor, context: Tensor | None) -> Memory:
        """A pass over x [B, C, H, W], t [B] and context [B, ...] or None, on the device."""
        n = len(x)
        self.active.start(n)
        self.x[:n].copy_(x)
        self.t[:n].copy_(t)
        if context is not None:
            self.context[:n].copy_(context)
        if self.memory is None:  # one lane through stem and head shows what they make
            one = runner.embedded(*self.inputs(1), True)
            runner.begin(one, None)
            prediction = runner.one_prediction(one.hidden)
            with torch.inference_mode(False):
                self.memory = Memory(self.lanes, one, prediction, structure)
        return self.memory

    def inputs(self, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, t and context of the first n lanes."""
        return self.x[:n], self.t[:n], None if self.context is None else self.context[:n]

    def load_decision(self, decision: ExitDecision, partner: Tensor | None) -> None:
        """partner: int32 [B] on the device, or None."""
        limits, memory = decision.limits, self.memory
        if limits is not None and limits is not self._limits:
            memory.limits[:, : limits.shape[1]].copy_(limits)
            self._limits = limits
        if partner is not None:
            memory.partner[: len(partner)].copy_(partner)
        elif self._tied:
            memory.partner.copy_(memory.identity)
        self._tied = partner is not None


class Parameters:
    """Where a network's parameters lie, since captured pieces hold their addresses."""

    def __init__(self, *owners: Any) -> None:
        modules = [module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
        groups = [group for module in modules for group in (module._parameters, module._buffers, module._modules)]
        self._groups = [group for group in groups if group]
        self._members = list(self._now())  # kept alive, so that nothing else gets their identity
        self._ids = list(map(id, self._members))
        self._tensors = [value for value in self._members if isinstance(value, Tensor)]
        for owner in owners:
            if owner is not None and not isinstance(owner, nn.Module):
                self._tensors += list(owner.parameters())
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(group.values() for group in self._groups)

    def moved(self) -> bool:
        """Whether somebody has put other parameters or modules into their places. Values may change where they lie."""
        return list(map(id, self._now())) != self._ids or (list(map(Tensor.data_ptr, self._tensors)) != self._addresses)


_spaces = threading.local()


@contextmanager
def space_of(backbone: Backbone, exits: Exits | None, lanes: int, x: Tensor, context: Tensor | None) -> Iterator[Space]:
    """One that no pass uses now. It is dropped where the pass fails, unless a policy did: nobody knows what it has left
    undone. Where memory ran out, this thread gives up all others, too."""
    known = _spaces.__dict__.setdefault("of", WeakKeyDictionary())
    kept: dict[object, tuple[Space, Parameters]] = known.setdefault(backbone, {})
    kind = None if context is None else (context.shape[1:], context.dtype)
    key = (id(exits), lanes, x.device, x.dtype, x.shape[1:], kind)
    space, parameters = kept.pop(key, (None, None))
    if space is None or parameters.moved():
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        with torch.inference_mode(False):  # whatever mode the caller is in, the next one may be in another
            space, parameters = Space(lanes, x, context, graphs_on(x.device)), Parameters(backbone, exits)
    try:
        yield space
    except PolicyFailure:
        kept[key] = space, parameters
        raise
    except torch.OutOfMemoryError:
        known.clear()  # others may have it
        raise
    kept[key] = space, parameters


def graphs_on(device: torch.device) -> Graphs:
    return CudaGraphs(device)
