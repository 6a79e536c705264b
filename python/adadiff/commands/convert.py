"""adadiff convert."""

import argparse

from ..conversion import convert as conversion
from ..writing import check_outputs, replace_file
from .terminal import say, show


def convert(options: argparse.Namespace) -> None:
    check_outputs(options.force, options.dest, inputs=[options.source, options.preset])
    settings = options.preset, options.served_by, options.dtype, options.drop_first_exit
    done = replace_file(
        options.dest,
        lambda temporary: conversion.convert(options.source, temporary, *settings),
        force=options.force,
    )
    show(
        {
            "read": done.source,
            "part": done.part or "all",
            "layout": done.layout,
            **({} if done.dropped is None else {"left out": done.dropped}),
            **({} if done.assumed is None else {"taken for": done.assumed}),
            "preset": done.preset,
            "served_by": done.served_by,
            **done.config.to_dict(),
            "parameters": f"{done.parameters:,}",
        }
    )
    say(f"wrote {options.dest}")
