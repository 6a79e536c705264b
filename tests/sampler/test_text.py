"""Prompts through a tiny CLIP text encoder with random weights and a vocabulary of letters."""

import sys
from pathlib import Path

import pytest
import torch

from adadiff.pipelines.text import TextEncoder
from sampler.clip import make_clip

TOKENS = 11  # begin, nine letters, end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"), TOKENS)


def test_contexts_are_the_last_hidden_states_of_padded_prompts(folder: Path) -> None:
    """U-ViT, libs/clip.py: no attention mask, so the padding is read as it is."""
    encoder, prompts = TextEncoder.load(folder), ["cat", "", "a dog"]
    contexts = encoder(prompts)
    assert contexts.shape == (3, TOKENS, 12)
    begin, end = 52, 53
    spelt = [[2, 0, 26 + 19], [], [26 + 0, 3, 14, 26 + 6]]  # the last letter of a word has a token of its own
    for context, letters in zip(contexts, spelt, strict=True):
        ids = [begin, *letters, *[end] * (TOKENS - 1 - len(letters))]
        wanted = encoder.model(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(context, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(contexts[0], contexts[1], atol=1e-3)


def test_batches_make_no_difference(folder: Path) -> None:
    encoder, prompts = TextEncoder.load(folder), ["cat", "dog", "bird", "a", "b"]
    torch.testing.assert_close(encoder(prompts, batch=2), encoder(prompts), rtol=1e-5, atol=1e-5)
    assert encoder([]).shape == (0, TOKENS, 12)


def test_a_prompt_that_is_cut_is_named(folder: Path) -> None:
    encoder = TextEncoder.load(folder)
    with pytest.warns(UserWarning, match="reads 11 of the 12 tokens of 'abcdefghij'"):
        cut = encoder(["abcdefghij"])
    assert cut.shape == (1, TOKENS, 12)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.load(folder)
    for prompts in ("a cat", [3], [None]):
        with pytest.raises(ValueError, match="prompts must be a list of strings"):
            encoder(prompts)
    with pytest.raises(ValueError, match="cannot open a CLIP tokenizer and text model at"):
        TextEncoder.load(tmp_path)


def test_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'adadiff_kernels\[text\]'"):
        TextEncoder.load(tmp_path)
