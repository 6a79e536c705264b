"""adadiff sample."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..forward.two_stage import T_SWITCH
from ..model import Model
from ..output.filling import Process, ShardFolder
from ..output.locking import only_launch
from ..output.pictures import CHANNELS, PictureFolder
from ..output.shards import ADVICE, MANIFEST, Manifest
from ..pipelines.text import CLIP, TextEncoder
from ..sampling import sampler
from ..sampling.params import SamplingParams
from .shared import cycled, decoder, digest, execution_of, load_model, resolved, show

PNG_MOST = 1000  # samples that become a picture each where nothing else is asked for
SHARD = 1000  # samples


def sample(options: argparse.Namespace) -> None:
    model, n, process = load_model(options), options.n, Process.of(os.environ)
    if n < 0:
        raise ValueError(f"n must be an integer >= 0, got {n}")
    if options.guidance_interval is not None and options.guidance_scale == 1:
        raise ValueError("--guidance-interval says at which times there is guidance; give --guidance-scale, too")
    configuration = {
        **resolved(options),
        "class_labels": options.class_labels,
        "tied": options.tied,
        **_given(options, "guidance_interval", "prompt", "text_encoder", "decoder"),
    }
    execution = execution_of(options)
    texts = _no_texts(options, model)  # stands for what prompts become while all else is checked
    shallow = None if options.shallow_model is None else load_model(options, options.shallow_model)
    if shallow is not None:
        configuration |= {"shallow_model": options.shallow_model, "shallow_sha256": digest(options.shallow_model)}
        configuration["t_switch"] = T_SWITCH if options.t_switch is None else options.t_switch

    def sampling(slots: Sequence[int], progress: bool = False) -> sampler.SamplerRun:
        labels = options.class_labels
        params = SamplingParams(
            seed=[options.seed + slot for slot in slots],
            class_labels=None if labels is None else cycled("class labels", labels, n, slots),
            steps=cycled("steps", options.steps, n, slots),
            solver=options.solver,
            policy=options.policy,
            guidance_scale=options.guidance_scale,
            guidance_interval=options.guidance_interval,
            tied=options.tied,
            **texts(slots),
        )
        return sampler.SamplerRun(
            *(model, len(slots), params),
            batch=options.batch,
            execution=execution,
            shallow_model=shallow,
            t_switch=options.t_switch,
            progress=progress,
        )

    if options.decoder is not None and options.format == "npz":
        raise ValueError("--format npz keeps latents; leave --decoder out")
    pictures = options.decoder is not None or model.backbone.sample_shape[0] in CHANNELS
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
    sampling(range(n))  # for its checks, before anything is loaded or the folder touched
    decoded, texts = decoder(options, model), _texts(options, model)
    with only_launch(options.out, process.rank, process.world):
        if kind == "png":
            folder = PictureFolder(options.out, configuration, model.num_layers)
            _fill_with_pictures(folder, configuration, sampling, decoded)
        else:
            _fill_with_shards(ShardFolder(options.out, manifest, process), sampling)


Texts = Callable[[Sequence[int]], dict[str, Tensor]]  # slots -> embeddings of the prompts of the samples there


def _no_texts(options: argparse.Namespace, model: Model) -> Texts:
    """Zeros where `_texts` has embeddings. ValueError for options that do not fit the model."""
    network, prompts = model.config.network, options.prompt
    if not network.context_tokens:
        if prompts is not None or options.text_encoder is not None:
            raise ValueError("this model takes no text; leave --prompt and --text-encoder out")
        return lambda slots: {}
    if prompts is None:
        raise ValueError("this model takes text; give --prompt")
    if options.class_labels is not None:
        raise ValueError("this model takes text; leave --class-labels out")
    cycled("prompts", prompts, options.n, ())  # for its check
    zeros = torch.zeros(()).expand(network.context_tokens, network.context_dim)
    return lambda slots: {"text_embeds": zeros.expand(len(slots), *zeros.shape), "null_text_embeds": zeros}


def _texts(options: argparse.Namespace, model: Model) -> Texts:
    """Embeddings of --prompt, cycled, and of the empty prompt."""
    network, prompts = model.config.network, options.prompt
    if not network.context_tokens:
        return lambda slots: {}
    *made, null = TextEncoder.load(options.text_encoder or CLIP)([*prompts, ""])
    wanted = (network.context_tokens, network.context_dim)
    if null.shape != wanted:
        raise ValueError(f"this model takes text {list(wanted)}, the text encoder makes {list(null.shape)}")

    def of(slots: Sequence[int]) -> dict[str, Tensor]:
        own = [made[slot % len(made)] for slot in slots]
        return {"text_embeds": torch.stack(own) if own else null.new_zeros(0, *wanted), "null_text_embeds": null}

    return of


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those options that were given, as JSON keeps them."""
    values = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {name: str(value) if isinstance(value, Path | tuple) else value for name, value in values.items()}


def _fill_with_pictures(
    folder: PictureFolder,
    configuration: dict[str, Any],
    sampling: Callable[..., sampler.SamplerRun],
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


def _fill_with_shards(folder: ShardFolder, sampling: Callable[..., sampler.SamplerRun]) -> None:
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
        depth = f"; mean exit layer {totals['mean_exit_layer']:.2f} of {totals['num_layers']}" if n else ""
        print(f"wrote {out}: {n} samples{depth}")
