"""Text contexts for the prompts of a folder of samples."""

import torch

from ..model import Model
from ..output.asked import Asked, Texts
from .text import CLIP, TextEncoder


def contexts_of(asked: Asked, model: Model) -> Texts | None:
    """Contexts of the prompts and of the empty prompt; None for models without text. Raises ValueError for a text
    encoder that does not fit the model."""
    network, prompts = model.config.network, asked.prompt
    if not network.context_tokens:
        return None
    *made, null = TextEncoder.load(asked.text_encoder or CLIP)([*prompts, ""])
    wanted = (network.context_tokens, network.context_dim)
    if null.shape != wanted:
        raise ValueError(f"this model takes text {list(wanted)}, the text encoder makes {list(null.shape)}")
    return Texts(torch.stack(made), null)
