"""Offloading as diffusers does it: weights come to the device one component after another, and go when it is done.

The device is a pretended one, which refuses operators that mix it with the CPU.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from adadiff.config import ModelConfig
from adadiff.models.uvit import UViTConfig
from adadiff.pipelines.pipeline import AdaDiffPipeline, AdaDiffTransformer
from pretend import DEVICE, OnDevice, PretendDevice
from sampler.test_pipeline import LATENT, seeded, vae
from sampler.tiny import SERVED, served

TEXT = ModelConfig(
    UViTConfig(4, 4, 2, 16, 2, 2, context_tokens=3, context_dim=5), "stable_diffusion", latent_scale=0.23010
)
PROMPTS = {"prompt": ["a cat", "banana"], "guidance_scale": 2.0}
LABELS = {"class_labels": [0, 2], "guidance_scale": 2.5, "policy": "exit:0.5"}


class Tokenizer:
    def __call__(self, prompts: str | list[str], **_: object) -> SimpleNamespace:
        texts = [prompts] if isinstance(prompts, str) else prompts
        ids = torch.tensor([[len(text), text.count("a"), 1] for text in texts])
        return SimpleNamespace(input_ids=ids[0].tolist() if isinstance(prompts, str) else ids)


class Encoder(nn.Module):
    config = SimpleNamespace(max_position_embeddings=3, hidden_size=5)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 5)

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.table.weight.dtype

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(ids))


def made(kind: str) -> AdaDiffPipeline:
    """Of components of its own: moving them replaces their parameters."""
    own = {"transformer": LATENT, "vae": copy.deepcopy(vae())} if kind == "labels" else {"transformer": SERVED}
    if kind == "text":
        own = {"transformer": TEXT, "vae": copy.deepcopy(vae()), "tokenizer": Tokenizer(), "text_encoder": Encoder()}
    own["transformer"] = AdaDiffTransformer.of(copy.deepcopy(served(own["transformer"])))
    pipe = AdaDiffPipeline(**own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def on_device(pipe: AdaDiffPipeline) -> list[str]:
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    return [name for name, module in modules.items() if next(module.parameters()).device == DEVICE]


def watch(pipe: AdaDiffPipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Grows with every call of a component: its name, and the components that are on the device then. Call it before
    hooks take the place of the methods."""
    met = []

    def spy(name: str, owner: type, method: str) -> None:
        original = getattr(owner, method)

        def called(self: nn.Module, *arguments: object, **options: object) -> object:
            if met[-1:] != [now := (name, on_device(pipe))]:
                met.append(now)
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, method, called)

    spy("text_encoder", Encoder, "forward")
    spy("transformer", AdaDiffTransformer, "forward")
    spy("vae", AutoencoderKL, "_decode")
    return met


@pytest.mark.parametrize(
    ("kind", "output_type", "names"),
    [
        ("text", "pil", ["text_encoder", "transformer", "vae"]),
        ("labels", "pt", ["transformer", "vae"]),
        ("labels", "latent", ["transformer"]),
        ("pixels", "np", ["transformer"]),
    ],
)
def test_one_component_at_a_time_lies_on_the_device(
    kind: str, output_type: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    given = {"num_inference_steps": 3, "output_type": output_type, **(PROMPTS if kind == "text" else LABELS)}
    wanted = made(kind)(generator=seeded(), **given)
    pipe = made(kind)
    met = watch(pipe, monkeypatch)
    with PretendDevice():
        pipe.enable_model_cpu_offload(device=DEVICE)
        for _ in range(2):  # hooks are made anew after a call
            met.clear()
            found = pipe(generator=seeded(), **given)
            assert met == [(name, [name]) for name in names]
            assert on_device(pipe) == []
    assert torch.equal(found.report.exit_layer, wanted.report.exit_layer)
    images = found.images.held if isinstance(found.images, OnDevice) else found.images
    for a, b in zip(images, wanted.images, strict=True):
        given, expected = (np.asarray(image, dtype=np.float64) for image in (a, b))
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1 if output_type == "pil" else 1e-4)


def test_every_component_with_weights_is_in_the_sequence() -> None:
    pipe = made("text")
    weights = {name for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    assert weights == set(pipe.model_cpu_offload_seq.split("->")) == {"text_encoder", "transformer", "vae"}
    assert set(pipe.components) == weights | {"tokenizer"}
    assert set(pipe._optional_components) == set(pipe.components) - {"transformer"}


def test_modules_are_not_offloaded_one_by_one() -> None:
    with pytest.raises(ValueError, match="reads weights outside module calls; use enable_model_cpu_offload"):
        made("pixels").enable_sequential_cpu_offload(device=DEVICE)
