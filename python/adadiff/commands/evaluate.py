"""adadiff evaluate: measures samples drawn from a model, or images that exist already."""

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..metrics.extractors import FEATURES
from ..metrics.frechet import paired_ratio
from ..metrics.images import ImageSet, is_images, open_images
from ..metrics.judges import Judge, judge_of
from ..metrics.quality import Measured, Quality, measure
from ..metrics.references import Reference
from ..metrics.yardsticks import Yardstick
from ..model import Model
from ..output.pictures import CHANNELS, write_json
from ..policies.spelling import DEFAULT
from ..sampling import sampler
from ..writing import check_outputs
from .shared import check_limits, check_policy, cycled, decoder, execution_of, file_of, load_model, resolved, steps_of
from .terminal import print_table, say, show, with_bars

MOST_SAMPLES = 10**6  # all are held in memory
MOST_DRAWS = 2 * 10**8  # samples drawn by all bootstrap resamples together


def evaluate(options: argparse.Namespace) -> None:
    check_outputs(options.force, options.json, inputs=(options.model, options.reference, file_of(options.features)))
    check_limits(options, MOST_SAMPLES)
    if options.resamples < 2:
        raise ValueError(f"--resamples takes at least 2, got {options.resamples}")
    drawn = is_images(options.model)
    configuration, results, judge = (_of_images if drawn else _of_model)(options)
    content = {"configuration": configuration, "results": results}
    if judge is not None:
        content = {"real": _json(dataclasses.asdict(_real(judge))), **content}
    try:
        if options.json:
            write_json(options.json, content, rank=None, force=options.force)
    finally:  # print the numbers even if the disk is full
        _print(results, content.get("real"))
    if options.json:
        say(f"wrote {options.json}")


def _check_resamples(resamples: int, n: int) -> None:
    if resamples * n > MOST_DRAWS:
        raise ValueError(f"--resamples {resamples} of {n} samples are more than {MOST_DRAWS:,} draws; give fewer")


def _of_model(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], Judge | None]:
    model, n = load_model(options), options.n
    if n < 2:
        raise ValueError(f"evaluation takes n >= 2 samples, better thousands, got {n}")
    _check_resamples(options.resamples, n)
    if model.config.network.context_tokens:
        raise ValueError(
            "evaluate draws samples of classes or without a condition, but this model takes text: draw a folder of "
            "images with `adadiff sample`, then evaluate the folder"
        )
    decode = decoder(options, model)
    shape = model.backbone.sample_shape
    shown = (
        shape if decode is None else tuple(decode(torch.zeros(0, *shape, dtype=torch.float32, device="cpu")).shape[1:])
    )
    pictures = shown[0] in CHANNELS
    if not pictures and (options.features or options.reference):
        raise ValueError(f"these are latents, {shown[0]} channels: --decoder FOLDER makes images of them")
    classes = model.config.classes
    yardstick = Yardstick.of(shown, judge_of(shown, classes), options.features, options.reference)
    given = options.class_labels or list(range(classes))[:n]
    labels = cycled("class labels", given, n, range(n)) if given else None
    policies = options.policy or [DEFAULT]
    configuration = {
        **resolved(options),
        "policy": policies,
        "class_labels": options.class_labels,
        "features": None if yardstick.features is None else yardstick.features.name,
        "reference": _named(options.reference) or ("held out" if yardstick.features else None),
        **({} if options.decoder is None else {"decoder": str(options.decoder)}),
    }
    settings = {
        "steps": steps_of(options, n, range(n)),
        "solver": options.solver,
        "seed": options.seed,
        "class_labels": labels,
        "guidance_scale": options.guidance_scale,
        "batch": options.batch,
        "execution": execution_of(options),
    }
    policies = list(dict.fromkeys(["full", *policies]))
    if yardstick.features is None and len(policies) == 1:
        raise ValueError("the full network alone, with nothing to compare it with: give --reference and --features")
    for policy in policies:
        check_policy(model, policy)
        sampler.SamplerRun(model, n, policy=policy, **settings)  # raises before the first policy is drawn
    show({**configuration, "policy": ", ".join(policies), "class_labels": options.class_labels or _in_turn(labels)})
    for line in yardstick.too_few(n):
        print(line)
    reference = yardstick.reference(progress=with_bars())
    _warm_up(model, min(n, options.batch), settings)
    results, full, full_features, full_macs = {}, None, None, 0
    for policy in policies:
        samples, report = sampler.sample(model, n, policy=policy, progress=with_bars(), **settings)
        full_macs = full_macs or report.macs_full  # at the requested steps; a cascade takes other numbers of steps
        pieces = _pieces(samples, labels, full, decode, options.batch)
        peak = 1.0 if pictures or full is None else float(full.abs().max())
        measured = measure(pieces, yardstick.features, yardstick.judge, 2 * peak)
        results[policy] = {
            **_numbers(measured, reference, full_features, options.resamples),
            "mean_exit_layer": report.mean_exit_layer,
            "work": report.macs / full_macs,
            "num_layers": report.num_layers,
            "images_per_second": n / report.seconds,
            **({} if report.reused is None else {"reused": report.reuses / report.passes}),
        }
        full = samples if full is None else full
        full_features = measured.features if full_features is None else full_features
    return configuration, results, yardstick.judge


def _of_images(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], Judge | None]:
    for_models = [name for name, default in options.sampling.items() if getattr(options, name) != default]
    if for_models:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in for_models)
        raise ValueError(f"{given}: only for a model, but {options.model} holds images")
    images = open_images(options.model)
    if images.count < 2:
        raise ValueError(f"{options.model} holds {images.count} image; evaluation takes at least 2, better thousands")
    _check_resamples(options.resamples, images.count)
    judge = judge_of(images.shape, name=options.features)
    if options.features is None:
        raise ValueError(f"distances between images need features: give --features, {FEATURES.forms()}")
    yardstick = Yardstick.of(images.shape, judge, options.features, options.reference)
    labels = images.labels
    if options.class_labels is not None:
        given = cycled("class labels", options.class_labels, images.count, range(images.count))
        labels = torch.tensor(given, dtype=torch.int64, device="cpu")
    if judge is not None and labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < judge.classes:
        some = sorted(set(labels.tolist()))[:12]
        raise ValueError(f"labels must be in 0..{judge.classes - 1} for {judge.name}, got {some}")
    configuration = {
        "images": options.model,
        "count": images.count,
        "shape": list(images.shape),
        "class_labels": options.class_labels or ("of the folder" if labels is not None else None),
        "features": yardstick.features.name,
        "reference": _named(options.reference) or "held out",
    }
    show({**configuration, "shape": "x".join(map(str, images.shape))})
    for line in yardstick.too_few(images.count):
        print(line)
    reference = yardstick.reference(progress=with_bars())
    measured = measure(_read(images, labels), yardstick.features, judge)
    return configuration, {"images": _numbers(measured, reference, None, options.resamples)}, judge


def _warm_up(model: Model, n: int, settings: dict[str, Any]) -> None:
    """One step of `n` samples, so that the time of the first policy excludes one-off start-up costs."""
    labels = settings["class_labels"]
    labels = None if labels is None else labels[:n]
    shared = {name: settings[name] for name in ("guidance_scale", "execution")}
    sampler.sample(model, n, class_labels=labels, steps=1, **shared)


def _pieces(
    samples: Tensor, labels: Sequence[int] | None, full: Tensor | None, decode: Any, batch: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Pieces for `measure`: images, labels, and the full network's images of the same noise. Latents are decoded piece
    by piece, because the images of all samples would not fit in memory."""
    for start in range(0, len(samples), batch):
        part = slice(start, start + batch)
        images, paired = (None if s is None else s[part] for s in (samples, full))
        if decode is not None:
            images, paired = (None if s is None else decode(s) for s in (images, paired))
        yield images, None if labels is None else torch.tensor(labels[part], dtype=torch.int64, device="cpu"), paired


def _read(images: ImageSet, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None, None]]:
    done = 0
    for piece in images.pieces(progress=with_bars()):
        yield piece, None if labels is None else labels[done : done + len(piece)], None
        done += len(piece)


def _numbers(measured: Measured, reference: Reference | None, full: Tensor | None, resamples: int) -> dict[str, Any]:
    values = dataclasses.asdict(measured.quality(reference, resamples=resamples))
    ratio = None
    if reference is not None and full is not None:
        ratio = dataclasses.asdict(paired_ratio(measured.features, full, reference.statistics, resamples=resamples))
    return _json({**values, "frechet_over_full": ratio})


def _real(judge: Judge) -> Quality:
    """The judge's accuracy on held-out real images, the upper bound for any model."""
    images, labels = judge.held_out()
    return measure([(images, labels, None)], judge=judge).quality()


def _named(reference: Path | None) -> str | None:
    return None if reference is None else str(reference)


def _in_turn(labels: Sequence[int] | None) -> str | None:
    return None if labels is None else f"0 to {max(labels)} in turn"


def _json(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, the PSNR of equal images: it becomes None, beside a max_difference of 0."""
    return {
        name: _json(v) if isinstance(v, dict) else None if isinstance(v, float) and not math.isfinite(v) else v
        for name, v in values.items()
    }


def _print(results: dict[str, dict[str, Any]], real: dict[str, Any] | None) -> None:
    lines = {"real, held out": real, **results} if real is not None else results
    rows = [
        {
            "": name,
            "Fréchet distance": _with_ends(r, "frechet", ".2f"),
            "over full": _ratio(r),
            "kernel distance": _with_ends(r, "kernel", ".3g"),
            "accuracy": _with_ends(r, "accuracy", ".1%"),
            "PSNR in dB": _psnr(r),
            "max": "" if r["max_difference"] is None else f"{r['max_difference']:.2g}",
            "work": f"{r['work']:.1%}" if "num_layers" in r else "",
            "exit layer": f"{r['mean_exit_layer']:.2f} of {r['num_layers']}" if "num_layers" in r else "",
            "images/s": f"{r['images_per_second']:.1f}" if "num_layers" in r else "",
        }
        for name, r in lines.items()
    ]
    print_table(rows)
    if any(r["shares"] for r in lines.values()):
        groups = list(dict.fromkeys(name for r in lines.values() for name in r["shares"]))
        print_table([{"": n} | {g: _share(r["shares"].get(g)) for g in groups} for n, r in lines.items()])
    count = next(iter(results.values()))["count"]
    print(f"distances of {count} samples; [95 % intervals], of distances by resampling the samples")
    if len(results) > 1:
        print("PSNR: to full from the same noise, median and 5th percentile; max: the largest difference to it;")
    if any("num_layers" in r for r in results.values()):
        print("work: share of the full network's multiply-adds; images/s: of one run, `make bench` measures with care")


def _with_ends(r: dict[str, Any], name: str, form: str) -> str:
    if r[name] is None:
        return ""
    return f"{r[name]:{form}} [{r[f'{name}_low']:{form}}, {r[f'{name}_high']:{form}}]"


def _ratio(r: dict[str, Any]) -> str:
    ratio = r.get("frechet_over_full")
    return "" if ratio is None else f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _share(share: dict[str, float] | None) -> str:
    return "" if share is None else f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


def _psnr(r: dict[str, Any]) -> str:
    if r["psnr_median"] is None:
        return "" if r["max_difference"] is None else "equal"
    return f"{r['psnr_median']:.1f}, {r['psnr_p5'] or math.inf:.1f}"
