"""Samples for measurements: a method says how they are drawn, an artist draws them, in processes of one thread each."""

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import adadiff
from adadiff.checkpoint import find
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


@dataclass(frozen=True)
class Method:
    """`name` and `setting` are what tables show; `model` is a shipped name or a file.

    policy "full" is drawn by the plain network in lock step, everything else by the engine, and so is whatever has a
    shallow_model (a name or a file; it serves times of t_switch and above). reuse: every so many steps the plain
    network runs whole, see reuse.py. batch: samples at a time (None: as many as are asked for).
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

    @property
    def plain(self) -> bool:
        """Drawn in the ordinary loop, around the network as it is."""
        return self.policy == "full" and self.shallow_model is None


@dataclass(frozen=True)
class Drawn:
    """images [n, C, H, W]; exit_layer uint8 [steps, n], multiply-adds (run, full): None if plain."""

    images: Tensor
    exit_layer: Tensor | None = None
    macs: tuple[int, int] | None = None


def seeds_and_labels(run: int, n: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Of run 0, 1, ...: seeds that no other run has, and labels in turn."""
    if not 0 <= n <= SEED_STRIDE:
        raise ValueError(f"a run has at most {SEED_STRIDE} samples, got {n}")
    return run * SEED_STRIDE + torch.arange(n), torch.arange(n) % classes


class Switched:
    """Two plain networks, called like one, for lanes of one time: the first from t_switch up."""

    def __init__(self, early: Callable[..., Tensor], late: Callable[..., Tensor], t_switch: float):
        self._early, self._late, self._t_switch = early, late, t_switch
        self.sample_shape = late.sample_shape

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return (self._early if float(t[0]) >= self._t_switch else self._late)(x, t, context)


@torch.inference_mode()
def lockstep(
    backbone: Backbone | Switched,
    schedule: NoiseSchedule,
    seeds: Tensor,
    labels: Tensor,
    steps: int,
    batch: int,
    solver: str = "ddim",
    reuse: int = 1,
) -> Tensor:
    """The ordinary sampling loop around a plain network, `batch` samples at a time, with our solver step."""
    tables = pack([solver_from(solver).table(schedule, steps)])
    images = []
    for seed, label in zip(seeds.split(batch), labels.split(batch), strict=True):
        network = backbone if reuse == 1 else Reusing(backbone, reuse)
        state = tables.start(initial_noise(seed, backbone.sample_shape))
        table = np.zeros(len(seed), dtype=np.int64)
        for step in range(steps):
            t, coefficients = tables.rows(table, np.full_like(table, step))
            solver_step(state, network(state.x, torch.from_numpy(t), label), coefficients)
        images.append(state.x)
    return torch.cat(images)


def policy_of(threshold: str) -> str:
    """What the rows' "0.135,first=3" stands for: "exit:0.135,min_layer=3"."""
    return "exit:" + threshold.replace("first=", "min_layer=")


def draw(method: Method, seeds: Tensor, labels: Tensor) -> Drawn:
    batch = method.batch or max(1, len(seeds))
    if method.plain:
        return Drawn(in_plain_loop(method, seeds, labels, batch))
    return in_engine(method, seeds, labels, batch)


def in_plain_loop(method: Method, seeds: Tensor, labels: Tensor, batch: int, compiled: bool = False) -> Tensor:
    """method: of the policy "full"; it may have a shallow model. compiled: the networks are `compiled_network`s."""
    model = load(method.model)

    def network(name: str) -> Callable[..., Tensor]:
        return compiled_network(name) if compiled else load(name).backbone

    own = network(method.model)
    if method.shallow_model is not None:
        own = Switched(network(method.shallow_model), own, method.t_switch)
    return lockstep(own, model.schedule, seeds, labels, method.steps, batch, method.solver, method.reuse)


@cache
def compiled_network(name: str) -> Callable[..., Tensor]:
    return torch.compile(load(name).backbone, dynamic=False)


def in_engine(method: Method, seeds: Tensor, labels: Tensor, batch: int, runner: Runner = "eager") -> Drawn:
    images, report = adadiff.sample(
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
        execution=adadiff.ExecutionOptions(runner=runner),
    )
    return Drawn(images, report.exit_layer[..., 0], (report.macs, report.macs_full))


@cache
def load(name: str) -> adadiff.Model:
    return adadiff.load(name)


@cache
def fingerprint(name: str) -> str:
    """Tells apart the checkpoints that a name has had."""
    return hashlib.sha256(find(name).read_bytes()).hexdigest()[:12]


class Artist:
    """Draws samples in chunks, in this process or in several of one thread each."""

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

    def map(self, function: Callable[[tuple], tuple], tasks: Sequence[tuple], title: str) -> list[tuple]:
        """function of every task, in the processes; both must be picklable, and no tensors."""
        results = (self._pool.map if self._pool else map)(function, tasks)
        return list(tqdm(results, desc=title, total=len(tasks), leave=False, disable=None))

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


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _draw_arrays(
    task: tuple[Method, np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int] | None]:
    """Arrays, because they cross between processes without shared memory."""
    method, seeds, labels = task
    drawn = draw(method, torch.from_numpy(seeds), torch.from_numpy(labels))
    return drawn.images.numpy(), None if drawn.exit_layer is None else drawn.exit_layer.numpy(), drawn.macs
