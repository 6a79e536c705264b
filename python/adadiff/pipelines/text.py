"""Prompts to contexts for text models: CLIP's text encoder, as U-ViT uses it. Needs transformers."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

CLIP = "openai/clip-vit-large-patch14"  # of U-ViT's MS-COCO models: 77 tokens of 768 channels


@dataclass(frozen=True)
class TextEncoder:
    """Encodes prompts when called. Created by `load`."""

    tokenizer: "CLIPTokenizer"
    model: "CLIPTextModel"

    @staticmethod
    def load(folder: str | Path = CLIP, device: torch.device | str = "cpu") -> "TextEncoder":
        """Loads tokenizer and text model saved by transformers in `folder`, or by their name on the hub.

        Raises ValueError if there are none, ImportError without transformers.
        """
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError as error:
            raise ImportError("prompts take transformers: pip install 'adadiff_kernels[text]'") from error
        try:
            tokenizer, model = CLIPTokenizer.from_pretrained(folder), CLIPTextModel.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"cannot open a CLIP tokenizer and text model at {folder}: {error}") from error
        return TextEncoder(tokenizer, model.requires_grad_(False).eval().to(device))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], batch: int = 64) -> Tensor:
        """Contexts of prompts, float32 [n, N, E] on the CPU: the normalised last hidden states of prompts padded to N
        tokens. The unconditional context for guidance is that of "".

        Longer prompts are cut, with a warning. Raises ValueError for anything but a list of strings.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts) or batch < 1:
            raise ValueError(f"prompts must be a list of strings and batch at least 1, got {prompts!r} and {batch}")
        most = self.model.config.max_position_embeddings
        for prompt in prompts:
            if (count := len(self.tokenizer(prompt).input_ids)) > most:
                warnings.warn(f"the text encoder reads {most} of the {count} tokens of {prompt!r}", stacklevel=2)
        contexts = []
        for i in range(0, len(prompts), batch):
            tokens = self.tokenizer(
                list(prompts[i : i + batch]),
                truncation=True,
                max_length=most,
                padding="max_length",
                return_tensors="pt",
            )
            # without a padding mask, as in U-ViT's code
            contexts.append(self.model(tokens.input_ids.to(self.model.device)).last_hidden_state.float().cpu())
        if not contexts:
            return torch.zeros(0, most, self.model.config.hidden_size, dtype=torch.float32, device="cpu")
        return torch.cat(contexts)
