"""Prompts from a file, for the commands that calibrate or train on many of them."""

import argparse

import torch
from torch import Tensor

from ..model import Model
from ..pipelines.text import CLIP, TextEncoder
from ..reading import read_text


def texts_of(options: argparse.Namespace, model: Model) -> dict[str, Tensor]:
    """`text_embeds` of the lines of --prompts, and `null_text_embeds` of the empty prompt; {} for a model without text.
    Raises ValueError for options that do not fit the model, and for a file without prompts."""
    if not model.config.network.context_tokens:
        if options.prompts is not None or options.text_encoder is not None:
            raise ValueError("this model takes no text; leave --prompts and --text-encoder out")
        return {}
    if options.prompts is None:
        raise ValueError("this model takes text; give --prompts, a file with one prompt a line")
    prompts = [line.strip() for line in read_text(options.prompts).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{options.prompts} holds no prompt; write one a line")
    *made, null = TextEncoder.load(options.text_encoder or CLIP)([*prompts, ""])
    return {"text_embeds": torch.stack(made), "null_text_embeds": null}
