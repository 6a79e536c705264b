"""adadiff sample."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..engine.switching import T_SWITCH
from ..output.filling import Process, ShardFolder
from ..output.pictures import CHANNELS, PictureFolder
from ..output.shards import ADVICE, MANIFEST, Manifest
from ..sampling import sampler
from .shared import cycled, decoder, digest, resolved, show

PNG_MOST = 1000  # samples that become a picture each where nothing else is asked for
SHARD = 1000  # samples


def sample(options: argparse.Namespace) -> None:
    model, n, process = checkpoint.load(options.model), options.n, Process.of(os.environ)
    if n < 0:
        raise ValueError(f"n must be an integer >= 0, got {n}")
    configuration = {
        **resolved(options, model),
        "labels": options.labels,
        "guidance": options.guidance,
        "tied": options.tied,
        "batch_invariant": options.batch_invariant,
        **({} if options.decoder is None else {"decoder": str(options.decoder)}),
    }

    early = None if options.early_model is None else checkpoint.load(options.early_model)
    if early is not None:
        configuration |= {"early_model": options.early_model, "early_sha256": digest(options.early_model)}
        configuration["t_switch"] = T_SWITCH if options.t_switch is None else options.t_switch

    def sampling(slots: Sequence[int], progress: bool = False) -> sampler.Sampling:
        return sampler.Sampling(
            model,
            len(slots),
            steps=cycled("steps", options.steps, n, slots),
            solver=options.solver,
            rule=configuration["rule"],
            seeds=[options.seed + slot for slot in slots],
            labels=None if options.labels is None else cycled("labels", options.labels, n, slots),
            guidance=options.guidance,
            tied=options.tied,
            batch=options.batch,
            batch_invariant=options.batch_invariant,
            early_model=early,
            t_switch=options.t_switch,
            progress=progress,
        )

    decoded = decoder(options, model)
    if decoded is not None and options.format == "npz":
        raise ValueError("--format npz keeps latents; leave --decoder out")
    pictures = decoded is not None or model.backbone.sample_shape[0] in CHANNELS
    kind = options.format or ("png" if pictures and n <= PNG_MOST else "npz")
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
        if (options.out / MANIFEST).exists():
            raise ValueError(f"{options.out} holds shards; {ADVICE}, or give --format npz")
    else:
        shard = SHARD if options.shard is None else options.shard
        manifest = Manifest.of(model, {**configuration, "shard": shard})
    sampling(range(n))  # for its checks, before the folder is touched
    if kind == "png":
        _fill_with_pictures(PictureFolder(options.out, configuration, model.layers), configuration, sampling, decoded)
    else:
        _fill_with_shards(ShardFolder(options.out, manifest, process), sampling)


def _fill_with_pictures(
    folder: PictureFolder,
    configuration: dict[str, Any],
    sampling: Callable[..., sampler.Sampling],
    decoded: Callable[[Tensor], Tensor] | None,
) -> None:
    out, n = folder.folder, configuration["n"]
    show({**configuration, "out": out})
    missing = folder.missing(n)
    if len(missing) < n:
        print(f"{n - len(missing)} of {n} pictures are in {out} already; drawing {len(missing)}")
    run, drawn = sampling(missing, progress=True), 0
    try:
        for places, images in run:
            images = images if decoded is None else decoded(images)
            for place, image in zip(places.tolist(), images, strict=True):
                folder.add(missing[place], image)
                drawn += 1
    except KeyboardInterrupt:
        there = f"{n - len(folder.missing(n))} of {n} pictures are in {out}"
        raise KeyboardInterrupt(f"{there}; the same command draws the others") from None
    finally:
        folder.record(run.report, drawn)
    if missing:
        print(run.report)
    if n:
        print(f"wrote {out}; on one page: {folder.write_grid(n)}")


def _fill_with_shards(folder: ShardFolder, sampling: Callable[..., sampler.Sampling]) -> None:
    """Rank 0 speaks for all; others only of damage, and of the end where they are the last."""
    out, n, first = folder.folder, folder.manifest.n, folder.process.rank == 0
    if first:
        show({**folder.manifest.configuration, "out": out})
    try:
        for damage in folder.drop_damaged():
            print(f"{damage}; drawing it again")
        before = folder.count
        if before and first:
            print(f"{before} of {n} samples are in {out} already")
        drew = folder.draw(sampling)
        totals = folder.finish()
    except KeyboardInterrupt:
        if not first:
            raise SystemExit(130) from None
        raise KeyboardInterrupt(f"{folder.count} of {n} samples are in {out}; the same command goes on") from None
    if totals is None and first:
        print(f"{folder.count} of {n} samples are in {out}; the other processes draw the rest")
    elif totals is not None and (first or drew):
        depth = f"; mean exit layer {totals['mean_exit_layer']:.2f} of {totals['layers']}" if n else ""
        print(f"wrote {out}: {n} samples{depth}")
