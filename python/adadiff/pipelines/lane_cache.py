"""The cached features of B lanes from step to step, and the decision which lanes reuse them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..forward.rest_of_network import mean_abs
from ..policies.reuse import ReuseContext, ReusePolicy
from .compaction import Rows, version
from .kept_rest import KeptRest


@dataclass(frozen=True)
class Decision:
    """The decision in one call, on the CPU. reuse: bool [B]; change: float32 [B], None without a gate. age: int64 [B],
    steps since the last full step; grows: bool [B], lanes of which it is comparable with this step."""

    reuse: Tensor
    change: Tensor | None
    age: Tensor
    grows: Tensor


@dataclass
class LaneCache:
    """The cache of the lanes of one call site of a pipeline, in one run.

    age: int64 [B], on the CPU, steps since the last full step; written: bool [B], whether there was one.
    reference, norm: the gate's input at each lane's last full step (with gate "input": at the previous step), and its
    mean absolute value; total: float32 [B], for gate "input" the change summed up since the last full step.
    rest: by (segment, p), what the skippable blocks of a segment added to output p.
    """

    B: int
    step: int = 0
    reference: Tensor | None = None
    norm: Tensor | None = None
    total: Tensor | None = None
    conditioning: tuple[Any, ...] = ()
    rest: dict[tuple[str, int], KeptRest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.age = torch.zeros(self.B, dtype=torch.int64, device="cpu")
        self.written = torch.zeros(self.B, dtype=torch.bool, device="cpu")

    def forget(self) -> None:
        """Invalidates the cache: all lanes run in full at their next step. The step count continues."""
        self.written = torch.zeros_like(self.written)

    def bytes(self) -> int:
        reference = 0 if self.reference is None else self.reference.numel() * self.reference.element_size()
        return reference + sum(rest.bytes() for rest in self.rest.values())

    def decide(
        self,
        policy: ReusePolicy,
        gate: Tensor | None,
        output: Tensor,
        conditioning: Sequence[Any],
        t: Tensor,
        steps_left: int | None,
        tied: bool,
    ) -> Decision:
        """Decides which lanes reuse in this step, and updates the cache's state. gate: [B, ...], the gate's input;
        output: [B, ...], of the first blocks; t: float [B], on the CPU.

        Makes one transfer from the device. A lane runs in full if it has nothing to reuse, if its conditioning has
        changed since the previous step, and if its change is NaN. Raises ValueError if the policy returns anything but
        bool [B].
        """
        both = torch.stack([self._change(policy, gate, output), _same(conditioning, self.conditioning, output)]).cpu()
        change, same = both[0], both[1] == 1
        left = None if steps_left is None else torch.full_like(self.age, steps_left)
        context = ReuseContext(torch.full_like(self.age, self.step), self.age.clone(), left, t.clone())
        usable = self.written & same & ~change.isnan()
        mask = policy.reuse_mask(change.where(usable, torch.nan) if policy.gate else None, context)
        if not isinstance(mask, Tensor) or mask.shape != (self.B,) or mask.dtype != torch.bool:
            given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"{policy} must return a tensor bool [{self.B}], got {given}")
        reuse = mask.cpu() & usable
        if tied:
            first, second = reuse.view(2, -1)
            reuse = (first & second).repeat(2)
        decision = Decision(reuse, change if policy.gate else None, self.age.clone(), self.written & same)
        self._note(policy, gate, reuse)
        self.conditioning = tuple(conditioning)
        return decision

    def _change(self, policy: ReusePolicy, gate: Tensor | None, output: Tensor) -> Tensor:
        """float32 [B], on the device: the change by the policy's gate; NaN for lanes with NaN."""
        if gate is None:
            return torch.where(output.flatten(1).isnan().any(1), torch.nan, 0.0).float()
        if policy.gate == "input":
            if self.reference is None or self.norm is None or self.total is None:
                self.total = torch.zeros(self.B, dtype=torch.float32, device=gate.device)
            else:
                self.total = self.total + _relative(policy, gate, self.reference, self.norm)
            self.reference, self.norm = gate, mean_abs(gate)
            return torch.where(self.norm.isnan(), torch.nan, self.total)
        if self.reference is None or self.norm is None:
            return torch.where(mean_abs(gate).isnan(), torch.nan, torch.inf)
        return _relative(policy, gate, self.reference, self.norm)

    def _note(self, policy: ReusePolicy, gate: Tensor | None, reuse: Tensor) -> None:
        full = ~reuse
        self.age = torch.where(full, 1, self.age + 1)
        self.written = self.written | full  # not in place: it may be an inference tensor
        self.step += 1
        if gate is None or not bool(full.any()):
            return
        if policy.gate == "input":
            self.total = torch.where(full.to(gate.device), 0.0, self.total)
        elif self.reference is None or self.norm is None or bool(full.all()):
            self.reference, self.norm = gate, mean_abs(gate)
        else:  # whichever moves fewer rows
            rows = Rows(full.nonzero().flatten(), self.B)
            norm = mean_abs(rows.take(gate, 0, 1))
            if 2 * len(rows.lanes) <= self.B:
                rows.put(self.reference, 0, rows.take(gate, 0, 1))
            else:
                others = Rows(reuse.nonzero().flatten(), self.B)
                others.put(gate, 0, others.take(self.reference, 0, 1))
                self.reference = gate
            rows.put(self.norm, 0, norm)


def _relative(policy: ReusePolicy, gate: Tensor, reference: Tensor, norm: Tensor) -> Tensor:
    """float32 [B]: relative change of the gate's input since `reference`; the same for all lanes if the policy decides
    for the whole batch."""
    changed = (gate - reference).abs_().flatten(1).mean(1, dtype=torch.float32)  # no copy
    return (changed.sum() / norm.sum()).expand(len(norm)) if policy.whole_batch else changed / norm


def _same(now: Sequence[Any], then: Sequence[Any], like: Tensor) -> Tensor:
    """float32 [B]: 1 where a lane's conditioning is unchanged (or there is nothing to compare), else 0."""
    B, device = len(like), like.device
    same = torch.ones(B, dtype=torch.bool, device=device)
    if then:
        for a, b in zip(now, then, strict=True):
            same &= _equal(a, b, B).to(device)
    return same.float()


@dataclass(frozen=True)
class Kept:
    """A value and its present version (count of in-place changes)."""

    value: Any
    version: Any

    @staticmethod
    def of(value: Any) -> "Kept":
        return Kept(value, [version(one) for one in value] if isinstance(value, list | tuple) else version(value))


def _equal(now: Kept, then: Kept, B: int) -> Tensor:
    """bool [B]: lanes with equal values."""
    a, b = now.value, then.value
    if isinstance(a, list | tuple):  # a tensor for each lane
        pairs = zip(a, b, now.version, then.version, strict=True)
        return torch.tensor([_one(*pair) for pair in pairs], dtype=torch.bool, device="cpu")
    if a is b:
        return torch.full((B,), now.version == then.version, dtype=torch.bool, device="cpu")
    if a.shape != b.shape:
        return torch.zeros(B, dtype=torch.bool, device="cpu")
    return (a == b).reshape(B, -1).all(1)


def _one(a: Tensor, b: Tensor, new: int | None, old: int | None) -> bool:
    return new == old if a is b else a.shape == b.shape and bool(torch.equal(a, b))
