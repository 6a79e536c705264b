"""A device for machines that have none: real values computed on the CPU, and the manners of a GPU.

Inside `PretendDevice`, tensors made with device=DEVICE say that they lie there. Operators that mix devices raise, as
they would; with `strict`, so does whatever would make the host wait: reading a value, copying other than from pinned
memory, indexing with a mask or from another device. It goes by the name that PyTorch keeps for backends of others,
since a PyTorch built without CUDA has no place for tensors of that.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = torch.device("privateuseone", 0)
backend_registration._setup_privateuseone_for_python_backend()
READS = {  # the host wants a value, or a shape that depends on values
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.repeat_interleave,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Waits(RuntimeError):
    """The host would wait for the device."""


class OnDevice(Tensor):
    """Says that it lies on the device; `held` has the values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # printing would read values
        return f"OnDevice({self.held!r})"

    def tolist(self) -> list:  # PyTorch's own refuses to look into others' tensors
        self.sum().item()  # waits, or may not
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of PretendDevice")


class TensorsMadeFromValues(TorchFunctionMode):
    """`torch.tensor(..., device=DEVICE)`, which does not come by where operators do: `move` takes it there."""

    def __init__(self, move: Callable[[Tensor], Tensor]):
        super().__init__()
        self._move = move

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not torch.tensor or torch.device(kwargs.get("device") or "cpu").type != DEVICE.type:
            return func(*args, **kwargs)
        return self._move(func(*args, **kwargs | {"device": "cpu"}))


class PretendDevice(TorchDispatchMode):
    def __init__(self, strict: bool = False):
        super().__init__()
        self.strict = strict
        self._pinned: set[int] = set()  # storages; kept alive, so that no other gets their address
        self._kept: list[Tensor] = []
        self._makes = TensorsMadeFromValues(lambda value: value.to(DEVICE))

    def __enter__(self) -> "PretendDevice":
        self._makes.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._makes.__exit__(*error)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """What an operator is made of comes by here, too."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with self._again():  # in inference mode operators made of others come as they are
            if (made := func.decompose(*args, **kwargs)) is not NotImplemented:
                return made
        name = func.overloadpacket
        flat = list(_tensors(args, *kwargs.values()))
        there = any(isinstance(value, OnDevice) for value in flat)
        if name is aten._fused_sdp_choice and there:
            return 0  # the plain implementation: the others have kernels for one kind of device
        if name is aten._pin_memory:
            pinned = args[0].clone(memory_format=torch.contiguous_format)
            self._pinned.add(pinned.untyped_storage().data_ptr())
            self._kept.append(pinned)
            return pinned
        if name is aten.is_pinned:
            return self._is_pinned(args[0])
        if name is aten._to_copy:
            return self._copied(func, args[0], kwargs)
        if name is aten.copy_:
            target, source = args[:2]
            self._check_copy(target, source, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            func(_held(target), _held(source))
            return target
        if there:
            self._check(name, args, flat)
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == DEVICE.type:
            there, kwargs["device"] = True, torch.device("cpu")
            if kwargs.pop("pin_memory", False):
                raise RuntimeError("only memory of the CPU can be pinned")
        elif kwargs.pop("pin_memory", False):
            made = func(*args, **kwargs)
            self._pinned.add(made.untyped_storage().data_ptr())
            self._kept.append(made)
            return made
        return _shown(func, args, kwargs, there)

    def _check(self, name: Any, args: tuple, flat: list[Tensor]) -> None:
        if self.strict and name in READS:
            raise Waits(f"{name} waits for the device")
        if name in INDEXED:
            own, indices = isinstance(args[0], OnDevice), [i for i in args[1] if i is not None]
            if not own and any(isinstance(i, OnDevice) for i in indices):
                raise RuntimeError("indices must lie on the CPU, as the indexed tensor does")
            if self.strict and any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                raise Waits(f"{name} with a mask waits for the device")
            if self.strict and not all(isinstance(i, OnDevice) for i in indices):
                raise Waits(f"{name} with indices of the CPU waits for the device")
            flat = [args[0], *args[2:3]]
        devices = {value.device for value in flat if value.dim() or isinstance(value, OnDevice)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: tensors on {devices}")

    def _check_copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        if self.strict and isinstance(target, OnDevice) != isinstance(source, OnDevice):
            host = source if isinstance(target, OnDevice) else target
            if not (non_blocking and self._is_pinned(host)):
                raise Waits("a copy between host and device waits")

    def _copied(self, func: Callable, source: Tensor, kwargs: dict) -> Tensor:
        device = kwargs.pop("device", None)
        non_blocking = kwargs.pop("non_blocking", False)
        to_device = isinstance(source, OnDevice) if device is None else torch.device(device).type == DEVICE.type
        queued = to_device and non_blocking and self._is_pinned(source)
        if self.strict and to_device != isinstance(source, OnDevice) and not queued:
            raise Waits("a copy between host and device waits")
        made = func(_held(source), **kwargs)
        return OnDevice(made) if to_device else made

    def _is_pinned(self, value: Tensor) -> bool:
        return not isinstance(value, OnDevice) and value.untyped_storage().data_ptr() in self._pinned


def _held(value: object) -> object:
    return value.held if isinstance(value, OnDevice) else value


def _tensors(*values: object) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(*value)


def _mapped(function: Callable[[object], object], value: object) -> object:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, item) for item in value)
    return function(value)


def _shown(func: Callable, args: tuple, kwargs: dict, there: bool) -> object:
    """What func makes of the values; tensors that it returns as they are, are the ones given."""
    given = {id(v.held): v for v in _tensors(args, *kwargs.values()) if isinstance(v, OnDevice)}
    made = func(*_mapped(_held, args), **{name: _mapped(_held, value) for name, value in kwargs.items()})

    def show(value: object) -> object:
        if not isinstance(value, Tensor) or not there:
            return value
        if id(value) in given:
            return given[id(value)]
        with torch.inference_mode(value.is_inference()):  # views of others than inference tensors are none either
            return OnDevice(value)

    return _mapped(show, made)


def moved(what: nn.Module | Tensor, move: Callable[[Tensor], Tensor] = OnDevice) -> nn.Module | Tensor:
    """A copy with its values, or a module's weights, elsewhere: on the pretended device."""
    if isinstance(what, Tensor):
        return move(what)
    made = copy.deepcopy(what)
    for part in made.modules():
        part._parameters.update({name: move(v.detach()) for name, v in part._parameters.items() if v is not None})
    return made


def elsewhere(what: Any, move: Callable[[Tensor], Tensor] = OnDevice) -> SimpleNamespace:
    """The network and the exits of a case on the pretended device."""
    return SimpleNamespace(backbone=moved(what.backbone, move), exits=moved(what.exits, move))
