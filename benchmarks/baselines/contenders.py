"""Our policies, other packages and published methods as contenders: each draws with the same trained network."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import adadiff
from adadiff.models.interface import Backbone
from benchmarks.baselines import others, routers
from benchmarks.baselines.alternatives import calibrate, calibrated_file
from benchmarks.baselines.reuse import Reusing
from benchmarks.baselines.routers import Trajectories
from benchmarks.baselines.sweeps import Networks, Sweep
from benchmarks.baselines.walk import Network
from benchmarks.rows import say
from benchmarks.suites.drawing import (
    Artist,
    Method,
    fingerprint,
    in_engine,
    in_plain_loop,
    kept,
    load,
    lockstep,
    seeds_and_labels,
)

PLAIN = "full network"
SOLVER = "ddim"
EAGER, COMPILED = "eager", "compiled"
SAMPLE, BATCH, FIXED = "each sample", "the batch", "fixed"  # who decides what is left out
TRAINING_RUN = 7  # seeds of the samples on which routers are trained and MagCache's ratios measured
Start = Callable[[], Network]


@dataclass(frozen=True)
class Contender:
    """A method at one setting. Either `method`, drawn by our engine or in the plain loop, or `around`, which wraps a
    network: around(backbone)() is what the loop calls for one batch. blocks: whether it calls whole blocks, which are
    then what is compiled; else branches are."""

    name: str
    setting: str
    decides: str
    steps: int
    method: Method | None = None
    around: Callable[[Backbone], Start] | None = None
    blocks: bool = True

    @property
    def title(self) -> str:
        return f"{self.name}, {self.setting}"


@dataclass(frozen=True)
class Settings:
    """The settings that are tried."""

    steps: int = 20
    fewer: tuple[int, ...] = (6, 8, 10, 14)
    budgets: tuple[float, ...] = (0.55, 0.75)
    thresholds: tuple[float, ...] = (0.08, 0.16, 0.3)  # of caches that compare residuals
    every: tuple[int, ...] = (2, 3, 5)
    mag_thresholds: tuple[float, ...] = (0.06, 0.12, 0.24)
    score_weights: tuple[float, ...] = (1e-5, 1e-4, 1e-3)  # of Learning-to-Cache
    aims: tuple[float, ...] = (0.4, 0.5, 0.6)  # of Elastic-DiT's rule
    trained_on: int = 128  # samples, for all that is trained, calibrated or measured beforehand


@dataclass(frozen=True)
class Contenders:
    """All methods at their settings for a network. model: a shipped name or a file; folder: for what is learnt."""

    model: str
    settings: Settings
    folder: Path

    def all(self) -> Iterator[Contender]:
        """The full network first."""
        yield from self._steps()
        yield from self._policies()
        yield from self._packages()
        yield from self._learnt()

    def _steps(self) -> Iterator[Contender]:
        steps = self.settings.steps
        plain = Method(PLAIN, self.model, steps=steps, solver=SOLVER)
        yield Contender(PLAIN, f"{SOLVER}, {steps} steps", FIXED, steps, plain)
        for solver in (SOLVER, "dpm++2m"):
            for fewer in self.settings.fewer:
                method = dataclasses.replace(plain, steps=fewer, solver=solver)
                yield Contender("fewer steps", f"{solver}, {fewer} steps", FIXED, fewer, method)

    def _policies(self) -> Iterator[Contender]:
        given, file = self.settings, str(self._calibrated())
        for budget in given.budgets:
            yield self._ours("ours, exits", f"exit:budget={budget:g}", SAMPLE, file)
        for threshold in given.thresholds:
            yield self._ours("ours, cache", f"cache:threshold={threshold:g}", SAMPLE)
        for threshold in given.thresholds:
            yield self._ours("ours, extrapolated cache", f"cache:threshold={threshold:g},order=1", SAMPLE)
        for every in given.every:
            yield self._ours("ours, extrapolated reuse", f"reuse:every={every},order=1", FIXED)
        for budget in given.budgets:
            both = f"cache:threshold={given.thresholds[-1]:g}+exit:budget={budget:g}"
            yield self._ours("ours, cache and exits", both, SAMPLE, file)
        for every in given.every:
            yield self._ours("ours, reuse", f"reuse:every={every},level=layer", FIXED)

    def _ours(self, name: str, policy: str, decides: str, file: str | None = None) -> Contender:
        steps = self.settings.steps
        method = Method(name, file or self.model, policy=policy, steps=steps, solver=SOLVER)
        return Contender(name, policy, decides, steps, method)

    def _calibrated(self) -> Path:
        given = self.settings
        sweep = Sweep(
            steps=(given.steps,), between=(), solvers=(SOLVER,), budgets=given.budgets, aims=("faithful",),
            calibrated_on=given.trained_on, estimated=(),
        )  # fmt: skip
        with Artist.of(1) as artist:
            calibrate(Networks(self.model, None, None), sweep, self.folder, artist)
        return calibrated_file(self.model, "faithful", SOLVER, given.steps, sweep, self.folder)

    def _packages(self) -> Iterator[Contender]:
        given = self.settings
        for every in given.every:
            yield self._around("FORA", f"every {every}", FIXED, partial(_reusing, every), blocks=False)
        for threshold in given.thresholds:
            around = partial(others.first_block_cache, threshold)
            yield self._around("diffusers, first-block cache", f"{threshold:g}", BATCH, around)
        ratios = self._mag_ratios()
        for threshold in given.mag_thresholds:
            yield self._around(
                "diffusers, MagCache", f"{threshold:g}", FIXED, partial(others.mag_cache, threshold, ratios)
            )
        for every in given.every:
            yield self._around("diffusers, TaylorSeer", f"every {every}", FIXED, partial(others.taylor_seer, every))
        for taylor, name in ((False, "cache-dit, DBCache"), (True, "cache-dit, DBCache and TaylorSeer")):
            for threshold in given.thresholds:
                around = partial(others.CacheDiT, threshold, given.steps, taylor)
                yield self._around(name, f"{threshold:g}", BATCH, around)

    def _mag_ratios(self) -> list[float]:
        seeds, labels = self._seeds()
        model, steps = load(self.model), self.settings.steps

        def draw(start: Start) -> None:
            lockstep(model.backbone, model.schedule, seeds, labels, steps, len(seeds), SOLVER, start)

        return others.mag_ratios(model.backbone, steps, draw)

    def _learnt(self) -> Iterator[Contender]:
        given, backbone = self.settings, load(self.model).backbone
        for weight in given.score_weights:
            runs = self._tensors(f"cached-{weight:g}", partial(self._learn_to_cache, weight))["runs"]
            setting = f"weight {weight:g}, runs {float(runs.double().mean()):.0%}"
            yield self._around("Learning-to-Cache", setting, FIXED, partial(_caching, runs), blocks=False)
        for aim in given.aims:
            learnt = self._tensors(f"routed-{aim:g}", partial(self._learn_to_route, aim))
            routing = partial(_routing, routers.routers_from(learnt, backbone))
            yield self._around("Elastic-DiT's rule", f"aim {aim:g}", BATCH, routing)

    def _around(
        self, name: str, setting: str, decides: str, around: Callable[[Backbone], Start], blocks: bool = True
    ) -> Contender:
        return Contender(name, setting, decides, self.settings.steps, None, around, blocks)

    def _learn_to_cache(self, weight: float) -> dict[str, Tensor]:
        return {"runs": routers.learn_to_cache(_frozen(self.model), self._trajectories(), weight)}

    def _learn_to_route(self, aim: float) -> dict[str, Tensor]:
        return routers.learn_to_route(_frozen(self.model), self._trajectories(), aim).state_dict()

    def _tensors(self, name: str, learn: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `learn` returns, kept in a file."""
        given = self.settings
        known = f"{fingerprint(self.model)}-{given.steps}-{given.trained_on}-{routers.UPDATES}"

        def told() -> dict[str, Tensor]:
            say(f"training of {name}")
            return learn()

        return kept(self.folder / f"{known}-{name}.safetensors", told)

    @torch.no_grad()
    def _trajectories(self) -> Trajectories:
        """Runs of the full network."""
        model, (seeds, labels) = load(self.model), self._seeds()
        seen: list[tuple[Tensor, Tensor]] = []

        def network(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            seen.append((x.clone(), t[:1].clone()))
            return model.backbone(x, t, context)

        lockstep(
            model.backbone, model.schedule, seeds, labels, self.settings.steps, len(seeds), SOLVER, lambda: network
        )
        # copies: tensors that are made in inference mode take no part in training
        return Trajectories(torch.stack([x for x, _ in seen]).clone(), torch.cat([t for _, t in seen]).clone(), labels)

    def _seeds(self) -> tuple[Tensor, Tensor]:
        return seeds_and_labels(TRAINING_RUN, self.settings.trained_on, load(self.model).config.classes)


def drawn(one: Contender, model: str, seeds: Tensor, labels: Tensor, batch: int, way: str = EAGER) -> Tensor:
    """Images [n, C, H, W], drawn `batch` at a time. way: EAGER or COMPILED."""
    if one.method is not None:
        method = dataclasses.replace(one.method, batch=batch)
        if method.plain:
            return in_plain_loop(method, seeds, labels, batch, compiled=way == COMPILED)
        return in_engine(method, seeds, labels, batch, way).images
    loaded, start = load(model), _prepared(one, model, way)
    return lockstep(loaded.backbone, loaded.schedule, seeds, labels, one.steps, batch, SOLVER, start)


def forget() -> None:
    """Drops compiled networks."""
    torch.compiler.reset()
    _compiled.cache_clear()
    _prepared.cache_clear()


@cache
def _prepared(one: Contender, model: str, way: str) -> Start:
    return one.around(load(model).backbone if way == EAGER else _compiled(model, one.blocks))


@cache
def _compiled(model: str, blocks: bool) -> Backbone:
    """The network with compiled blocks, or with compiled branches."""
    backbone = adadiff.load(model).backbone
    for block in backbone.blocks:
        for part in [block] if blocks else [part for part in block.children() if not isinstance(part, nn.LayerNorm)]:
            part.compile(dynamic=False)
    return backbone


def _frozen(model: str) -> Backbone:
    return adadiff.load(model).backbone.requires_grad_(False)


def _reusing(every: int, backbone: Backbone) -> Start:
    return partial(Reusing, backbone, every)


def _caching(runs: Tensor, backbone: Backbone) -> Start:
    return partial(routers.Caching, backbone, runs)


def _routing(own: nn.ModuleList, backbone: Backbone) -> Start:
    return partial(routers.Routing, backbone, own)
