"""A tiny CLIP text encoder with random weights and a vocabulary of letters, as transformers saves one."""

import json
from pathlib import Path

import pytest
import torch


def make_clip(folder: Path, tokens: int, channels: int = 12) -> Path:
    """Contexts [tokens, channels]: begin, letters, end. Skips the test where transformers is missing."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=channels,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=tokens,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    torch.manual_seed(0)
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder
