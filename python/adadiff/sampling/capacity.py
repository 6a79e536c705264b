"""Memory of a forward pass beside the weights, and the number of lanes that fit into a given number of bytes."""

import math
import re
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..forward.forward import forward
from ..forward.options import ExecutionOptions
from ..forward.rest_of_network import reuse_bytes
from ..forward.structure import structure_of
from ..model import Model
from ..policies.exits import Full, Replay
from .sample_batch import SampleBatch, whole

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
STATES = 9  # float32 states per sample: x, base, three of history, and those kept by this step and the next
CONTEXTS = 3  # contexts per sample: its own, the unconditional one, and the gathered one


def capacity_of(model: Model, capacity: int | str) -> int:
    """The capacity in lanes: a number as it is; for bytes such as "512MiB", as many lanes as fit (a few forward passes
    are run to measure).

    Raises ValueError for another spelling, and if not even one lane fits.
    """
    if not isinstance(capacity, str):
        whole("capacity", capacity, 1)
        return capacity
    spelling = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]iB)", capacity)
    if not spelling:
        raise ValueError(f"capacity is a number of lanes or bytes such as '512MiB' or '2GiB', got {capacity!r}")
    budget = float(spelling[1]) * UNITS[spelling[2]]
    each, shared, group = lane_bytes(model)
    lanes = int(budget // (each + shared))
    if lanes > group:  # blocks run one group of lanes at a time
        lanes = int((budget - shared * group) // each)
    if lanes < 1:
        raise ValueError(f"one lane of this model takes {(each + shared) / 2**20:.1f} MiB, more than {capacity}")
    return lanes


def lane_bytes(model: Model) -> tuple[int, int, int]:
    """Bytes that a lane takes all the time, further bytes while a block runs it, and lanes that a block runs at a
    time."""
    backbone = model.backbone
    parameter = next(backbone.parameters())
    # on a device, measure the mode that needs most memory: a head for every lane
    on_cpu = parameter.device.type == "cpu"
    execution = ExecutionOptions(group_size=1) if on_cpu else ExecutionOptions(count_sync="lagged")

    def peak(n: int) -> int:
        x = torch.zeros(n, *backbone.sample_shape, dtype=parameter.dtype, device=parameter.device)
        t = torch.zeros(n, dtype=torch.float32, device=parameter.device)
        context, last = _context(model, n, parameter), torch.full_like(t, model.num_layers)
        own = {"policy": Full()} if model.exits is None else {"policy": Replay(), "threshold": last}
        return peak_bytes(lambda: forward(model, x, t, context, execution=execution, **own))

    peak(1)  # first allocate what is kept for all passes
    one, two = peak(1), peak(2)
    # on a device a block runs all lanes at once, and memory independent of their number, such as stacked heads, counts
    # once
    group = structure_of(backbone).group_size if on_cpu else 1
    context = one_context(model)
    kept = STATES * 4 * math.prod(backbone.sample_shape) + (CONTEXTS * context.nbytes if context is not None else 0)
    return two - one + kept, max(0, 2 * one - two), group


class Rooms:
    """The share of a capacity that requests take, in lanes. If the capacity was given in bytes, a request that reuses
    earlier steps counts for more than its lanes, by the memory of its cached features."""

    def __init__(self, model: Model, capacity: int | str) -> None:
        self._model, self._in_bytes = model, isinstance(capacity, str)
        self._each: int | None = None

    def of(self, samples: SampleBatch) -> float:
        policy, model = samples.parts.reuse, self._model
        if policy is None or not self._in_bytes:
            return samples.lanes
        if self._each is None:
            self._each = lane_bytes(model)[0]
        more = reuse_bytes(policy, model.backbone, model.exits is not None, next(model.parameters()).dtype)
        return samples.lanes * (1 + more / self._each)


def one_context(model: Model) -> Tensor | None:
    """A context of one lane for the model: a label, int64 [1], text, [1, N, E], or None."""
    return _context(model, 1, next(model.backbone.parameters()))


def _context(model: Model, n: int, like: Tensor) -> Tensor | None:
    network = model.config.network
    if network.context_tokens:
        return like.new_zeros(n, network.context_tokens, network.context_dim)
    return torch.zeros(n, dtype=torch.int64, device=like.device) if network.num_classes else None


def peak_bytes(call: Callable[[], object]) -> int:
    """The peak, in bytes, of live tensors that operators returned during `call`."""
    with torch.inference_mode(), _LiveBytes() as mode:
        call()
    return mode.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages returned by operators, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._see((args, kwargs), ours=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, ours=True)
        return out

    def _see(self, values: object, ours: bool) -> None:
        """Counts new storages if ours. Storages first seen as arguments existed before (weights, inputs): 0 bytes."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    size = storage.nbytes() if ours else 0
                    self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._free(key, size))
                    self.live += size
                    self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size
