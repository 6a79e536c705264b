"""What captured passes of one network share on a device: memory at fixed addresses, and captured pieces."""

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

KEPT = 3  # spaces of a network, in one thread; the least recently used ones are dropped


class Space:
    """Memory and graphs for passes of up to `lanes` lanes with inputs of the shapes of x [B, C, H, W] and context
    [B, ...] or None. Used by one pass of one thread at a time.

    active, pieces, count_sync: of its passes. x, t, context: inputs, loaded before each pass. memory: None until the
    network has been called once.
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
        """Begins a pass: loads x [B, C, H, W], t [B] and context [B, ...] or None, all on the device."""
        n = x.shape[0]
        self.active.start(n)
        self.x[:n].copy_(x)
        self.t[:n].copy_(t)
        if context is not None:
            self.context[:n].copy_(context)
        if self.memory is None:  # run one lane through stem and head to learn the shapes
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
        """Loads the decision's limits and partner: int32 [B] on the device, or None."""
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
    """The addresses of a network's parameters, which captured pieces hold."""

    def __init__(self, *owners: Any) -> None:
        modules = [module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
        groups = [group for module in modules for group in (module._parameters, module._buffers, module._modules)]
        self._groups = [group.values() for group in groups if group]  # views, which follow later changes
        self._members = list(self._now())  # kept alive, so that no other object gets the same id
        self._ids = list(map(id, self._members))
        self._tensors = [value for value in self._members if isinstance(value, Tensor)]
        for owner in owners:
            if owner is not None and not isinstance(owner, nn.Module):
                self._tensors += list(owner.parameters())
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(self._groups)

    def moved(self) -> bool:
        """Whether parameters or modules were replaced or moved in memory. In-place changes of values do not count."""
        return list(map(id, self._now())) != self._ids or (list(map(Tensor.data_ptr, self._tensors)) != self._addresses)


_spaces = threading.local()


@contextmanager
def space_of(backbone: Backbone, exits: Exits | None, lanes: int, x: Tensor, context: Tensor | None) -> Iterator[Space]:
    """A space for exclusive use. If the pass fails, the space is dropped, since its state is unknown (except after an
    error of a policy). If memory runs out, this thread drops all its spaces."""
    known = _spaces.__dict__.setdefault("of", WeakKeyDictionary())
    kept: dict[object, tuple[Space, Parameters]] = known.setdefault(backbone, {})
    kind = None if context is None else (context.shape[1:], context.dtype)
    key = (id(exits), lanes, x.device, x.dtype, x.shape[1:], kind)
    space, parameters = kept.pop(key, (None, None))
    if space is None or parameters.moved():
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        with torch.inference_mode(False):  # a later caller may be in another mode
            space, parameters = Space(lanes, x, context, graphs_on(x.device)), Parameters(backbone, exits)
    try:
        yield space
    except PolicyFailure:
        kept[key] = space, parameters
        raise
    except torch.OutOfMemoryError:
        known.clear()  # frees their memory
        raise
    kept[key] = space, parameters


def graphs_on(device: torch.device) -> Graphs:
    return CudaGraphs(device)
