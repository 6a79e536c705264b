"""Reuse at decisions that a test gives."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adadiff
from adadiff.policies.reuse import ReuseContext, ReusePolicy
from pipelines.zoo import CASES, call, network


@dataclass(frozen=True)
class Scripted(ReusePolicy):
    """full: for each step and lane, whether it runs everything."""

    full: tuple[tuple[bool, ...], ...]
    first: int = 1
    last: int = 0
    order: int = 0

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return ~torch.tensor([self.full[step][i] for i, step in enumerate(context.step.tolist())])

    def __str__(self) -> str:
        return "scripted"

    def column(self, lane: int) -> "Scripted":
        return Scripted(tuple((step[lane],) for step in self.full), self.first, self.last, self.order)


def scripted(pattern: str, steps: int, B: int, first: int = 1, last: int = 0, order: int = 0) -> Scripted:
    """Everybody runs everything at the first step."""
    generator = torch.Generator().manual_seed(11)
    rules = {
        "all": lambda step, lane: True,
        "none": lambda step, lane: False,
        "alternating": lambda step, lane: (step + lane) % 2 == 0,
        "single": lambda step, lane: lane == step % B,
        "random": lambda step, lane: bool(torch.rand(1, generator=generator) < 0.5),
    }
    full = [[True] * B] + [[rules[pattern](step, lane) for lane in range(B)] for step in range(1, steps)]
    return Scripted(tuple(map(tuple, full)), first, last, order)


def enabled(name: str, policy: Any, **settings: Any) -> Any:
    return adadiff.enable(network(name), policy, blocks=CASES[name].blocks, **settings)


def run(name: str, lanes: Sequence[int], steps: int, policy: Any = None, **settings: Any) -> list[list[Tensor]]:
    """The outputs of some steps. Inputs do not depend on them, so that runs can be compared step by step."""
    if policy is None:
        return [call(name, lanes, step) for step in range(steps)]
    enabled(name, policy, **settings)
    try:
        return [call(name, lanes, step) for step in range(steps)]
    finally:
        adadiff.disable(network(name))


def difference(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    """Largest, of all steps."""
    return max(float((x - y).abs().max()) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


def of_lane(outputs: list[list[Tensor]], lane: int) -> list[list[Tensor]]:
    return [[part[lane : lane + 1] for part in parts] for parts in outputs]


class LinearRows:
    """Counts numbers that each Linear of blocks reads."""

    def __init__(self, blocks: Sequence[nn.Module]):
        self.read: dict[int, int] = {}
        self._handles = [
            module.register_forward_pre_hook(self._note)
            for block in blocks
            for module in block.modules()
            if isinstance(module, nn.Linear)
        ]

    def _note(self, module: nn.Module, args: tuple) -> None:
        self.read[id(module)] = self.read.get(id(module), 0) + args[0].numel()

    def __enter__(self) -> "LinearRows":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


B, STEPS = 5, 4
RANDOM = scripted("random", STEPS, B)


def own(name: str) -> nn.Module:
    return copy.deepcopy(network(name))


def with_policy(module: nn.Module, policy: Any, make: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
    adadiff.enable(module, policy)
    try:
        return [make(step) for step in range(STEPS)]
    finally:
        adadiff.disable(module)


def check_rows(name: str, module: nn.Module, more: Callable[[list[int], int], dict[str, Any]]) -> None:
    """Each row of a batch is its run alone, with further arguments of the call."""

    def make(lanes: list[int]) -> Callable[[int], list[Tensor]]:
        return lambda step: call(name, lanes, step, module, **more(lanes, step))

    together = make(list(range(B)))
    plain = [together(step) for step in range(STEPS)]
    outputs = with_policy(module, RANDOM, together)
    assert difference(outputs, plain) > 1e-3
    for lane in range(B):
        alone, solo = make([lane]), of_lane(plain, lane)
        allowed = 2 * max(difference(solo, [alone(step) for step in range(STEPS)]), 1e-6)
        assert difference(of_lane(outputs, lane), with_policy(module, RANDOM.column(lane), alone)) <= allowed
