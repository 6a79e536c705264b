"""adadiff convert, adadiff inspect."""

import argparse
import json

from ..conversion import convert as conversion
from ..conversion.describing import describe
from ..policies.calibrated import Calibration
from .shared import show


def convert(options: argparse.Namespace) -> None:
    done = conversion.convert(options.source, options.dest, options.preset, options.served_by, options.dtype)
    show(
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
    show(content)
    if calibration is not None:
        print(f"\n{Calibration.from_dict(calibration)}")
        print("\nbudget  time: uncertainty below which a sample exits, after blocks 1, 2, ...")
        for budget in calibration["budgets"]:
            for t, thresholds in zip(calibration["t"], budget["thresholds"], strict=True):
                print(f"{budget['share']:<7g} {t:g}: {' '.join(f'{value:.3g}' for value in thresholds)}")
    if "layout" in content:
        print("not a file of ours yet: adadiff convert makes one of it")
