"""adadiff sample."""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..output import parquet
from ..output.asked import Asked, Networks
from ..output.filling import Process, ShardFolder
from ..output.locking import only_launch
from ..output.pictures import ADVICE, CHANNELS, PictureFolder
from ..output.shards import MANIFEST, MOST_SAMPLES, Manifest
from ..output.shards import PER_SHARD as SHARD
from ..pipelines.contexts import contexts_of
from ..policies.calibrated import Calibration
from ..policies.joining import split_parts
from ..policies.step_selector import AUTO
from ..sampling import sampler
from ..sampling.reports import Report, never_acted_text
from ..writing import check_replaceable
from .shared import check_limits, decoder, with_progress
from .terminal import say, way_of_drawing, with_bars

PNG_MOST = 1000  # samples up to which --format defaults to png
PNG_LIMIT = 10**6  # samples that --format png takes
OUTPUTS = re.compile(r"report\.json|manifest\.json|grid\.png|[0-9]{6,}\.png|shard-[0-9]{5,}\.npz")
Folder = TypeVar("Folder", PictureFolder, ShardFolder)


def sample(options: argparse.Namespace) -> None:
    n, process = options.n, Process.of(os.environ)
    if n < 0:
        raise ValueError(f"n must be an integer >= 0, got {n}")
    check_limits(options, MOST_SAMPLES)
    asked = Asked(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Asked)})
    networks = asked.load("cpu" if options.ray else None)  # with Ray, workers have the devices
    model = networks.model
    configuration = asked.configuration(model)
    if options.decoder is not None and options.format == "npz":
        raise ValueError("--format npz keeps latents; leave --decoder out")
    pictures = options.decoder is not None or model.backbone.sample_shape[0] in CHANNELS
    kind = options.format or ("png" if pictures and n <= PNG_MOST and not options.ray else "npz")
    _check_ray(options, kind)
    if options.parquet is not None and kind == "png":
        raise ValueError("--parquet is for --format npz, whose shards it converts")
    if kind == "png":
        if not pictures:
            channels = model.backbone.sample_shape[0]
            raise ValueError(
                f"these are latents, {channels} channels: --decoder FOLDER makes pictures, --format npz keeps them"
            )
        if process.world > 1:
            raise ValueError("--format png takes one process; --format npz as many as you like")
        if options.shard is not None:
            raise ValueError("--shard is for --format npz")
        if n > PNG_LIMIT:
            raise ValueError(f"--format png takes at most {PNG_LIMIT:,} samples; --format npz takes more")
    else:
        shard = SHARD if options.shard is None else options.shard
        manifest = Manifest.of(model, {**configuration, "shard": shard})
        if options.parquet is not None:
            parquet.check(manifest, options.parquet, options.force)
    if options.ray:
        return _sample_with_ray(options, asked, networks, manifest)
    asked.check(networks)  # before anything is loaded or the folder touched
    decoded, texts = decoder(options, model), contexts_of(asked, model)

    def sampling(slots: Sequence[int], progress: bool = False) -> sampler.SamplerRun:
        return asked.run(networks, slots, texts, progress)

    with only_launch(options.out, process.rank, process.world):
        if kind == "png":
            shape = model.backbone.sample_shape
            if decoded is not None:
                shape = tuple(decoded(torch.zeros(0, *shape, dtype=torch.float32, device="cpu")).shape[1:])
            pictures = _opened(options, lambda: _picture_folder(options.out, configuration, model.num_layers, shape))
            _fill_with_pictures(pictures, configuration, sampling, decoded, model.calibration)
        else:
            shards = _opened(options, lambda: ShardFolder(options.out, manifest, process))
            draw = partial(shards.draw, sampling, progress=with_bars())
            _fill_with_shards(options, shards, draw, model.calibration)


def _check_ray(options: argparse.Namespace, kind: str) -> None:
    """ValueError for options that do not work with --ray, or need it."""
    if not options.ray:
        for name in ("actors", "actor_cpus"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for --ray, which spreads the work over workers")
    elif options.decoder is not None:
        raise ValueError("--ray keeps latents, which `adadiff evaluate` decodes; leave --decoder out")
    elif kind == "png":
        raise ValueError("--ray writes arrays of many samples; leave --format png out")


def _sample_with_ray(options: argparse.Namespace, asked: Asked, networks: Networks, manifest: Manifest) -> None:
    from ..serving.ray.extra import check_extra

    check_extra("ray.data")
    from ..serving.ray import offline
    from ..serving.ray.planning import Workers

    workers = Workers.of(asked, options.actors, 1 if options.actor_cpus is None else options.actor_cpus)
    job = offline.Job.of(asked, networks, manifest, workers)
    with only_launch(options.out), offline.connected() if options.force else nullcontext():
        if options.force:  # before anything is removed
            job.check_cluster()
        shards = _opened(options, lambda: ShardFolder(options.out, manifest, Process()))
        draw = partial(job.draw, shards, progress=with_bars())
        _fill_with_shards(options, shards, draw, networks.model.calibration)


def _picture_folder(out: Path, configuration: dict[str, Any], *settings: Any) -> PictureFolder:
    if (out / MANIFEST).exists():
        raise ValueError(f"{out} holds shards; {ADVICE}, or --format npz")
    differs = {"steps": configuration["steps"] == [AUTO], "went_on": "cascade_sha256" in configuration}
    return PictureFolder(out, configuration, *settings, by_sample=[name for name, kept in differs.items() if kept])


def _opened(options: argparse.Namespace, folder: Callable[[], Folder]) -> Folder:
    """The opened folder. If `folder()` raises ValueError, e.g. for samples of other settings, --force removes all files
    with names of samples and opens it again."""
    for path in options.out.iterdir():
        if OUTPUTS.fullmatch(path.name):
            check_replaceable(path)
    try:
        return folder()
    except ValueError:
        if not options.force:
            raise
        if Process.of(os.environ).world > 1:
            raise ValueError(f"--force takes one process; empty {options.out} first") from None
    for path in options.out.iterdir():
        if OUTPUTS.fullmatch(path.name):
            path.unlink()
    return folder()


def _fill_with_pictures(
    folder: PictureFolder,
    configuration: dict[str, Any],
    sampling: Callable[..., sampler.SamplerRun],
    decoded: Callable[[Tensor], Tensor] | None,
    calibration: Calibration | None,
) -> None:
    out, n = folder.folder, configuration["n"]
    _announce(configuration, calibration)
    missing = folder.missing
    if folder.damaged:
        some = f"{len(folder.damaged)} of {n} pictures are damaged"
        say(f"{some} and drawn again: {folder.damaged[0]}")
    if folder.count:
        say(f"{folder.count} of {n} pictures are in {out} already; drawing {len(missing)}")
    run = sampling(missing, progress=with_bars())
    try:
        for places, images in run:
            images, report = images if decoded is None else decoded(images), run.report
            folder.record(report)
            for place, image in zip(places.tolist(), images, strict=True):
                went_on = None if report.went_on is None else bool(report.went_on[place])
                folder.add(missing[place], image, steps=int(report.steps[place]), went_on=went_on)
        folder.record(run.report)
    except BaseException as error:
        with suppress(OSError):  # the disk may be full
            folder.record(run.report)
        progress = f"{folder.count} of {n} pictures are in {out}"
        raise with_progress(error, f"{progress}; the same command draws the others") from error.__cause__
    if n:
        chosen = f"; {_chosen(run.report)}" if missing and configuration["steps"] == [AUTO] else ""
        say(f"wrote {folder.write_grid()}: {_saving(run.report) + chosen if missing else f'{n} images, drawn before'}")
    else:
        say(f"wrote {out}: no images were asked for")


def _fill_with_shards(
    options: argparse.Namespace, folder: ShardFolder, draw: Callable[[], int], calibration: Calibration | None
) -> None:
    """draw: draws the missing shards and returns their number. Rank 0 prints for all processes; another one prints only
    damaged shards, and the summary if it finishes last."""
    out, n, first = folder.folder, folder.manifest.n, folder.process.rank == 0
    if first:
        _announce(folder.manifest.configuration, calibration)
    try:
        for damage in folder.drop_damaged():
            say(f"{damage}; drawing it again")
        before = folder.count
        if before and first:
            say(f"{before} of {n} samples are in {out} already")
        drew = draw()
        totals = folder.finish()
    except (KeyboardInterrupt, OSError) as error:
        if isinstance(error, KeyboardInterrupt) and not first:
            raise SystemExit(130) from None
        raise with_progress(error, f"{folder.count} of {n} samples are in {out}; the same command goes on") from None
    if totals is None and first:
        say(f"{folder.count} of {n} samples are in {out}; the other processes draw the rest")
    elif totals is not None and (first or drew):
        names = ("macs", "macs_full", "mean_exit_layer", "num_layers")
        macs, macs_full, depth, layers = (totals[name] for name in names)
        asks = _asks(folder.manifest.configuration["policy"])
        never = never_acted_text(asks) if asks else None
        left_out = f", {_left_out(macs, macs_full, depth, layers, never=never)}"
        time = f" in {totals['seconds']:.1f} s of drawing" if n else ""
        say(f"wrote {out}: {n} samples{time}{left_out if n else ''}")
        if options.parquet is not None:
            written = parquet.export(out, options.parquet, options.force)
            say(f"wrote {options.parquet}: {written} of {folder.manifest.shards} Parquet files")


def _asks(policy: str) -> tuple[str, ...]:
    """The kinds of saving that `policy` can make while samples are drawn ("exit", "reuse", "width"), for
    `never_acted_text`."""
    of_kinds = {"cache": "reuse", "reuse": "reuse", "estimate": "reuse", "width": "width", "full": "", "cascade": ""}
    found = (of_kinds.get(part.partition(":")[0], "exit") for part in split_parts(policy))
    return tuple(dict.fromkeys(name for name in found if name))


def _announce(configuration: dict[str, Any], calibration: Calibration | None) -> None:
    """Prints the run's main settings in one line; report.json and manifest.json hold all of them."""
    steps = " or ".join(map(str, configuration["steps"]))
    n, guidance = configuration["n"], configuration["guidance_scale"]
    asked = (*configuration["steps"], configuration["solver"], guidance)
    say(
        f"{configuration['model']}: {n} samples, {way_of_drawing(steps, configuration['solver'], guidance)}, policy "
        f"{configuration['policy']}, seeds from {configuration['seed']}, on {configuration['device']}"
    )
    calibrated = ("exit:budget=", "exit:table=")
    if calibration is None or not any(part.startswith(calibrated) for part in split_parts(configuration["policy"])):
        return
    known = (calibration.steps, calibration.solver, calibration.guidance_scale)
    if asked != known:
        print(f"note: the policy was calibrated for {way_of_drawing(*known)}; here its share of the work may differ")


def _saving(report: Report) -> str:
    n, seconds = report.exit_layer.shape[1], report.seconds
    if report.went_on is not None:
        went_on = f"{report.passes / n:.1f} evaluations an image; {int(report.went_on.sum())} went on to the teacher"
        return f"{n} images in {seconds:.2f} s ({n / seconds:.1f} images/s), {went_on}"
    never = never_acted_text(report.idle or ("exit",)) if report.asks else None
    left_out = _left_out(report.macs, report.macs_full, report.mean_exit_layer, report.num_layers, never=never)
    if report.never_acted and never is not None and never not in left_out:  # only the shallow network saved work
        left_out += f"; {never}"
    if report.reuses:
        left_out += f"; {report.reuses / report.passes:.0%} of the steps reused an earlier one"
    return f"{n} images in {seconds:.2f} s ({n / seconds:.1f} images/s), {left_out}"


def _chosen(report: Report) -> str:
    least, most = report.steps.aminmax()
    return f"{least} to {most} steps, {report.steps.double().mean():.2f} on average"


def _left_out(macs: int, macs_full: int, mean_exit_layer: float, num_layers: int, *, never: str | None) -> str:
    """never: text for a policy that never acted; None for a policy that has nothing to decide."""
    if macs >= macs_full:
        return "no work left out" + (f": {never}" if never is not None and mean_exit_layer == num_layers else "")
    return f"{1 - macs / macs_full:.0%} of the work left out ({mean_exit_layer:.2f} of {num_layers} blocks a step)"
