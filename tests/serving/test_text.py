"""Models of text and of latents: prompts become contexts, latents become pictures, outside of the event loop."""

import asyncio
import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adadiff.engine.engine import Engine
from adadiff.pipelines.text import TextEncoder
from adadiff.sampling.sampler import sample
from adadiff.serving.app import create_app
from adadiff.serving.served import ServedModel
from adadiff.serving.settings import Settings
from sampler.clip import make_clip
from sampler.tiny import SERVED, served, stepped
from serving.apps import EXACT, Exchange, client_of, draw, expected, pixels, run, settle

TOKENS, CHANNELS = 7, 12
NETWORK = dataclasses.replace(SERVED.network, num_classes=0, context_tokens=TOKENS, context_dim=CHANNELS)
TEXT = dataclasses.replace(SERVED, network=NETWORK, null_label=None)
LATENT = dataclasses.replace(SERVED, network=dataclasses.replace(SERVED.network, channels=2), latent_scale=0.5)


def decode(latents: Tensor) -> Tensor:
    """A decoder of twice the size."""
    return latents[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder.load(make_clip(tmp_path_factory.mktemp("clip"), TOKENS, CHANNELS))


def test_a_prompt_is_drawn_as_sample_draws_its_embeddings(encoder: TextEncoder) -> None:
    async def work() -> None:
        model = ServedModel("text", Engine(served(TEXT), 4, execution=EXACT), encode=encoder)
        async with client_of(model, steps=3) as client:
            found = await draw(client, prompt="a cat", seed=4, n=2, guidance_scale=2)
            other = await draw(client, prompt="a dog", seed=4, guidance_scale=2)
            text, null = encoder(["a cat", ""])
            asked = {"text_embeds": text, "null_text_embeds": null, "guidance_scale": 2.0, "seed": 4, "steps": 3}
            images, _ = sample(model.model, 2, execution=EXACT, **asked)
            for one, image in zip(found.json()["data"], images, strict=True):
                np.testing.assert_array_equal(pixels(one["b64_json"]), expected(image))
            assert other.json()["data"][0]["b64_json"] != found.json()["data"][0]["b64_json"]
            for body, field in (
                ({}, "prompt"),
                ({"prompt": ""}, "prompt"),
                ({"prompt": "x", "class_label": 1}, "class_label"),
            ):
                refused = await draw(client, **body)
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
            assert (await client.get("/v1/models/text")).json()["adadiff"]["takes"] == "text"

    run(work())


def test_prompts_wait_for_the_encoder_outside_of_the_event_loop_and_not_without_end() -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(prompts: list[str]) -> Tensor:
        begun.set()
        assert go.wait(60)
        return torch.zeros(len(prompts), TOKENS, CHANNELS)

    async def work() -> None:
        engine = Engine(served(TEXT), 2, queue=2)
        app = create_app([ServedModel("text", engine, encode=slow)], Settings())
        waiting = [Exchange(app, {"prompt": "a", "num_inference_steps": 1}) for _ in range(2)]
        while not begun.is_set():
            await asyncio.sleep(0.001)
        third = Exchange(app, {"prompt": "a", "num_inference_steps": 1})
        await third.task
        assert third.status == 429
        assert b"retry-after" in dict(third.sent[0]["headers"])
        go.set()
        await asyncio.gather(*(one.task for one in waiting))
        assert [one.status for one in waiting] == [200, 200]

    run(work())


def test_latents_are_decoded_and_so_are_previews() -> None:
    async def work() -> None:
        engine = Engine(served(LATENT), 4, execution=EXACT)
        async with client_of(ServedModel("latent", engine, decode=decode)) as client:
            body = {"seed": 2, "num_inference_steps": 4, "class_label": 1}
            assert (await draw(client, **body, size="4x4")).status_code == 400, "that of the latents"
            found = (await draw(client, **body, size="8x8")).json()
            (image,), _ = sample(served(LATENT), 1, seed=2, steps=4, class_labels=1, execution=EXACT)
            np.testing.assert_array_equal(pixels(found["data"][0]["b64_json"]), expected(decode(image[None])[0]))
            text = (await draw(client, **body, stream=True, partial_images=2)).text
            assert text.count('"size":"8x8"') == text.count("event: ") >= 1

    run(work())


@pytest.mark.parametrize(("config", "words"), [(TEXT, "give a text encoder"), (LATENT, "give a decoder")])
def test_models_without_what_they_need_are_refused(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServedModel("x", Engine(served(config), 2, threaded=False))


def test_a_picture_that_cannot_be_made_is_told(monkeypatch: Any) -> None:
    """NaN of a decoder is an error of the service; an infinite preview is left out, and the image comes."""

    async def work() -> None:
        broken = Engine(served(LATENT), 4)
        async with client_of(ServedModel("latent", broken, decode=lambda x: decode(x) * torch.nan)) as client:
            reply = await draw(client, num_inference_steps=1)
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "not_finite")
        engine = stepped(2)
        monkeypatch.setattr(engine._batch, "predicted_x0", lambda slot: torch.full((1, 4, 4), torch.inf))
        app = create_app([ServedModel("tiny", engine)], Settings())
        client = Exchange(app, {"num_inference_steps": 3, "stream": True, "partial_images": 2})
        await settle()
        while engine.step():
            await settle()
        await client.task
        assert [kind for kind, _ in client.events] == ["image_generation.completed"]

    run(work())


def test_a_guided_image_that_is_not_finite_is_the_requests_fault(monkeypatch: Any) -> None:
    async def work() -> None:
        engine = stepped(2)
        app = create_app([ServedModel("tiny", engine)], Settings())
        monkeypatch.setattr(engine._batch, "peek", lambda slots: torch.full((len(slots), 1, 4, 4), torch.nan))
        replies = []
        for scale in (3, 1):
            client = Exchange(app, {"num_inference_steps": 1, "guidance_scale": scale, "class_label": 1})
            await settle()
            while engine.step():
                await settle()
            await client.task
            replies.append((client.status, b'"param":"guidance_scale"' in client.body))
        assert replies == [(422, True), (500, False)]

    run(work())
