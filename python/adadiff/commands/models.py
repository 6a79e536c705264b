"""adadiff convert, adadiff inspect."""

import argparse
import json

import torch

from .. import checkpoint
from ..conversion import convert as conversion
from .shared import show


def convert(options: argparse.Namespace) -> None:
    done = conversion.convert(options.source, options.dest, options.preset, options.served_by)
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
    model, path = checkpoint.load(options.model), checkpoint.find(options.model)
    network, exits = model.backbone, model.exits
    stem, head = network.fixed_macs()
    blocks = [(block.skip_from is not None, block.macs(network.tokens)) for block in network.blocks]
    macs = {
        "full evaluation": stem + sum(cost for _, cost in blocks) + head,
        "stem": stem,
        **{"block with skip" if skip else "block": cost for skip, cost in blocks},
        "head": head,
    }
    if exits is not None:
        macs["score after a block"] = exits.macs(network.tokens - exits.extras)
    content = {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        **model.config.to_dict(),
        "classes": model.config.classes,
        "blocks": model.layers,
        "tokens": network.tokens,
        "parameters": {"network": _parameters(network), "exits": _parameters(exits)},
        "macs": macs,
        "notes": checkpoint.read_tensors(path)[1].get("notes", {}),
    }
    if options.json:
        print(json.dumps(content, indent=2))
        return
    for name in ("parameters", "macs"):
        content[name] = {key: f"{value:,}" for key, value in content[name].items()}
    show(content)


def _parameters(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
