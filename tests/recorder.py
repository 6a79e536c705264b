"""CUDA graphs for machines without a GPU: what work does on the pretended device is noted, and done again at a replay.

A graph knows addresses only. So a replay writes into the tensors of the capture, whatever the host has done since; what
the work allocated on its way is NaN between replays, as memory that other graphs use, too; and a capture changes
nothing. A host value that was baked in, a tensor that is made anew, or one that a piece hands to another outside of
lasting memory shows as a wrong result.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adadiff_kernels import DeviceSet
from pretend import OnDevice, PretendDevice

Work = Callable[[], None]
aten = torch.ops.aten


class _Notes(TorchDispatchMode):
    """Notes operators, and what they overwrote."""

    current: "_Notes | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Work] = []
        self.fresh: list[Tensor] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if func.overloadpacket in (aten._to_copy, aten.copy_) and len({type(value) for value in given}) > 1:
            raise RuntimeError("operation not permitted when stream is capturing: a copy of the host's memory")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, OnDevice):
                self._keep(value.held)
        for argument in func._schema.arguments:
            value = kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, OnDevice):
                self._keep(value.held)
        made = func(*args, **kwargs)
        if any(isinstance(value, OnDevice) for value in tree_leaves((given, made))):
            self._note(
                func,
                args,
                kwargs,
                made,
                {value.held.untyped_storage().data_ptr() for value in given if isinstance(value, OnDevice)},
            )
        return made

    def _keep(self, held: Tensor) -> None:
        storage = held.untyped_storage()
        if storage.data_ptr() not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[storage.data_ptr()] = whole, whole.clone()

    def _note(self, func: Callable, args: tuple, kwargs: dict, made: object, known: set[int]) -> None:
        outputs = [value.held for value in tree_leaves(made) if isinstance(value, OnDevice)]
        fresh = [value.untyped_storage().data_ptr() not in known for value in outputs]
        self.fresh += [value for value, is_fresh in zip(outputs, fresh, strict=True) if is_fresh]
        mutates = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        if not any(fresh) and not mutates:
            return  # a view

        def again() -> None:
            found = [value.held for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, OnDevice)]
            for target, value, is_fresh in zip(outputs, found, fresh, strict=True):
                if is_fresh:
                    target.copy_(value)

        self.steps.append(again)

    def undo(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)


class RecordedGraphs:
    """In place of `CudaGraphs`."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.fails: Callable[[], BaseException | None] = lambda: None

    def aside(self, work: Work) -> None:
        work()

    def capture(self, work: Work) -> Work:
        if (error := self.fails()) is not None:
            raise error
        notes, _Notes.current = _Notes(), None
        try:
            _Notes.current = notes
            with notes:
                work()
        finally:
            _Notes.current = None
            notes.undo()
        self.captures += 1
        steps, fresh = notes.steps, notes.fresh
        _spoil(fresh)

        def replay() -> None:
            self.replays += 1
            for step in steps:
                step()
            _spoil(fresh)

        return replay


def _spoil(tensors: list[Tensor]) -> None:
    for value in tensors:
        if value.is_floating_point():
            value.fill_(torch.nan)
        elif value.dtype != torch.bool:
            value.fill_(-7)


class PolledSet(DeviceSet):
    """As with the compiled kernel: the device writes the host's word in the order of its work, by replays, too. What
    the host sees of it is `delay()` writes old."""

    delay: Callable[[], int] = staticmethod(lambda: 0)

    def __init__(self, lanes: int, device: torch.device) -> None:
        self._shown = [0]
        with PretendDevice():
            super().__init__(lanes, device, backend="reference", word=self)

    def post(self, word: Tensor) -> None:
        def write() -> None:
            self._shown.append(int(word.held))

        if _Notes.current is None:
            write()
        else:
            _Notes.current.steps.append(write)

    def read(self) -> int:
        return self._shown[max(0, len(self._shown) - 1 - self.delay())]

    def wait(self, layer: int) -> int:
        waited, self.delay = self.delay, lambda: 0
        try:
            return self.seen().count
        finally:
            self.delay = waited


@contextmanager
def recorded(monkeypatch, graphs: RecordedGraphs | None = None, delay: Callable[[], int] | None = None):
    """Forward passes in here, on the pretended device, capture with `graphs`."""
    from adadiff.forward import spaces

    graphs = graphs or RecordedGraphs()
    own = type("Set", (PolledSet,), {"delay": staticmethod(delay)}) if delay else PolledSet
    with monkeypatch.context() as patched:
        patched.setattr(spaces, "graphs_on", lambda device: graphs)
        patched.setattr(spaces, "DeviceSet", own)
        patched.setattr(spaces, "_spaces", type(spaces._spaces)())
        yield graphs
