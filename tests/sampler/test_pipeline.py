"""The diffusers pipeline: what it saves and loads, what it returns, and its callbacks."""

import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import adadiff
from adadiff.config import ModelConfig
from adadiff.diffusion.solvers import solver_from
from adadiff.models.uvit import UViT, UViTConfig
from adadiff.pipelines.latents import decode
from adadiff.pipelines.pipeline import AdaDiffPipeline, AdaDiffTransformer
from adadiff.sampling.sampler import sample
from adadiff.uem import PAPER
from naming import named
from sampler.slim import WIDTHS, slim_served
from sampler.test_calibration import HALF, made
from sampler.test_step_selector import CHOSEN, selecting
from sampler.tiny import SERVED, served

LATENT = ModelConfig(
    UViTConfig(4, 4, 2, 16, 4, 2, num_classes=4), "linear", null_label=3, exits=PAPER, latent_scale=0.18215
)
PLAIN = ModelConfig(UViTConfig(4, 1, 2, 16, 4, 2), "linear")
TEXT = ModelConfig(UViTConfig(4, 1, 2, 16, 4, 2, context_tokens=3, context_dim=5), "stable_diffusion")


@cache
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=4).eval().requires_grad_(False)


def pipeline(config: ModelConfig = SERVED, **components: object) -> AdaDiffPipeline:
    pipe = AdaDiffPipeline(AdaDiffTransformer.of(served(config)), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_are_those_of_sample() -> None:
    """Seeds are drawn from the generator, and the guidance scale is diffusers'."""
    out = pipeline()(
        class_labels=[0, 2, 1],
        num_inference_steps=4,
        guidance_scale=1.5,
        policy="exit:0.5",
        tied=True,
        generator=seeded(),
        output_type="latent",
    )
    seeds = torch.randint(2**63 - 1, (3,), generator=seeded())
    settings = {"steps": 4, "class_labels": [0, 2, 1], "guidance_scale": 1.5, "policy": "exit:0.5", "tied": True}
    images, report = sample(served(), 3, seed=seeds, **settings)
    assert torch.equal(out.images, images)
    assert torch.equal(out.report.exit_layer, report.exit_layer)
    assert (out.report.macs, out.report.macs_full) == (report.macs, report.macs_full)
    assert out.report.seconds > 0


def test_a_step_selector_is_kept_and_chooses(tmp_path: Path) -> None:
    """Of a pipeline that was saved and loaded in another dtype, too: it chooses by its own numbers."""
    model, labels = selecting(), [1, 0, 2, 1]
    made = AdaDiffPipeline(model)
    made.save_pretrained(tmp_path)
    loaded = AdaDiffPipeline.from_pretrained(tmp_path)
    half = AdaDiffPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    seeds = torch.randint(2**63 - 1, (4,), generator=seeded())
    images, report = sample(model, 4, seed=seeds, steps="auto", class_labels=labels)
    given = {"class_labels": labels, "num_inference_steps": "auto", "output_type": "latent"}
    for pipe in (made, loaded, half):
        pipe.set_progress_bar_config(disable=True)
        out = pipe(generator=seeded(), **given)
        assert out.report.steps.tolist() == report.steps.tolist() == [CHOSEN[label] for label in labels]
        if pipe is not half:
            assert torch.equal(out.images, images)
    scores = [pipe.transformer.model.step_selector.scores.state_dict() for pipe in (made, half)]
    assert all(torch.equal(value, scores[1][name]) for name, value in scores[0].items())
    with pytest.raises(ValueError, match="leave the callback out"):
        made(callback_on_step_end=lambda *_: {}, **given)
    with pytest.raises(ValueError, match="needs a model with a step selector"):
        pipeline()(**given)


def test_a_callback_needs_images_that_end_together() -> None:
    given = {"num_images": 2, "output_type": "latent", "callback_on_step_end": lambda *_: {}}
    pipeline()(**given, steps=[2, 2])
    with pytest.raises(ValueError, match="different steps end at different steps; leave the callback out"):
        pipeline()(**given, steps=[2, 3])


def test_a_generator_for_each_image() -> None:
    one = pipeline()(num_images=3, generator=[seeded(i) for i in (5, 6, 7)], num_inference_steps=2, output_type="pt")
    other = pipeline()(num_images=2, generator=[seeded(i) for i in (7, 5)], num_inference_steps=2, output_type="pt")
    torch.testing.assert_close(one.images[[2, 0]], other.images, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one.images[0], one.images[1])
    torch.manual_seed(1)
    free = [pipeline()(num_inference_steps=2, output_type="pt").images for _ in range(2)]
    assert not torch.equal(*free)


def test_output_types() -> None:
    given = {"class_labels": [0, 1], "num_inference_steps": 2, "solver": "dpm++2m"}
    outputs = {
        kind: pipeline()(generator=seeded(), output_type=kind, **given).images for kind in ("latent", "pt", "np", "pil")
    }
    wanted = (outputs["latent"] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(outputs["pt"], wanted)
    assert np.array_equal(outputs["np"], wanted.permute(0, 2, 3, 1).numpy())
    for picture, image in zip(outputs["pil"], wanted, strict=True):
        assert np.array_equal(np.asarray(picture), (image[0] * 255).round().byte().numpy())
    images, report = pipeline()(generator=seeded(), output_type="pt", return_dict=False, **given)
    assert torch.equal(images, wanted)
    assert report.passes == 4


def test_save_and_load(tmp_path: Path) -> None:
    pipe = pipeline(LATENT, vae=vae())
    given = {"class_labels": [1], "num_inference_steps": 3, "policy": "exit:0.5", "output_type": "pt"}
    before = pipe(generator=seeded(), **given)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["adadiff.pipelines.pipeline", "AdaDiffTransformer"]
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["model_config"] == LATENT.to_dict()
    loaded = AdaDiffPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    after = loaded(generator=seeded(), **given)
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.report.exit_layer, before.report.exit_layer)
    assert (loaded.tokenizer, loaded.text_encoder) == (None, None)


def test_a_calibration_is_saved_with_the_model(tmp_path: Path) -> None:
    model = adadiff.Model(SERVED).eval()
    model.load_state_dict(served().state_dict())
    model.calibration = made(HALF)
    AdaDiffPipeline(model).save_pretrained(tmp_path)
    loaded = AdaDiffPipeline.from_pretrained(tmp_path)
    assert loaded.transformer.model.calibration == model.calibration
    loaded.set_progress_bar_config(disable=True)
    given = {"num_images": 2, "num_inference_steps": 3, "policy": "exit:budget=0.5", "output_type": "pt"}
    outputs = [pipe(generator=seeded(), **given) for pipe in (AdaDiffPipeline(model), loaded)]
    assert torch.equal(outputs[0].images, outputs[1].images)
    assert torch.equal(outputs[0].report.exit_layer, outputs[1].report.exit_layer)


def test_latents_are_decoded_with_the_scale_of_the_model() -> None:
    given = {"class_labels": [1, 2], "num_inference_steps": 2}
    latents = pipeline(LATENT)(generator=seeded(), output_type="latent", **given).images
    images = pipeline(LATENT, vae=vae())(generator=seeded(), output_type="pt", **given).images
    torch.testing.assert_close(images, (decode(latents, vae(), 0.18215) / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(("solver", "ends"), [("ddim", [0, 1, 2, 3, 4]), ("dpm-fast", [2, 4])])
def test_a_callback_after_every_step(solver: str, ends: list[int]) -> None:
    """dpm-fast at 5 forward passes: a step of three and one of two."""
    met = []

    def callback(pipe: AdaDiffPipeline, step: int, t: float, values: dict) -> None:
        met.append((step, t, values["latents"]))

    given = {"class_labels": [0, 1], "num_inference_steps": 5, "solver": solver, "output_type": "latent"}
    out = pipeline()(generator=seeded(), callback_on_step_end=callback, **given)
    assert [step for step, _, _ in met] == ends
    assert [t for _, t, _ in met] == sorted((t for _, t, _ in met), reverse=True)
    assert torch.equal(met[-1][2], out.images)
    assert torch.equal(out.images, pipeline()(generator=seeded(), **given).images)


@pytest.mark.parametrize(("solver", "ends"), [("ddim", [0, 1, 2]), ("heun", [1, 2, 3])])
def test_from_an_initial_image_callbacks_are_those_of_the_steps_made(solver: str, ends: list[int]) -> None:
    """Half of 6 steps, or of 8 evaluations of heun: one step of two, then single ones. The last callback has the image,
    and nothing comes after it."""
    met = []

    def callback(pipe: AdaDiffPipeline, step: int, t: float, values: dict) -> None:
        met.append((step, t, values["latents"]))

    steps = {"ddim": 6, "heun": 8}[solver]
    given = {
        "num_inference_steps": steps,
        "solver": solver,
        "output_type": "latent",
        "init_image": torch.zeros(1, 4, 4),
    }
    given |= {"class_labels": [0, 1], "strength": 0.5}
    out = pipeline()(generator=seeded(), callback_on_step_end=callback, **given)
    assert [step for step, _, _ in met] == ends
    rows = solver_from(solver).table(served().schedule, steps).t.tolist()
    assert [t for _, t, _ in met] == [rows[len(rows) // 2 + end] for end in ends]
    assert torch.equal(met[-1][2], out.images)
    assert torch.equal(out.images, pipeline()(generator=seeded(), **given).images)
    with pytest.raises(ValueError, match="leave the callback out"):
        pipeline()(generator=seeded(), callback_on_step_end=callback, **{**given, "strength": [0.5, 1.0]})


def test_a_width_policy_runs_narrow_networks() -> None:
    pipe = AdaDiffPipeline(slim_served())
    given = {"class_labels": [0, 2], "num_inference_steps": 3, "policy": f"width:{WIDTHS[0]:g}"}
    out = pipe(generator=seeded(), output_type="latent", **given)
    seeds = torch.randint(2**63 - 1, (2,), generator=seeded())
    images, report = sample(slim_served(), 2, seed=seeds, class_labels=[0, 2], steps=3, policy=given["policy"])
    torch.testing.assert_close(out.images, images)
    assert out.report.macs == report.macs < report.macs_full


@pytest.mark.parametrize("solver", ["ddim", "dpm-fast"])
def test_a_callback_may_change_latents_and_stop(solver: str) -> None:
    given = {"class_labels": [0, 1], "num_inference_steps": 8, "solver": solver, "output_type": "latent"}
    plain = pipeline()(generator=seeded(), **given).images

    def once(pipe: AdaDiffPipeline, step: int, t: float, values: dict) -> dict:
        return {"latents": values["latents"] * torch.tensor([1.0, 0.9]).view(2, 1, 1, 1)} if step == 2 else {}

    changed = pipeline()(generator=seeded(), callback_on_step_end=once, **given).images
    torch.testing.assert_close(changed[0], plain[0])
    assert not torch.allclose(changed[1], plain[1], atol=1e-3)

    def stop(pipe: AdaDiffPipeline, step: int, t: float, values: dict) -> None:
        pipe._interrupt = step == 2

    stopped = pipeline()(generator=seeded(), callback_on_step_end=stop, **given)
    assert (stopped.report.exit_layer[:, :, 0] > 0).all(1).tolist() == [True] * 3 + [False] * 5

    def put_back(pipe: AdaDiffPipeline, step: int, t: float, values: dict) -> dict:
        return {"latents": stopped.images} if step == 2 else {}

    # from other noise, but what it goes on from is all that counts
    assert torch.equal(pipeline()(generator=seeded(9), callback_on_step_end=put_back, **given).images, plain)


def into(values: dict, latents: torch.Tensor) -> None:
    values["latents"] = latents


def in_place(values: dict) -> None:
    values["latents"].mul_(0.5)


def through_data(values: dict) -> None:
    values["latents"].data.mul_(0.5)


def by_numpy(values: dict) -> None:
    values["latents"].numpy()[:] *= 0.5


def by_inference(values: dict) -> dict:
    with torch.inference_mode():
        return {"latents": values["latents"] * 0.5}


EDITS = {
    "returned": lambda values: {"latents": values["latents"] * 0.5},
    "in place": in_place,
    "in place, returned": lambda values: {"latents": values["latents"].mul_(0.5)},
    "in place, and the mapping returned": lambda values: values["latents"].mul_(0.5) is not None and values,
    "by index": lambda values: values["latents"].__setitem__(slice(None), values["latents"] * 0.5),
    "through .data": through_data,
    "through numpy": by_numpy,
    "another in the mapping": lambda values: into(values, values["latents"] * 0.5),
    "in float64": lambda values: {"latents": values["latents"].double() * 0.5},
    "made in inference mode": by_inference,
    "with a graph": lambda values: {"latents": values["latents"].requires_grad_() * 0.5},
}


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m", "dpm-fast"])
@pytest.mark.parametrize("edit", EDITS)
def test_however_a_callback_changes_latents_they_are_changed(edit: str, solver: str) -> None:
    given = {"class_labels": [0, 1], "num_inference_steps": 8, "solver": solver, "output_type": "latent"}

    def draw(change: str | None) -> torch.Tensor:
        def callback(pipe: AdaDiffPipeline, step: int, t: float, values: dict) -> object:
            return EDITS[change](values) if step == 2 and change is not None else None

        return pipeline()(generator=seeded(), callback_on_step_end=callback, **given).images

    with torch.no_grad():
        plain, wanted, found = draw(None), draw("returned"), draw(edit)
    assert torch.equal(found, wanted)
    assert not torch.allclose(plain, wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"latents": torch.zeros(2, 1, 4, 5)}, r"latents must be a float tensor \[2, 1, 4, 4\], got .* \[2, 1, 4, 5\]"),
        ({"latents": torch.zeros(2, 1, 4, 4, dtype=torch.int64)}, "got torch.int64"),
        ({"latents": [0.5]}, r"latents of a callback must be a tensor, got \[0.5\]"),
        ({"latents": None}, "must be a tensor, got None"),
        (torch.zeros(2, 1, 4, 4), "returns None or a mapping such as"),
        ("latents", "returns None or a mapping such as .* got 'latents'"),
    ],
    ids=named,
)
def test_what_a_callback_cannot_mean_is_refused(returned: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline()(class_labels=[0, 1], num_inference_steps=3, callback_on_step_end=lambda *_: returned)


def nan_latents(*given: object) -> dict:
    return {"latents": torch.full_like(given[3]["latents"], torch.nan)}


@pytest.mark.parametrize("output_type", ["latent", "pt", "np", "pil"])
def test_nan_is_no_image(output_type: str) -> None:
    given = {"class_labels": [0, 1], "num_inference_steps": 3, "output_type": output_type}
    with pytest.raises(FloatingPointError, match=r"sample 0 .* holds NaN or infinity"):
        pipeline()(callback_on_step_end=nan_latents, **given)
    with pytest.raises(FloatingPointError, match=r"sample 0 .* holds NaN or infinity"):
        pipeline()(guidance_scale=1e37, **given)


@pytest.mark.parametrize("fails", ["in a step", "in a callback", "at the end"])
def test_after_an_error_offloaded_weights_go_back(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, freed = pipeline(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    given = {"class_labels": [0], "num_inference_steps": 2, "generator": seeded(), "output_type": "pt"}
    wanted = pipe(**given).images
    freed.clear()
    if fails == "in a step":
        with monkeypatch.context() as patched:
            patched.setattr(UViT, "embed", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pipe(**given)
    else:
        callback = (lambda *_: 1 / 0) if fails == "in a callback" else nan_latents
        with pytest.raises(ArithmeticError):
            pipe(callback_on_step_end=callback, **given)
    assert freed == [1]
    assert torch.equal(pipe(**{**given, "generator": seeded()}).images, wanted)  # nothing is left of it


def test_prompts_reach_the_network() -> None:
    """An encoder whose contexts count letters stands for CLIP, behind the interface of transformers."""

    def tokenizer(prompts: str | list[str], **_: object) -> SimpleNamespace:
        texts = [prompts] if isinstance(prompts, str) else prompts
        ids = torch.tensor([[len(text), text.count("a"), 1] for text in texts])
        return SimpleNamespace(input_ids=ids[0].tolist() if isinstance(prompts, str) else ids)

    def hidden(ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=(ids[..., None] * torch.arange(1.0, 6.0)).sin())

    hidden.config = SimpleNamespace(max_position_embeddings=3, hidden_size=5)
    hidden.device = "cpu"
    pipe = pipeline(TEXT)
    object.__setattr__(pipe, "tokenizer", tokenizer)
    object.__setattr__(pipe, "text_encoder", hidden)
    given = {"num_inference_steps": 3, "output_type": "latent"}
    prompts = ["a cat", "banana"]
    images = pipe(prompt=prompts, negative_prompt="aa", guidance_scale=2.0, generator=seeded(), **given).images

    def contexts(texts: list[str]) -> torch.Tensor:
        return hidden(tokenizer(texts).input_ids).last_hidden_state

    seeds = torch.randint(2**63 - 1, (2,), generator=seeded())
    settings = {"text_embeds": contexts(prompts), "null_text_embeds": contexts(["aa"])[0], "guidance_scale": 2.0}
    assert torch.equal(images, sample(served(TEXT), 2, steps=3, seed=seeds, **settings)[0])
    assert pipe(prompt="a cat", **given).images.shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SERVED, {"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
        (SERVED, {"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1"),
        (SERVED, {"class_labels": [0, 1], "num_images": 3}, r"disagree on how many images: \[2, 3\]"),
        (SERVED, {"class_labels": []}, "num_images must be an integer >= 1"),
        (SERVED, {"class_labels": 1}, "class_labels must be a list, one per image, got 1"),
        (SERVED, {"class_labels": [-1]}, r"labels must be in 0\.\.2"),
        (SERVED, {"class_labels": [3]}, r"labels must be in 0\.\.2"),
        (SERVED, {"generator": [seeded()] * 2}, "one or a list of 1"),
        (SERVED, {"generator": 3}, "one or a list of 1, one per image, got 3"),
        (SERVED, {"generator": [3]}, "one or a list of 1, one per image, got 3"),
        (SERVED, {"solver": "euler"}, "no solver 'euler'"),
        (SERVED, {"prompt": "a cat"}, "prompts take a tokenizer and a text_encoder"),
        (SERVED, {"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks may ask for latents"),
        (LATENT, {}, "give the pipeline a vae, or ask for output_type='latent'"),
        (TEXT, {}, "takes text: give prompt"),
        (PLAIN, {"guidance_scale": 2.0}, "guidance needs a model with a null class"),
    ],
    ids=named,
)
def test_bad_input(config: ModelConfig, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(config)(**settings)


def test_an_autoencoder_of_other_latents_is_named_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UViT, "embed", lambda *_, **__: pytest.fail("the network was called"))
    other = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=4, latent_channels=3)
    with pytest.raises(ValueError, match=r"latents must be float \[n, 3, h, w\] for this autoencoder"):
        pipeline(LATENT, vae=other)(class_labels=[1])


def test_diffusers_is_needed_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adadiff.AdaDiffPipeline is AdaDiffPipeline
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("enable", "private"):
        monkeypatch.delitem(sys.modules, f"adadiff.pipelines.{name}", raising=False)
    with pytest.raises(ImportError, match=r"takes diffusers: pip install 'adadiff_kernels\[diffusers\]'"):
        adadiff.enable  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'EarlyExit'"):
        adadiff.EarlyExit  # noqa: B018
