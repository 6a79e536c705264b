"""Two methods that learn which parts of a frozen network to leave out, trained here on samples that the network draws.

Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733; horseee/learning-to-cache): on every second step, a branch
may be replaced by its output on the step before. Which ones is a table by step and branch, the same for all samples.
Elastic-DiT (arXiv 2602.13993; wangjiangshan0725/Elastic-DiT, qwen_image_dit.py): a router before each block decides
from the hidden states and the timestep whether the block runs. Its released code takes the mean over the batch. Its
narrow MLPs and its cache are left out: its rule is compared here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadiff.models.interface import Backbone, Block
from benchmarks.baselines.walk import Lanes, computed, walk

OutputOf = Callable[[int, Callable[[], Tensor]], Tensor]
UPDATES = 1500
BATCH = 16
LR = {"l2c": 0.02, "elastic": 1e-3}
RUN_ABOVE = 0.1  # Learning-to-Cache: a branch runs if its score is above
OPEN = 0.7  # Elastic-DiT: probability of each block at the start
HIDDEN = 128  # Elastic-DiT: channels in a router


@dataclass(frozen=True)
class Trajectories:
    """Runs of the full network to train on. x: [steps, n, C, H, W], the input of each step; t: float [steps]; labels:
    int64 [n]."""

    x: Tensor
    t: Tensor
    labels: Tensor

    def take(self, step: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of the network: x, t, labels of some samples."""
        return self.x[step, rows], self.t[step].expand(len(rows)), self.labels[rows]


def by_branch(backbone: Backbone, x: Tensor, t: Tensor, context: Tensor | None, output_of: OutputOf) -> Tensor:
    """The network with the output of each branch, before its gate, taken from output_of(number, compute)."""
    numbers = count()

    def step(_: int, block: Block, rows: Tensor, skip: Tensor | None, lanes: Lanes) -> Tensor:
        if skip is not None:
            rows = block.join(rows, skip)
        for branch in block.branches:
            output, gate = output_of(next(numbers), partial(computed, branch, rows, lanes)), branch.gate(lanes.cond)
            rows = rows + output if gate is None else torch.addcmul(rows, gate[:, None], output)
        return rows

    return walk(backbone, x, t, context, step)


class Caching:
    """Learning-to-Cache for one batch in lockstep. runs: bool [steps, branches]; on even steps all run."""

    def __init__(self, backbone: Backbone, runs: Tensor):
        self._backbone, self._runs = backbone, runs.tolist()
        self._step = 0
        self._kept: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        runs, odd = self._runs[self._step], self._step % 2 == 1
        self._step += 1
        if odd:
            output_of = lambda number, compute: compute() if runs[number] else self._kept[number]  # noqa: E731
        else:
            output_of = _kept_in(self._kept)
        return by_branch(self._backbone, x, t, context, output_of)


def _kept_in(kept: dict[int, Tensor]) -> OutputOf:
    def output_of(number: int, compute: Callable[[], Tensor]) -> Tensor:
        kept[number] = compute()
        return kept[number]

    return output_of


def learn_to_cache(backbone: Backbone, drawn: Trajectories, weight: float, seed: int = 0) -> Tensor:
    """Which branches run: bool [steps, branches]. weight: of the sum of a step's scores, beside the squared error of
    the prediction to the full network's."""
    generator = torch.Generator().manual_seed(seed)
    steps, branches = len(drawn.t), sum(len(block.branches) for block in backbone.blocks)
    logits = torch.randn(steps, branches, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([logits], LR["l2c"])
    for _ in range(UPDATES):
        step = 1 + 2 * int(torch.randint(steps // 2, (), generator=generator))
        rows = torch.randint(len(drawn.labels), (BATCH,), generator=generator)
        kept: dict[int, Tensor] = {}
        with torch.no_grad():
            by_branch(backbone, *drawn.take(step - 1, rows), _kept_in(kept))
            wanted = backbone(*drawn.take(step, rows))
        scores = logits[step].sigmoid()
        mixed = lambda number, compute: torch.lerp(kept[number], compute(), scores[number])  # noqa: B023, E731
        found = by_branch(backbone, *drawn.take(step, rows), mixed)
        loss = (found - wanted).square().mean() + weight * scores.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    runs = logits.detach().sigmoid() > RUN_ABOVE
    runs[0::2] = True
    return runs


class Router(nn.Module):
    """Rows [B, T, D] and time [B, Dt] -> logit [B] that the block runs: the normalised rows, modulated by the time."""

    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.modulation = nn.Linear(time_dim, 2 * dim)
        self.first, self.last = nn.Linear(dim, HIDDEN), nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.normal_(self.last.weight, std=1e-3)
        nn.init.constant_(self.last.bias, torch.logit(torch.tensor(OPEN)).item())

    def forward(self, rows: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(time)).chunk(2, dim=-1)
        normed = F.layer_norm(rows, rows.shape[-1:]).mean(1)
        return self.last(self.first(normed * (1 + scale) + shift).relu()).squeeze(1)


class Routing:
    """Elastic-DiT's rule: a block runs for the whole batch if the mean of its probabilities is at least one half."""

    def __init__(self, backbone: Backbone, routers: nn.ModuleList):
        self._backbone, self._routers = backbone, routers

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        def step(number: int, block: Block, rows: Tensor, skip: Tensor | None, lanes: Lanes) -> Tensor:
            probability = self._routers[number](rows, lanes.cond.time).sigmoid().mean()
            return block(rows, lanes.cond, skip) if float(probability) >= 0.5 else rows

        return walk(self._backbone, x, t, context, step)


def learn_to_route(backbone: Backbone, drawn: Trajectories, share: float, seed: int = 0) -> nn.ModuleList:
    """share: wanted mean of the probabilities. The loss is that of the released code, with the full network's
    prediction as the target: the squared error, and the squared distance from the share."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        routers = nn.ModuleList(Router(backbone.dim, backbone.time_dim) for _ in backbone.blocks)
    optimizer = torch.optim.Adam(routers.parameters(), LR["elastic"])
    for _ in range(UPDATES):
        step = int(torch.randint(len(drawn.t), (), generator=generator))
        given = drawn.take(step, torch.randint(len(drawn.labels), (BATCH,), generator=generator))
        with torch.no_grad():
            wanted = backbone(*given)
        found, probability = _straight_through(backbone, routers, *given)
        loss = (found - wanted).square().mean() + (probability - share).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return routers.requires_grad_(False)


def _straight_through(
    backbone: Backbone, routers: nn.ModuleList, x: Tensor, t: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The prediction if each sample runs a block where its own probability is above one half, and the mean probability.
    The gradient of a decision is that of its probability."""
    probabilities: list[Tensor] = []

    def step(number: int, block: Block, rows: Tensor, skip: Tensor | None, lanes: Lanes) -> Tensor:
        probability = routers[number](rows, lanes.cond.time).sigmoid()
        probabilities.append(probability)
        hard = (probability > 0.5).to(probability.dtype)
        gate = hard.detach() + probability - probability.detach()
        return torch.lerp(rows, block(rows, lanes.cond, skip), gate[:, None, None])

    return walk(backbone, x, t, context, step), torch.stack(probabilities).mean()


def routers_from(tensors: dict[str, Tensor], backbone: Backbone) -> nn.ModuleList:
    routers = nn.ModuleList(Router(backbone.dim, backbone.time_dim) for _ in backbone.blocks)
    routers.load_state_dict(tensors)
    return routers.requires_grad_(False).eval()
