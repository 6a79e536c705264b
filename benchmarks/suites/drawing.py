"""Samples for measurements: a `Method` describes how they are drawn, an `Artist` draws them in single-threaded
processes."""

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import adadiff
from adadiff.checkpoint import find, write_tensors
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.solvers import solver_from
from adadiff.diffusion.tables import pack
from adadiff.forward.options import Runner
from adadiff.models.interface import Backbone
from adadiff_kernels import solver_step
from benchmarks.baselines.reuse import Reusing

STEPS = 20
CHUNK = 256  # samples drawn at a time, by one process
SEED_STRIDE = 1_000_000  # seeds of run k start here times k
CLASSES = 10  # of the digits
T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Method:
    """name, setting: shown in tables. model: a shipped name or a file.

    Policy "full" without a shallow_model is drawn by the plain network in lockstep, everything else by the engine.
    shallow_model: a name or a file, runs at timesteps >= t_switch. reuse: every `reuse` steps the plain network runs in
    full, see reuse.py. batch: samples at a time (None: all). guidance_scale: of classifier-free guidance; 1: none.
    """

    name: str
    model: str
    policy: str = "full"
    steps: int = STEPS
    setting: str | int | None = None
    solver: str = "ddim"
    shallow_model: str | None = None
    t_switch: float | None = None
    reuse: int = 1
    batch: int | None = None
    guidance_scale: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the plain network in the ordinary sampling loop draws it."""
        return self.policy == "full" and self.shallow_model is None


@dataclass(frozen=True)
class Drawn:
    """images [n, C, H, W]; exit_layer uint8 [steps, n]; macs: multiply-adds (run, full). The last two are None for
    plain networks."""

    images: Tensor
    exit_layer: Tensor | None = None
    macs: tuple[int, int] | None = None


def seeds_and_labels(run: int, n: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Seeds and labels of run 0, 1, ...: no two runs share seeds, and labels take turns. Raises ValueError for too many
    samples."""
    if not 0 <= n <= SEED_STRIDE:
        raise ValueError(f"a run has at most {SEED_STRIDE} samples, got {n}")
    return run * SEED_STRIDE + torch.arange(n), torch.arange(n) % classes


class Switched:
    """Two plain networks behind the interface of one, for a batch with one timestep: `early` runs at t >= t_switch."""

    def __init__(self, early: Callable[..., Tensor], late: Callable[..., Tensor], t_switch: float):
        self._early, self._late, self._t_switch = early, late, t_switch

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return (self._early if float(t[0]) >= self._t_switch else self._late)(x, t, context)


class Guided:
    """A network with classifier-free guidance (Ho and Salimans, arXiv 2207.12598) behind the interface of the network.
    Both halves, with the label and with null_label, run as one batch; scale as in diffusers."""

    def __init__(self, network: Callable[..., Tensor], null_label: int, scale: float):
        self._network, self._null_label, self._scale = network, null_label, scale

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        both = torch.cat([context, torch.full_like(context, self._null_label)])
        given, null = self._network(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return null + self._scale * (given - null)


@torch.inference_mode()
def lockstep(
    backbone: Backbone,
    schedule: NoiseSchedule,
    seeds: Tensor,
    labels: Tensor,
    steps: int,
    batch: int,
    solver: str = "ddim",
    start: Callable[[], Callable[..., Tensor]] | None = None,
) -> Tensor:
    """The ordinary sampling loop of a plain network with our solver step, `batch` samples at a time. start: returns
    what is called instead of the network, for each batch anew, if it has state. Returns images [n, C, H, W]."""
    tables = pack([solver_from(solver).table(schedule, steps)])
    images = []
    for seed, label in zip(seeds.split(batch), labels.split(batch), strict=True):
        network = backbone if start is None else start()
        state = tables.start(initial_noise(seed, backbone.sample_shape))
        table = np.zeros(len(seed), dtype=np.int64)
        for step in range(steps):
            t, coefficients = tables.rows(table, np.full_like(table, step))
            solver_step(state, network(state.x, torch.from_numpy(t), label), coefficients)
        images.append(state.x)
    return torch.cat(images)


def policy_of(threshold: str) -> str:
    """The policy for a threshold as spelled in rows: "0.135,first=3" -> "exit:0.135,min_layer=3"."""
    return "exit:" + threshold.replace("first=", "min_layer=")


def draw(method: Method, seeds: Tensor, labels: Tensor) -> Drawn:
    batch = method.batch or max(1, len(seeds))
    if method.plain:
        return Drawn(in_plain_loop(method, seeds, labels, batch))
    return in_engine(method, seeds, labels, batch)


def in_plain_loop(method: Method, seeds: Tensor, labels: Tensor, batch: int, compiled: bool = False) -> Tensor:
    """method: with the policy "full", with or without a shallow model. compiled: use `compiled_network`."""
    model = load(method.model)

    def network(name: str) -> Callable[..., Tensor]:
        return compiled_network(name) if compiled else load(name).backbone

    called = network(method.model)
    if method.shallow_model is not None:
        called = Switched(network(method.shallow_model), called, method.t_switch)

    def start() -> Callable[..., Tensor]:
        once = called if method.reuse == 1 else Reusing(called, method.reuse)
        return once if method.guidance_scale == 1 else Guided(once, model.config.null_label, method.guidance_scale)

    return lockstep(model.backbone, model.schedule, seeds, labels, method.steps, batch, method.solver, start)


@cache
def compiled_network(name: str) -> Callable[..., Tensor]:
    return torch.compile(load(name).backbone, dynamic=False)


def in_engine(method: Method, seeds: Tensor, labels: Tensor, batch: int, runner: Runner = "eager") -> Drawn:
    images, report = sampled(method, seeds, labels, batch, runner)
    return Drawn(images, report.exit_layer[..., 0], (report.macs, report.macs_full))


def sampled(
    method: Method, seeds: Tensor, labels: Tensor, batch: int, runner: Runner = "eager"
) -> tuple[Tensor, adadiff.Report]:
    """Images [n, C, H, W] by our engine, and their report."""
    return adadiff.sample(
        load(method.model),
        len(seeds),
        steps=method.steps,
        solver=method.solver,
        policy=method.policy,
        seed=seeds,
        class_labels=labels,
        batch=batch,
        shallow_model=None if method.shallow_model is None else load(method.shallow_model),
        t_switch=method.t_switch,
        guidance_scale=method.guidance_scale,
        execution=adadiff.ExecutionOptions(runner=runner),
    )


@cache
def load(name: str) -> adadiff.Model:
    return adadiff.load(name)


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file; made and written first if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, make(), {})
    return load_file(path)


@cache
def fingerprint(name: str) -> str:
    """Part of the SHA-256 of a checkpoint; distinguishes versions of the same name."""
    return hashlib.sha256(find(name).read_bytes()).hexdigest()[:12]


class Artist:
    """Draws samples in chunks, in this process or in several single-threaded ones."""

    def __init__(self, pool: ProcessPoolExecutor | None):
        self._pool = pool

    @staticmethod
    @contextmanager
    def of(processes: int) -> Iterator["Artist"]:
        if processes == 1:
            yield Artist(None)
            return
        pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker)
        try:
            yield Artist(pool)
        finally:
            pool.shutdown(cancel_futures=True)

    def each(self, function: Callable[[T], R], tasks: Sequence[T], title: str) -> Iterator[R]:
        """The results of function for every task, in their order, each as soon as it is there. Tasks and results must
        be picklable and hold no tensors."""
        results = (self._pool.map if self._pool else map)(function, tasks)
        return iter(tqdm(results, desc=title, total=len(tasks), leave=False, disable=None))

    def map(self, function: Callable[[T], R], tasks: Sequence[T], title: str) -> list[R]:
        """As `each`, when all are there."""
        return list(self.each(function, tasks, title))

    def draw(self, method: Method, seeds: Tensor, labels: Tensor) -> Drawn:
        chunks = [
            (method, seed.numpy(), label.numpy())
            for seed, label in zip(seeds.split(CHUNK), labels.split(CHUNK), strict=True)
        ]
        title = f"{method.name} {'' if method.setting is None else method.setting}"
        images, exits, macs = zip(*self.map(_draw_arrays, chunks, title), strict=True)
        if exits[0] is None:
            return Drawn(torch.from_numpy(np.concatenate(images)))
        return Drawn(
            torch.from_numpy(np.concatenate(images)),
            torch.from_numpy(np.concatenate(exits, axis=1)),
            (sum(run for run, _ in macs), sum(full for _, full in macs)),
        )


def kept_images(folder: Path, artist: Artist, method: Method, seeds: Tensor, labels: Tensor, run: int) -> Tensor:
    """Images of a network in full, for others to be compared with: drawn once, then read from the folder."""
    how = f"{method.steps}-{method.solver}-{method.guidance_scale:g}"
    path = folder / f"{fingerprint(method.model)}-{how}-{len(seeds)}-{run}.safetensors"
    return kept(path, lambda: {"images": artist.draw(method, seeds, labels).images})["images"]


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C


def _draw_arrays(
    task: tuple[Method, np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int] | None]:
    """Takes and returns arrays, which pass between processes without shared memory."""
    method, seeds, labels = task
    drawn = draw(method, torch.from_numpy(seeds), torch.from_numpy(labels))
    return drawn.images.numpy(), None if drawn.exit_layer is None else drawn.exit_layer.numpy(), drawn.macs
