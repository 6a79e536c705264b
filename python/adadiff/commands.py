"""What the commands do: print the resolved configuration, make one call, print or write what came of it."""

import argparse
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .calibration.calibrating import Calibrating, matplotlib_figure, reliability_picture
from .calibration.calibration import Calibration
from .calibration.recording import noised_errors
from .conversion import convert as conversion
from .conversion.describing import describe
from .data import sources
from .evaluation.quality import Quality, evaluate_samples
from .model import Model
from .output.filling import Process, ShardFolder
from .output.pictures import CHANNELS, PictureFolder, write_json
from .output.shards import ADVICE, MANIFEST, Manifest
from .pipelines import latents
from .pipelines.text import CLIP, TextEncoder
from .sampling import sampler
from .sampling.reports import Report
from .training.config import TrainConfig, load_config
from .training.run_folder import STATE
from .training.trainer import Trainer

DEFAULT_RULE = "threshold:0.1"
PNG_MOST = 1000  # samples that become a picture each where nothing else is asked for
SHARD = 1000  # samples
TIMES = 10  # of a picture, at which noise is put on real images


def sample(options: argparse.Namespace) -> None:
    model, n, process = checkpoint.load(options.model), options.n, Process.of(os.environ)
    if n < 0:
        raise ValueError(f"n must be an integer >= 0, got {n}")
    if options.guidance_interval is not None and not options.guidance:
        raise ValueError("--guidance-interval says at which times there is guidance; give --guidance, too")
    configuration = {
        **_configuration(options, model),
        "labels": options.labels,
        "guidance": options.guidance,
        "tied": options.tied,
        "batch_invariant": options.batch_invariant,
        **_given(options, "guidance_interval", "prompt", "text_encoder", "decoder"),
    }
    contexts = _contexts(options, model)

    def sampling(slots: Sequence[int], progress: bool = False) -> sampler.Sampling:
        return sampler.Sampling(
            model,
            len(slots),
            steps=_cycled("steps", options.steps, n, slots),
            solver=options.solver,
            rule=configuration["rule"],
            seeds=[options.seed + slot for slot in slots],
            labels=None if options.labels is None else _cycled("labels", options.labels, n, slots),
            guidance=options.guidance,
            guidance_interval=options.guidance_interval,
            tied=options.tied,
            batch=options.batch,
            batch_invariant=options.batch_invariant,
            **contexts(slots),
            progress=progress,
        )

    decoded = _decoder(options, model)
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


def _contexts(options: argparse.Namespace, model: Model) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    """What text models are told, of the samples at `slots`: contexts of --prompt, cycled, and that of no prompt."""
    network, prompts = model.config.network, options.prompt
    if not network.context_tokens:
        if prompts is not None or options.text_encoder is not None:
            raise ValueError("this model takes no text; leave --prompt and --text-encoder out")
        return lambda slots: {}
    if prompts is None:
        raise ValueError("this model takes text; give --prompt")
    if options.labels is not None:
        raise ValueError("this model takes text; leave --labels out")
    _cycled("prompts", prompts, options.n, ())  # for its check
    *made, null = TextEncoder.load(options.text_encoder or CLIP)([*prompts, ""])
    wanted = (network.context_tokens, network.context_dim)
    if null.shape != wanted:
        raise ValueError(f"this model takes contexts {list(wanted)}, the text encoder makes {list(null.shape)}")

    def of(slots: Sequence[int]) -> dict[str, Tensor]:
        own = [made[slot % len(made)] for slot in slots]
        return {"context": torch.stack(own) if own else null.new_zeros(0, *wanted), "null_context": null}

    return of


def _decoder(options: argparse.Namespace, model: Model) -> Callable[[Tensor], Tensor] | None:
    """What makes images of samples, where --decoder asks for it."""
    if options.decoder is None:
        return None
    if model.config.latent_scale is None:
        raise ValueError("this model makes images, not latents; leave --decoder out")
    if options.format == "npz":
        raise ValueError("--format npz keeps latents; leave --decoder out")
    autoencoder = latents.load_autoencoder(options.decoder)
    return lambda samples: latents.decode(samples, autoencoder, model.config.latent_scale)


def _fill_with_pictures(
    folder: PictureFolder,
    configuration: dict[str, Any],
    sampling: Callable[..., sampler.Sampling],
    decoded: Callable[[Tensor], Tensor] | None,
) -> None:
    out, n = folder.folder, configuration["n"]
    _show({**configuration, "out": out})
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
        _show({**folder.manifest.configuration, "out": out})
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


def train(options: argparse.Namespace) -> None:
    config = train_config(options)
    out = options.out or Path("runs") / Path(options.config or config.preset).stem
    main = Process.of(os.environ).rank == 0
    if main:
        _show({**dataclasses.asdict(config), "out": out})
    trainer = Trainer(config, out)
    if trainer.step and main:
        print(f"{out} holds step {trainer.step} of {config.steps}; going on from there")
    try:
        file = trainer.run()
    except KeyboardInterrupt:
        state = out / STATE  # may lag behind: nothing is saved in the middle of an update
        step = checkpoint.read_tensors(state)[1]["step"] if state.exists() else 0
        there = f"step {step} of {config.steps} is in {out}"
        raise KeyboardInterrupt(f"{there}; the same command goes on from there") from None
    if main:
        print(f"wrote {file}")


def train_config(options: argparse.Namespace) -> TrainConfig:
    """The configuration's values, if there is one, under those of the command line. ValueError for what cannot be."""
    names = (field.name for field in dataclasses.fields(TrainConfig))
    return load_config(options.config, {name: getattr(options, name) for name in names if hasattr(options, name)})


def calibrate(options: argparse.Namespace) -> None:
    model = checkpoint.load(options.model)
    if len(options.steps) != 1:
        raise ValueError(f"a calibration is for one number of steps, got {len(options.steps)}")
    real = None if options.data is None else _held_out(model, options)
    if options.picture is not None:
        matplotlib_figure()  # else it would be missed at the end
    for path in filter(None, (options.out, options.picture)):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"cannot write {path}")
    settings = {
        "aim": options.aim,
        "n": options.n,
        "steps": options.steps[0],
        "solver": options.solver,
        "guidance": options.guidance,
        "seed": options.seed,
        "batch": options.batch,
    }
    calibration = Calibrating(model, options.budget, **settings)  # for its checks
    _show({"model": options.model, "budget": options.budget, **settings, "out": options.out})
    model.calibration = calibration.run(progress=True)
    notes = checkpoint.read_tensors(checkpoint.find(options.model))[1].get("notes", {})
    checkpoint.save(model, options.out, notes)
    print(f"\n{model.calibration}\n")
    if options.picture is not None:
        t = calibration.recording.t
        t = t[torch.linspace(0, len(t) - 1, min(TIMES, len(t))).round().long()]
        noised = None if real is None else (t, *noised_errors(model, *real, t.tolist(), options.seed))
        reliability_picture(calibration.recording, options.picture, noised)
        print(f"wrote {options.picture}")
    print(f"wrote {options.out}; sample it with --rule budget:{model.calibration.budgets[0].share:g}")


def _held_out(model: Model, options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and labels that no training saw, for the picture of a calibration."""
    if options.picture is None:
        raise ValueError("--data is for the picture; give --picture FILE.png, too")
    data, classes = sources.load(options.data, "test"), model.config.classes
    if data.shape != model.backbone.sample_shape or (classes and not 1 <= data.classes <= classes):
        raise ValueError(
            f"data {options.data!r} is {data.shape} in {data.classes} classes, but the model draws "
            f"{model.backbone.sample_shape} in {classes}"
        )
    images, labels = data.batch(torch.arange(min(options.n, len(data))))
    return images, labels if classes else None


def evaluate(options: argparse.Namespace) -> None:
    model, n = checkpoint.load(options.model), options.n
    shape, classes = model.backbone.sample_shape, model.config.classes
    if shape != (1, 8, 8) or classes != 10:
        raise ValueError(
            "evaluation compares with the digits, 1x8x8 in 10 classes; "
            f"{options.model} draws {'x'.join(map(str, shape))} in {classes} classes"
        )
    if n < 2:
        raise ValueError(f"evaluation takes n >= 2 samples, better thousands, got {n}")
    if options.json and (options.json.is_dir() or not os.access(options.json.parent, os.W_OK)):
        raise ValueError(f"cannot write {options.json}")
    configuration = _configuration(options, model)
    labels = [slot % 10 for slot in range(n)]
    settings = {
        "steps": _cycled("steps", options.steps, n, range(n)),
        "solver": options.solver,
        "seeds": list(range(options.seed, options.seed + n)),
        "labels": labels,
        "batch": options.batch,
    }
    rules = list(dict.fromkeys(["full", configuration["rule"]]))
    for rule in rules:
        sampler.Sampling(model, n, rule=rule, **settings)  # for its checks
    _show({**configuration, "labels": "0 to 9 in turn"})
    first = min(n, options.batch)
    sampler.sample(model, first, steps=1, labels=labels[:first])  # else the first rule pays for the start
    results, full = {}, None
    for rule in rules:
        images, report = sampler.sample(model, n, rule=rule, progress=True, **settings)
        results[rule] = _numbers(evaluate_samples(images, torch.tensor(labels), paired=full), report)
        full = images if full is None else full
    _print_table(results)
    print(f"Fréchet distances at {n} samples with 95 % intervals; PSNR: to full from the same noise, median and")
    print("5th percentile; images/s: of one run, `make bench` measures with care")
    if options.json:
        write_json(options.json, {"configuration": configuration, "results": results})
        print(f"wrote {options.json}")


def _numbers(quality: Quality, report: Report) -> dict[str, float | int | None]:
    """JSON has no infinity, the PSNR of equal images: it becomes None, beside a max_difference of 0."""
    values = {
        **dataclasses.asdict(quality),
        "mean_exit_layer": report.mean_exit_layer,
        "layers": report.layers,
        "images_per_second": quality.count / report.seconds,
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def _print_table(results: dict[str, dict[str, Any]]) -> None:
    head = ("rule", "Fréchet distance", "accuracy", "PSNR in dB", "exit layer", "images/s")
    rows = [head]
    for rule, r in results.items():
        psnr = "" if r["max_difference"] is None else "equal"
        if r["psnr_median"] is not None:
            psnr = f"{r['psnr_median']:.1f}, {r['psnr_p5'] or math.inf:.1f}"
        rows.append(
            (
                rule,
                f"{r['frechet']:.2f} [{r['frechet_low']:.2f}, {r['frechet_high']:.2f}]",
                f"{r['accuracy']:.1%}",
                psnr,
                f"{r['mean_exit_layer']:.2f} of {r['layers']}",
                f"{r['images_per_second']:.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    print()


def convert(options: argparse.Namespace) -> None:
    done = conversion.convert(options.source, options.dest, options.preset, options.served_by)
    _show(
        {
            "read": done.source,
            "part": done.part or "all",
            "layout": done.layout,
            "preset": done.preset,
            "served_by": done.served_by,
            **done.config.to_dict(),
            "parameters": f"{done.parameters:,}",
        }
    )
    print(f"wrote {options.dest}")


def inspect(options: argparse.Namespace) -> None:
    content = describe(options.model)
    if options.json:
        print(json.dumps(content, indent=2))
        return
    calibration = content.pop("calibration", None)
    if "presets" in content:
        content["presets"] = " or ".join(content["presets"])
    for name in ("parameters", "macs"):
        numbers = content.get(name)
        if isinstance(numbers, dict):
            content[name] = {key: f"{value:,}" for key, value in numbers.items()}
    _show(content)
    if calibration is not None:
        print(f"\n{Calibration.from_dict(calibration)}")
        print("\nbudget  time: uncertainty below which a sample leaves, after blocks 1, 2, ...")
        for budget in calibration["budgets"]:
            for t, thresholds in zip(calibration["t"], budget["thresholds"], strict=True):
                print(f"{budget['share']:<7g} {t:g}: {' '.join(f'{value:.3g}' for value in thresholds)}")
    if "layout" in content:
        print("not a file of ours yet: adadiff convert makes one of it")


def _configuration(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    with checkpoint.find(options.model).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "model": options.model,
        "model_sha256": digest,
        "n": options.n,
        "steps": options.steps,
        "solver": options.solver,
        "rule": options.rule or (DEFAULT_RULE if model.exits is not None else "full"),
        "seed": options.seed,
        "batch": options.batch,
    }


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those options that were given, as JSON keeps them."""
    values = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {name: str(value) if isinstance(value, Path | tuple) else value for name, value in values.items()}


def _cycled(name: str, values: list[int], n: int, slots: Sequence[int]) -> list[int]:
    if n and len(values) > n:
        raise ValueError(f"{len(values)} {name} for {n} samples; give at most one each")
    return [values[slot % len(values)] for slot in slots]


def _show(values: dict[str, Any], prefix: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            _show(value, f"{prefix}{name}.")
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value)) + (", cycled over the samples" if len(value) > 1 else "")
        print(f"{prefix + name:25} {'none' if value in (None, {}) else value}")
