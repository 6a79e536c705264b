"""Reuse in a diffusers transformer: lanes may take the rest of the network from an earlier step.

One interceptor wraps the transformer, and one each of its blocks; the transformer's own `forward` runs in between. The
first blocks run for all lanes; then the policy decides which lanes reuse. The following blocks run on the other lanes
only, and write their rows back in place. Rows of reusing lanes are undefined until the last of these blocks, which
gives them its list's input plus what the list added at the lane's last full step.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..policies.reuse import ESTIMATE, ReusePolicy, check_reuse_policy
from .adapters import AdapterWatch
from .block_call import BlockCall, Call
from .conditioning import alike, broken_lanes, conditioning, tracked
from .families import SAMPLE, TIME, family_of
from .lane_cache import LaneCache
from .layout import BlockId, Layout, argument, find_lists, has_time, named
from .private import (
    CompileGuard,
    ContextProbe,
    Interceptor,
    block_refused,
    calling_pipeline,
    transformer_refused,
)
from .record import ReuseRecord, StepRecord
from .runs import RunWatch, Visit, identical_parts

MOST = 32  # call sites and shapes that are kept


class _Note:
    """A hook that records the input of the first attention in a list's first block. Copies of it do nothing."""

    def __init__(self, reused: "ReusedTransformer | None"):
        self._reused = reused

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        call = None if self._reused is None else self._reused.running
        if call is not None and call.attention_input is None:
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            call.attention_input = values[0].clone() if values else None


class ReusedTransformer:
    """Enables reuse on a transformer; created by `enable`, undone by `remove`. name: for messages. blocks: names of
    block lists; None: those of its family. Raises ValueError if the transformer or the policy does not fit."""

    def __init__(
        self,
        transformer: nn.Module,
        policy: ReusePolicy,
        spelled: str,
        name: str,
        blocks: Sequence[str] | None,
        tied: bool,
        pipe: Any,
    ):
        self.family, self.policy, self.tied = family_of(transformer), policy, tied
        kind = type(transformer).__name__
        if self.family.refused:
            raise ValueError(f"{kind} cannot skip blocks by sample: {self.family.refused}")
        check_reuse_policy(policy)
        if policy.gate == ESTIMATE:
            raise ValueError(
                f"'{policy}' is for adadiff's own models; `adadiff.calibrate` chooses thresholds for pipelines"
            )
        names = self.family.blocks if blocks is None else [blocks] if isinstance(blocks, str) else blocks
        self._lists = find_lists(transformer, names, given=blocks is not None)
        if not has_time(transformer):
            raise ValueError(f"{kind} takes none of {', '.join(TIME)}, so the start of a run cannot be detected")
        count = sum(map(len, self._lists.values()))
        if policy.first + policy.last >= count:
            raise ValueError(f"'{policy}' leaves nothing out: {name} has {count} blocks")
        self.name, self.record = name, ReuseRecord(name, spelled, count)
        self._layouts: dict[Any, Layout] = {}
        self._caches: dict[Any, LaneCache] = {}
        self._checked, self._probed = set[Any](), set[Any]()
        self._insides: list[Any] = []
        self._tells = True  # whether the check in this call can detect leaks between lanes
        self._watch, self._adapters = RunWatch(pipe, self.family.rising), AdapterWatch()
        self.running: Call | None = None
        self._lock = threading.Lock()  # held during a call
        self._check(transformer, new_run=True)
        self._watched = self._watch_attention() if policy.gate == "input" else []
        self._context = ContextProbe.put(transformer)
        CompileGuard.put(transformer)
        self._root = Interceptor(transformer, self._run)
        self._blocks = {
            BlockId(list_name, i): Interceptor(block, self._run_block, BlockId(list_name, i))
            for list_name, blocks_of in self._lists.items()
            for i, block in enumerate(blocks_of)
        }
        transformer._adadiff = self

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copy of the transformer is not enabled

    def __reduce__(self) -> tuple:
        return _nothing, ()  # nor is one that is saved as a whole

    def _watch_attention(self) -> list[Any]:
        """Hooks that record the input of the first attention in each list's first block."""

        found = [_attention(blocks[0]) for blocks in self._lists.values()]
        if None in found:
            raise ValueError(f"gate=input finds no attention in {self.name}; use gate=residual")
        return [module.register_forward_pre_hook(_Note(self), with_kwargs=True) for module in found]

    def remove(self) -> None:
        for handle in self._watched:
            handle.remove()
        for interceptor in (*self._blocks.values(), self._root):
            interceptor.remove()
        transformer = self._root.module
        ContextProbe.take(transformer)
        CompileGuard.take(transformer)
        transformer.__dict__.pop("_adadiff", None)
        self.reset()
        self.record.check_acted()

    def reset(self) -> None:
        """Drops all cached features: the next call begins a run."""
        self._caches.clear()
        self._watch.reset()

    # ---- a call of the transformer ----

    @torch.compiler.disable
    def _run(self, root: Interceptor, args: tuple, kwargs: dict) -> Any:
        start, module = time.perf_counter(), root.module
        if not self._lock.acquire(blocking=False):
            raise ValueError(f"{self.name} is called while another call of it runs; use a copy for each thread")
        try:
            arguments = named(module, args, kwargs)
            self.running = call = self._begin(module, arguments)
            output = root.call(*args, **kwargs)
            self._end(call, output, time.perf_counter() - start)
        except BaseException:
            self.reset()
            raise
        finally:
            self.running = None
            self._lock.release()
        return output

    def _begin(self, module: nn.Module, arguments: Mapping[str, Any]) -> Call:
        if torch.is_grad_enabled() and (tracked(arguments) or any(p.requires_grad for p in module.parameters())):
            raise ValueError(f"{self.name} has gradients to track; call it under torch.no_grad(), or disable it")
        sample = argument(arguments, SAMPLE)
        if not isinstance(sample, Tensor | list | tuple):
            raise ValueError(f"{self.name} was called without hidden states")
        B = len(sample)
        t = _times(argument(arguments, TIME), B)
        context = self._context.name
        visit = self._watch.visit(context, described(arguments), t, sample, calling_pipeline(module))
        if visit.new_run:
            self._caches.clear()
            self.record.new_run()
        if self._adapters.changed(module, arguments):  # cached features came from other adapters
            for kept in self._caches.values():
                kept.forget()
        key = visit.key
        fresh = visit.new_run or key not in self._caches
        self._check(module, new_run=fresh)
        if fresh and not _identical(insides := _insides(self._lists), self._insides):
            self._insides = insides
            self._checked.clear()
        if self.tied:
            self._check_tied(B, visit, sample if fresh else None)
        cache = self._caches.setdefault(key, LaneCache(B))
        while len(self._caches) > MOST:
            self._caches.pop(next(iter(self._caches)))
        look = B, described(arguments, lengths=False)
        check = fresh and look not in self._checked
        if check:  # with B equal lanes the check could not detect a leak
            self._tells = B == 1 or not alike(arguments, B)
        return Call(
            policy=self.policy,
            family=self.family,
            B=B,
            t=t,
            visit=visit,
            cache=cache,
            layout=None if check else self._layouts.get(visit.shapes),  # blocks are checked when it is learned
            look=look,
            check=check,
            conditioning=conditioning(arguments, B),
            steps_left=self._watch.steps_left() if self.policy.needs_steps_left else None,
            tied=self.tied,
            name=self.name,
            probe=visit.shapes not in self._probed,
            compiled=any(one.compiled is not None for one in self._blocks.values()),
        )

    def _check_tied(self, B: int, visit: Visit, sample: Any) -> None:
        """Raises ValueError unless the call holds both guidance halves of the same samples. sample: by lane; None: not
        compared again."""
        wrong = None
        if B % 2 or visit.context not in ("", "cond_uncond"):
            wrong = f"this one has {B} lanes of {visit.context!r}"
        elif visit.call:
            wrong = "this pipeline makes several calls a step"
        elif getattr(self._watch.pipe(), "do_classifier_free_guidance", True) is False:
            wrong = "this pipeline runs without guidance"
        elif sample is not None and not identical_parts(sample[: B // 2], sample[B // 2 :]):
            wrong = "lanes of the second half of this one have other samples than those of the first"
        if wrong is not None:
            raise ValueError(f"tied needs both halves in one call of twice the batch, {wrong}; use tied=False")

    def _check(self, module: nn.Module, new_run: bool) -> None:
        wrong = transformer_refused(module)
        blocks = [block for blocks in self._lists.values() for block in blocks]
        if wrong is None and new_run:
            wrong = block_refused(iter(blocks))
        if wrong is not None:
            raise ValueError(f"{self.name} cannot skip blocks: {wrong}")
        if not hasattr(self, "_blocks"):
            return
        now = find_lists(module, tuple(self._lists), given=True)
        there = {BlockId(name, i): block for name, blocks_of in now.items() for i, block in enumerate(blocks_of)}
        if there.keys() != self._blocks.keys() or any(there[k] is not v.module for k, v in self._blocks.items()):
            raise ValueError(f"{self.name} has other blocks now; call disable, then enable")
        for block, interceptor in self._blocks.items():
            interceptor.intact()
            if self._watched and block.index == 0 and interceptor.compiled is not None:
                raise ValueError("gate=input cannot read inside compiled blocks; use gate=residual")

    def _run_block(self, block: Interceptor, args: tuple, kwargs: dict) -> Any:
        call = self.running
        if call is None:  # the block is called outside the transformer
            return block.call(*args, **kwargs)
        return BlockCall(call, block, named(block.module, args, kwargs), len(args)).run()

    def _end(self, call: Call, output: Any, seconds: float) -> None:
        layout = call.finish()
        if call.rows is not None and call.probe:
            if call.decision is not None and broken_lanes(output, call.B)[call.decision.reuse].any():
                raise ValueError(
                    f"{self.name} cannot skip blocks: it reads outputs of inner blocks outside of the blocks"
                )
            self._probed.add(call.visit.shapes)
        if layout is None:  # blocks ran in another order than before (all lanes in full): drop the cache
            self._caches.pop(call.visit.key, None)
        elif call.layout is None:
            while len(self._layouts) >= MOST:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[call.visit.shapes] = layout
            self._probed.discard(call.visit.shapes)
            if call.check and self._tells:
                self._checked.add(call.look)
        ran = call.blocks_run()
        self.record.num_blocks = len(call.sequence)
        self.record.cache_bytes = sum(cache.bytes() for cache in self._caches.values())
        full = torch.ones(call.B, dtype=torch.bool, device="cpu") if call.decision is None else ~call.decision.reuse
        change = None if call.decision is None else call.decision.change
        visit = call.visit
        self.record.add(StepRecord(visit.context, visit.call, call.step, call.t, full, change, ran, seconds))


def _nothing() -> None:
    return None


def can_reuse(module: nn.Module) -> bool:
    """Whether the module has a time argument and blocks in lists, as a diffusion transformer has."""
    family = family_of(module)
    if family.refused or not has_time(module):
        return False
    try:
        return bool(find_lists(module, family.blocks, given=False))
    except ValueError:
        return False


def _insides(lists: Mapping[str, nn.ModuleList]) -> list[Any]:
    """The parts of blocks that may be replaced while the modules stay: forward methods and attention processors."""
    return [
        part
        for blocks in lists.values()
        for block in blocks
        for module in block.modules()
        for part in (type(module).forward, module.__dict__.get("forward"), getattr(module, "processor", None))
    ]


def _identical(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(one is two for one, two in zip(a, b, strict=True))


def _attention(block: nn.Module) -> nn.Module | None:
    return next((m for m in block.modules() if "Att" in type(m).__name__ and m is not block), None)


def _times(value: Any, B: int) -> Tensor:
    """The time of each lane, float64 [B] on the CPU."""
    if value is None:
        raise ValueError("a call without a time: the start of a run cannot be detected")
    times = (
        (value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")).cpu().double()
    )
    if times.ndim and len(times) == B and times.numel():
        return times.reshape(B, -1).amax(1)
    return times.max().expand(B).clone()


def described(value: Any, lengths: bool = True) -> Any:
    """A key that distinguishes call sites: dtypes, devices, settings that are not numbers, and shapes (without
    `lengths`: only the number of dimensions)."""
    if isinstance(value, Tensor):
        return tuple(value.shape) if lengths else value.ndim, value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((key, described(one, lengths)) for key, one in value.items() if key not in TIME)
    if isinstance(value, tuple | list):
        return tuple(one if isinstance(one, int) else described(one, lengths) for one in value)
    return value if value is None or isinstance(value, bool | str) else type(value).__name__
