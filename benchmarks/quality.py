"""How good the digits are: every method draws the same samples (same noises, same labels), seed by seed."""

import dataclasses
import hashlib
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch
from rows import Rows, say
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import adadiff
from adadiff.checkpoint import find, write_tensors
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.solvers import DDIM
from adadiff.diffusion.tables import pack
from adadiff.evaluation.quality import evaluate_samples, frechet_ratio
from adadiff.models.uvit import UViT
from adadiff_kernels import solver_step

SUITE = "digits"
STEPS = 20
CHUNK = 250  # samples drawn at a time, by one process
SEED_STRIDE = 1_000_000  # seeds of run k start here times k
CLASSES = 10


@dataclass(frozen=True)
class Method:
    """`name` and `setting` are what tables show; `model` is a shipped name or a file.

    rule "full" is drawn by the plain network in lock step, everything else by the engine.
    """

    name: str
    model: str
    rule: str = "full"
    steps: int = STEPS
    setting: str | int | None = None


@dataclass(frozen=True)
class Drawn:
    """images [n, 1, 8, 8]; exit_layer uint8 [steps, n], multiply-adds (run, full): None if plain."""

    images: Tensor
    exit_layer: Tensor | None = None
    macs: tuple[int, int] | None = None


def seeds_and_labels(run: int, n: int) -> tuple[Tensor, Tensor]:
    """Of run 0, 1, ...: seeds that no other run has, and labels in turn."""
    if not 0 <= n <= SEED_STRIDE:
        raise ValueError(f"a run has at most {SEED_STRIDE} samples, got {n}")
    return run * SEED_STRIDE + torch.arange(n), torch.arange(n) % CLASSES


@torch.inference_mode()
def lockstep(backbone: UViT, schedule: NoiseSchedule, seeds: Tensor, labels: Tensor, steps: int, batch: int) -> Tensor:
    """The ordinary sampling loop around a plain network, `batch` samples at a time, with our solver step."""
    tables = pack([DDIM().table(schedule, steps)])
    images = []
    for seed, label in zip(seeds.split(batch), labels.split(batch), strict=True):
        state = tables.start(initial_noise(seed, backbone.sample_shape))
        for step in range(steps):
            t, coefficients = tables.rows(torch.zeros_like(seed), torch.full_like(seed, step))
            solver_step(state, backbone(state.x, t, label), coefficients)
        images.append(state.x)
    return torch.cat(images)


def draw(method: Method, seeds: Tensor, labels: Tensor) -> Drawn:
    model = load(method.model)
    if method.rule == "full":
        return Drawn(lockstep(model.backbone, model.schedule, seeds, labels, method.steps, CHUNK))
    images, report = adadiff.sample(
        model, len(seeds), steps=method.steps, rule=method.rule, seeds=seeds, labels=labels, batch=CHUNK
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

    def draw(self, method: Method, seeds: Tensor, labels: Tensor) -> Drawn:
        chunks = [
            (method, seed.numpy(), label.numpy())
            for seed, label in zip(seeds.split(CHUNK), labels.split(CHUNK), strict=True)
        ]
        results = (self._pool.map if self._pool else map)(_draw_arrays, chunks)
        title = f"{method.name} {'' if method.setting is None else method.setting}"
        images, exits, macs = zip(*tqdm(results, desc=title, total=len(chunks), leave=False, disable=None), strict=True)
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


def measure(
    rows: Rows, model: str, plain: str, thresholds: Sequence[str], fewer: Sequence[int], *,
    samples: int, runs: int, processes: int, steps: int = STEPS,
) -> None:  # fmt: skip
    """A row for each method and run that the file does not have yet."""
    with Artist.of(processes) as artist:
        for run in range(runs):
            say(f"digits: quality of {samples} samples, run {run + 1} of {runs}")
            Run(rows, artist, model, plain, samples, run, steps).measure(thresholds, fewer)


class Run:
    """One set of seeds, drawn by every method. The images that others are compared with are kept on disk."""

    def __init__(self, rows: Rows, artist: Artist, model: str, plain: str, samples: int, run: int, steps: int = STEPS):
        self._rows, self._artist = rows, artist
        self.full = Method("full", model, steps=steps)
        self.plain = Method("plain, equal budget", plain, steps=steps)
        self._seeds, self._labels = seeds_and_labels(run, samples)
        self._run = run

    def measure(self, thresholds: Sequence[str], fewer: Sequence[int]) -> None:
        methods = [self.full, self.plain]
        methods += [dataclasses.replace(self.full, name="fewer steps", steps=steps, setting=steps) for steps in fewer]
        for method in methods:
            self.row(method)
        for threshold in thresholds:
            early = dataclasses.replace(self.full, name="early exit", rule=f"threshold:{threshold}", setting=threshold)
            mean = self.row(early)["mean_exit_layer"]
            self.row(dataclasses.replace(early, name="fixed depth", rule=f"depth:{mean:.4f}"))

    def row(self, method: Method) -> dict[str, object]:
        parameters = {
            "setting": method.setting,
            "steps": method.steps,
            "samples": len(self._seeds),
            "run": self._run,
            # what the images and their comparisons come from
            "checkpoints": [fingerprint(self.full.model), fingerprint(self.plain.model)],
        }
        found = self._rows.find(SUITE, "quality", method.name, parameters)
        if found is not None:
            return found
        if method in (self.full, self.plain):
            drawn = Drawn(self.reference(method))
        else:
            drawn = self._artist.draw(method, self._seeds, self._labels)
        full, plain = self.reference(self.full), self.reference(self.plain)
        if method.name == "early exit":
            self._keep_for_pictures(method, drawn, full)
        quality = evaluate_samples(
            drawn.images, self._labels, paired=None if method in (self.full, self.plain) else full
        )
        ratios = {
            f"frechet_over_{name}": dataclasses.asdict(frechet_ratio(drawn.images, images))
            for name, images, itself in (("full", full, self.full), ("plain", plain, self.plain))
            if method != itself
        }
        return self._rows.write(
            SUITE,
            "quality",
            method.name,
            parameters,
            dtype="float32",
            rule=method.rule,
            **finite(dataclasses.asdict(quality)),
            **ratios,
            **depth(drawn, load(method.model).layers),
        )

    def reference(self, method: Method) -> Tensor:
        """Images of the full or the plain network: drawn once, then read from disk."""
        name = f"{fingerprint(method.model)}-{method.steps}-{len(self._seeds)}-{self._run}"
        path = self._rows.folder / "cache" / f"{name}.safetensors"
        if not path.exists():
            write_tensors(path, {"images": self._artist.draw(method, self._seeds, self._labels).images}, {})
        return load_file(path)["images"]

    def _keep_for_pictures(self, method: Method, drawn: Drawn, full: Tensor, number: int = 40) -> None:
        tensors = {
            "full": full[:number],
            "early": drawn.images[:number],
            "labels": self._labels[:number],
            "exit_layer": drawn.exit_layer[:, :number],
        }
        if self._run == 0:
            write_tensors(self._rows.folder / "cache" / f"early-exit-{method.setting}.safetensors", tensors, {})


def depth(drawn: Drawn, layers: int) -> dict[str, object]:
    """Mean exit layer, shares of the full network's blocks and multiply-adds, who left where at each step."""
    if drawn.exit_layer is None:
        return {"mean_exit_layer": float(layers), "blocks_share": 1.0, "macs_share": 1.0}
    mean = float(drawn.exit_layer.double().mean())
    histogram = [torch.bincount(step.long(), minlength=layers + 1)[1:].tolist() for step in drawn.exit_layer]
    return {
        "mean_exit_layer": mean,
        "blocks_share": mean / layers,
        "macs_share": drawn.macs[0] / drawn.macs[1],
        "exit_histogram": histogram,  # [steps][layers] samples
    }


def finite(values: dict[str, object]) -> dict[str, object]:
    """JSON knows no infinity: the PSNR of images that are equal is written as "inf"."""
    return {key: str(value) if value in (float("inf"), float("-inf")) else value for key, value in values.items()}
