"""adadiff inspect: a summary of a model, or every setting (--all, --json)."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ..calibration.threshold_picture import threshold_picture
from ..conversion.describing import describe
from ..output.pictures import CHANNELS
from ..policies.calibrated import Calibration
from ..policies.step_selector import SelectorConfig
from ..writing import check_outputs, replace_file
from .shared import drawn_as, labels_to_try
from .step_choices import show_choices
from .terminal import bold, print_table, printable, say, show, show_lines, way_of_drawing

FAMILY_NAMES = {"uvit": "U-ViT", "dit": "DiT"}
COLOURS = {1: "grey", 3: "colour"}
MOST_SECONDS = 1e12  # of training; notes of a file may hold any number, and larger ones are not shown
NEEDED = {"duodiff": " --drop-first-exit", "diffusers": " --served-by diffusers"}  # options of convert, by layout
HEADS = {"linear": "a linear layer", "mlp": "an MLP", "block": "a transformer block"}


def inspect(options: argparse.Namespace) -> None:
    picture = options.picture
    check_outputs(options.force, picture, inputs=[options.model])
    content = describe(options.model)
    calibration = None if content.get("calibration") is None else Calibration.from_dict(content["calibration"])
    if picture is not None and calibration is None:
        raise ValueError(f"{options.model} has no thresholds to draw: it is not calibrated; leave --picture out")
    if picture is not None:
        replace_file(picture, lambda temporary: threshold_picture(calibration, temporary), force=options.force)
    if options.json:
        print(json.dumps(content, indent=2))
    elif options.all:
        _show_all(content, calibration)
    else:
        _summary(options.model, content, calibration)
    if picture is not None and not options.json:
        say(f"wrote {picture}")


def _summary(name: str, content: Mapping[str, Any], calibration: Calibration | None) -> None:
    ours = "layout" not in content
    show(
        {
            "file": f"{content['file']} ({_bytes(content['file_bytes'])})",
            **({} if ours else {"layout": _layout(content)}),
            **({"draws": _draws(content), "network": _network(content)} if "network" in content else {}),
            "cost": _cost(content),
            **({"widths": _widths(content)} if content.get("widths") else {}),
            "exits": _exits(content),
            **({"training": _training(content)} if ours else {}),
            **({"steps": _steps(content["step_selector"])} if content.get("step_selector") is not None else {}),
        }
    )
    if calibration is not None:
        _show_budgets(calibration)
    if content.get("step_selector") is not None:
        show_choices(SelectorConfig.from_dict(content["step_selector"]), content["steps_of_classes"])
    print()
    if ours:
        how = f"--policy {_policy_to_try(content, calibration)}"
        if calibration is not None:
            held = calibration.steps, calibration.solver, calibration.guidance_scale
            how = f"{drawn_as(*held, content['classes'])} {how}"
        else:
            steps = "" if content["step_selector"] is None else "--steps auto "
            how = f"{labels_to_try(content['classes'])}{steps}{how}"
        print("try: " + bold(f"adadiff sample {printable(name)} --out samples {how}"))
        print("more: --all (every setting and threshold), --json" + (", --picture FILE.png" if calibration else ""))
    else:
        preset = f" --preset {content['presets'][0]}" if len(content["presets"]) > 1 else ""
        more = preset + NEEDED.get(content["layout"], "")
        print("convert it first: " + bold(f"adadiff convert {printable(name)} model.safetensors{more}"))
        print("more: --all (every setting that can be told), --json")


def _layout(content: Mapping[str, Any]) -> str:
    presets = " or ".join(content["presets"])
    return f"{content['layout']}, {content['tensors']} tensors; preset: {presets or 'none has these shapes'}"


def _draws(content: Mapping[str, Any]) -> str:
    network = content["network"]
    size, channels = network["image_size"], network["channels"]
    if content["latent_scale"] is None and channels in CHANNELS:
        what = f"{size} x {size} images, {COLOURS[channels]}"
    else:
        what = f"latents of {channels} x {size} x {size}, which an autoencoder decodes"
    if network.get("context_tokens"):
        return f"{what}, from prompts (text of {network['context_tokens']} tokens, {network['context_dim']} channels)"
    return f"{what}, {content['classes']} classes" if content["classes"] else f"{what}, without classes"


def _network(content: Mapping[str, Any]) -> str:
    return (
        f"{FAMILY_NAMES.get(content['family'], content['family'])}: {content['num_layers']} blocks, "
        f"{content['network']['dim']} channels, {content['tokens']} tokens; "
        f"{_count(content['parameters']['network'])} parameters; schedule {content['schedule']}, "
        f"predicts {content['prediction_type']}"
    )


def _cost(content: Mapping[str, Any]) -> str:
    macs = content.get("macs")
    if macs is None:
        return f"{_count(content['parameters'])} parameters; no preset has these shapes, so the cost is unknown"
    blocks = sorted({macs[name] for name in ("block", "block with skip") if name in macs})
    block = " or ".join(_count(cost) for cost in blocks)
    return f"{_count(macs['full forward pass'])} multiply-adds a forward pass, {block} a block"


def _widths(content: Mapping[str, Any]) -> str:
    widths = ", ".join(f"{width:g}" for width in content["widths"])
    return f"{widths} of the heads and MLP channels; `adadiff sample --policy width:SHARE`, or a schedule"


def _exits(content: Mapping[str, Any]) -> str:
    exits = content.get("exits")
    if exits is None:
        return "none; `adadiff train --recipe frozen --init FILE` adds them and leaves the network's weights alone"
    head = "the network's own head, shared" if exits["shared_head"] else f"{HEADS[exits['head']]} each"
    score = "pixel" if exits["map"] else "token" if exits["every_token"] else "patch"
    return (
        f"after each of blocks 1 to {content['num_layers'] - 1}: an uncertainty per {score}, averaged; as head {head}; "
        f"{_count(content['parameters']['exits'])} parameters"
    )


def _training(content: Mapping[str, Any]) -> str:
    notes = content["notes"]
    train, seconds = notes.get("train"), notes.get("seconds")
    if not train or not isinstance(train, Mapping):
        return "converted or saved without notes"
    data, batch, steps = train.get("data", train.get("preset", "")), train.get("batch", "?"), train.get("steps", 0)
    minutes = f", {seconds / 60:.0f} minutes" if type(seconds) in (int, float) and 0 <= seconds < MOST_SECONDS else ""
    last = "last run: " if train.get("init") else ""
    return f"{last}{f'{steps:,}' if type(steps) is int else '?'} updates of {batch} images of {data}{minutes}"


def _steps(selector: Mapping[str, Any]) -> str:
    reads = "class" if selector["num_classes"] else "prompt"
    candidates = ", ".join(map(str, selector["candidates"]))
    return (
        f"--steps auto chooses {candidates} by the {reads} of a sample, with solver {selector['solver']} and guidance "
        f"scale {selector['guidance_scale']:g}"
    )


def _show_budgets(calibration: Calibration) -> None:
    """Work and quality at each budget, on samples that were not used for choosing the thresholds."""
    print_table(
        [
            {
                "policy": f"exit:budget={budget.share:g}",
                "work": f"{budget.adaptive.share:.0%}",
                "mean exit layer": f"{budget.adaptive.depth:.2f} of {calibration.num_layers}",
                "PSNR": "" if budget.adaptive.psnr is None else f"{budget.adaptive.psnr:.1f} dB",
                "Fréchet to full": "" if budget.adaptive.frechet is None else f"{budget.adaptive.frechet:.3g}",
                "error over timestep table": ""
                if budget.ratio is None
                else "{:.2f} ({:.2f} to {:.2f})".format(*budget.ratio),
            }
            for budget in calibration.budgets
        ]
    )
    way = way_of_drawing(calibration.steps, calibration.solver, calibration.guidance_scale)
    print(f"Measured with {way}, on samples of all classes that were not used for")
    print(
        "the thresholds. work: share of the full network's multiply-adds, on average: other steps, guidance or classes"
    )
    print("take more or less. PSNR: to the full network's images of the same noise, median (blank if infinite).")
    if any(budget.adaptive.frechet is not None for budget in calibration.budgets):
        print("Fréchet to full: distance between the features of these images and of the full network's.")
    print("error over timestep table: squared error, over that of exits chosen by timestep alone")
    print("for the same work, with its 95 % interval; below 1, deciding for each sample pays.")


def _policy_to_try(content: Mapping[str, Any], calibration: Calibration | None) -> str:
    if calibration is not None:
        shares = [budget.share for budget in calibration.budgets]
        return f"exit:budget={min(shares, key=lambda share: abs(share - 0.55)):g}"
    return "exit:0.1" if content["exits"] is not None else "full"


def _show_all(content: dict[str, Any], calibration: Calibration | None) -> None:
    content.pop("calibration", None)
    if "presets" in content:
        content["presets"] = " or ".join(content["presets"])
    for name in ("parameters", "macs"):
        numbers = content.get(name)
        if isinstance(numbers, dict):
            content[name] = {key: f"{value:,}" for key, value in numbers.items()}
    show(content)
    if calibration is not None:
        show_lines(f"\n{calibration}")
        print("\nbudget  time: uncertainty below which a sample exits, after blocks 1, 2, ...")
        for budget in calibration.budgets:
            for t, thresholds in zip(calibration.t, budget.thresholds, strict=True):
                print(f"{budget.share:<7g} {t:g}: {' '.join(f'{value:.3g}' for value in thresholds)}")


def _count(number: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size / 10:
            return f"{number / size:.2f} {word}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
