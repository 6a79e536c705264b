"""Fills a folder of shards, with any number of processes that need not communicate. A later run can complete it."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..sampling.reports import Report
from ..sampling.sampler import SamplerRun
from ..writing import check_replaceable, replace_file
from .pictures import ADVICE, GRID_MOST, add_totals, make_grid, no_totals, to_pixels, write_json, write_png
from .shards import COUNTS, MANIFEST, SHARD, Manifest, present, read_arrays, read_shard, shard_path

REPORT, GRID = "report.json", "grid.png"
PART = re.compile(r"(?:shard-\d+\.npz|manifest\.json|report\.json|grid\.png)\.(\d+)\.part")
LAUNCHERS = (  # torchrun and accelerate launch; Open MPI; MPICH and Intel MPI, which accelerate uses on CPUs
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


@dataclass(frozen=True)
class Process:
    """Process `rank`, counted from 0, of `world` processes that share the work."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def of(environment: Mapping[str, str]) -> "Process":
        """The process according to the launcher's environment variables; without them, the only one. Raises ValueError
        for a rank without a world size, or not below it."""
        for names in LAUNCHERS:
            values = [environment.get(name, "") for name in names]
            if any(values):
                if not all(map(str.isdecimal, values)) or int(values[0]) >= int(values[1]):
                    raise ValueError(f"{names[0]} must be a whole number below {names[1]}, got {' and '.join(values)}")
                return Process(*map(int, values))
        return Process()


class ShardFolder:
    """The folder as seen by one process, which draws shards rank, rank + world, ...

    Raises ValueError if the folder cannot be written or holds anything else. A folder that differs only in a smaller n,
    with all shards full, can grow.
    """

    def __init__(self, folder: Path, manifest: Manifest, process: Process):
        self.folder, self.manifest, self.process = folder, manifest, process
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if path.name in (MANIFEST, REPORT, GRID) or SHARD.fullmatch(path.name):
                    check_replaceable(path)
            check_agrees(folder, manifest)
            for path in folder.iterdir():  # unfinished files of a killed run
                part = PART.fullmatch(path.name)
                if part and int(part[1]) % process.world == process.rank:
                    path.unlink()
            write_json(folder / MANIFEST, dataclasses.asdict(manifest), process.rank)
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from error

    @property
    def count(self) -> int:
        """Number of samples in the existing shards."""
        return sum(len(self.manifest.slots(i)) for i in present(self.folder, self.manifest))

    @property
    def own(self) -> range:
        """The shards of this process. The split covers all shards, not only missing ones, because processes may see
        different ones as missing."""
        return range(self.process.rank, self.manifest.shards, self.process.world)

    def drop_damaged(self) -> list[str]:
        """Removes damaged shards of this process, so that they are drawn again. Returns a message for each."""
        damaged = []
        for number in sorted(present(self.folder, self.manifest)):
            if number not in self.own:
                continue
            try:
                read_shard(self.folder, self.manifest, number)
            except FileNotFoundError:
                continue
            except ValueError as error:
                damaged.append(str(error))
                shard_path(self.folder, number).unlink()
        return damaged

    @property
    def missing(self) -> list[int]:
        """The shards of this process that do not exist yet."""
        return [number for number in self.own if not shard_path(self.folder, number).exists()]

    def draw(self, sampling: Callable[[range], SamplerRun], progress: bool = True) -> int:
        """Draws the missing shards of this process and returns their number. sampling: slots -> sampling run.

        Only rank 0 has a progress bar; it counts the shards of other processes whenever it finishes one of its own.
        """
        drawn = blocks = passes = 0
        with self.bar(progress) as bar:
            for number in self.missing:
                run = sampling(self.manifest.slots(number))

                def show(images: int, run: SamplerRun = run, blocks: int = blocks, passes: int = passes) -> None:
                    show_depth(bar, blocks + run.report.blocks, passes + run.report.passes, self.manifest.num_layers)
                    bar.update(images)

                self.write(number, shard_arrays(self.manifest, number, run, show))
                drawn, blocks, passes = drawn + 1, blocks + run.report.blocks, passes + run.report.passes
                bar.update(self.count - bar.n)
        return drawn

    def bar(self, progress: bool = True) -> tqdm:
        """A progress bar over the folder's samples; shown by rank 0 only."""
        return tqdm(
            total=self.manifest.n,
            initial=self.count,
            disable=self.process.rank > 0 or not progress,
            unit="image",
            smoothing=0,
            dynamic_ncols=True,
        )

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a shard atomically. arrays: as from `shard_arrays`."""

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)

        replace_file(shard_path(self.folder, number), save, self.process.rank)

    def finish(self) -> dict[str, Any] | None:
        """Writes report.json, with totals over all runs, and the grid; returns the totals. None if a shard is missing.

        The process that finishes last writes them; if two finish at the same time, both write the same.
        """
        manifest = self.manifest
        totals = no_totals(manifest.num_layers)
        try:
            for number in range(manifest.shards):
                done = read_arrays(shard_path(self.folder, number), ("exit_layer", *COUNTS))
                counts = (done[name].item() for name in COUNTS)
                report = Report(torch.from_numpy(done["exit_layer"]), manifest.num_layers, None, *counts)
                add_totals(totals, report, len(manifest.slots(number)))
            if manifest.n and manifest.array == "images":
                self._write_grid()
        except (FileNotFoundError, ValueError):  # another process is about to draw a damaged shard again
            return None
        write_json(self.folder / REPORT, {"configuration": manifest.configuration, **totals}, self.process.rank)
        return totals

    def _write_grid(self) -> None:
        shards = (read_shard(self.folder, self.manifest, i)["images"] for i in range(self.manifest.shards))
        first = itertools.islice((image for images in shards for image in images), GRID_MOST)
        pixels = [image[..., 0] if image.shape[-1] == 1 else image for image in first]
        write_png(self.folder / GRID, make_grid(pixels), self.process.rank)


def check_agrees(folder: Path, manifest: Manifest) -> None:
    """ValueError for a folder that holds other samples than this manifest's, a smaller n aside. Writes nothing."""
    # The manifest is checked last: another process may meanwhile write all of these, the manifest first.
    drawn = any(SHARD.fullmatch(path.name) for path in folder.iterdir())
    finished = any((folder / name).exists() for name in (REPORT, GRID))
    if not (folder / MANIFEST).exists():
        if drawn or finished:
            raise ValueError(f"{folder} holds samples but no {MANIFEST}; {ADVICE}")
        return
    theirs = Manifest.read(folder)
    if not (drawn or finished):
        return  # left by a run that drew nothing
    differing = manifest.differing(theirs)
    if differing == ["n"] and theirs.n < manifest.n:
        if theirs.n % theirs.shard:
            full = f"the last of its shards of {theirs.shard} is not full"
            raise ValueError(f"{folder} holds n = {theirs.n} samples and cannot grow: {full}; {ADVICE}")
    elif differing:
        raise ValueError(f"{folder} holds samples drawn with another {', '.join(differing)}; {ADVICE}")


def shard_arrays(
    manifest: Manifest, number: int, run: SamplerRun, each: Callable[[int], object] = lambda images: None
) -> dict[str, np.ndarray]:
    """Draws a shard and returns its arrays, as `read_shard` reads them. run: of its slots. each: called with the number
    of images just finished. Raises ValueError if a sample holds NaN or infinity."""
    slots = manifest.slots(number)
    values = np.empty((len(slots), *manifest.shape), manifest.dtype)
    for places, images in run:
        values[places.numpy()] = _values(manifest, images, [slots[place] for place in places.tolist()])
        each(len(places))
    report = run.report
    arrays = {
        manifest.array: values,
        "slots": np.arange(slots.start, slots.stop),
        "seeds": run.samples.seeds.numpy(),
        "exit_layer": report.exit_layer.numpy(),
        **{name: np.array(getattr(report, name)) for name in COUNTS},
    }
    if manifest.configuration.get("class_labels") is not None:
        arrays["labels"] = run.samples.context.numpy()
    return arrays


def _values(manifest: Manifest, images: Tensor, slots: list[int]) -> np.ndarray:
    """images: float32 [k, C, H, W]. Returns them in the shape and dtype of the shard."""
    bad = [slot for slot, image in zip(slots, images, strict=True) if not bool(image.isfinite().all())]
    if bad:
        raise ValueError(f"sample {bad[0]} holds NaN or infinity; no sample of its shard is kept")
    if manifest.array == "latents":
        return images.cpu().numpy()
    return np.stack([to_pixels(image) for image in images]).reshape(len(images), *manifest.shape)


def show_depth(bar: tqdm, blocks: int, passes: int, num_layers: int) -> None:
    bar.set_postfix(depth=f"{blocks / passes:.2f}/{num_layers}", refresh=False)
