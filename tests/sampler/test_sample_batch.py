"""What samples may ask for, and what is refused: when it is asked for, and against the model before any work."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from adadiff.config import ModelConfig
from adadiff.diffusion.solvers import DDIM
from adadiff.engine.engine import Engine
from adadiff.models.uvit import UViT, UViTConfig
from adadiff.policies.exits import Depth
from adadiff.sampling.params import SamplingParams
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.sampling.sampler import SamplerRun, sample
from adadiff.uem import PAPER
from naming import named
from sampler.tiny import SERVED, requests, served

TEXT = ModelConfig(UViTConfig(4, 1, 2, 16, 4, 2, context_tokens=3, context_dim=5), "stable_diffusion", exits=PAPER)
IMAGES = torch.zeros(2, 1, 4, 4)


def starts(n: int) -> Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(5))


def test_params_are_frozen_and_the_callers_tensors_stay_theirs() -> None:
    seeds, interval, image = torch.tensor([3, 4]), torch.tensor([100.0, 900.0]), starts(2)
    params = SamplingParams(seed=seeds, steps=2, guidance_interval=interval, init_image=image)
    for field in dataclasses.fields(params):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(params, field.name, getattr(params, field.name))
    samples = SampleBatch.of(served(), 2, params)
    with pytest.raises(dataclasses.FrozenInstanceError):
        samples.n = 3
    for value in (seeds, interval, image):
        value.zero_()
    assert samples.seeds.tolist() == [3, 4]
    assert samples.interval.tolist() == [[100, 900]] * 2
    assert torch.equal(samples.init_image, starts(2))


def test_params_are_the_plain_network_unless_asked_otherwise() -> None:
    given = SamplingParams()
    assert (given.policy, given.guidance_scale, given.tied, given.record_scores) == ("full", 1.0, False, False)
    assert given.solver == DDIM()
    samples = SampleBatch.of(served(), 2, given)
    assert str(samples.policy) == "full"
    assert (samples.seeds.tolist(), samples.steps.tolist(), samples.first.tolist()) == ([0, 1], [50, 50], [0, 0])
    assert (samples.guidance.tolist(), samples.lanes, samples.context.tolist()) == ([0, 0], 2, [3, 3])  # the null class
    assert not samples.record_scores


def test_params_settings_by_name_and_both_are_the_same() -> None:
    """Also where a name takes the place of what the parameters have."""
    settings = {"steps": 3, "seed": 5, "class_labels": [0, 1], "policy": "exit:0.5", "guidance_scale": 2.0}
    wanted, _ = sample(served(), 2, **settings)
    assert torch.equal(sample(served(), 2, SamplingParams(**settings))[0], wanted)
    assert torch.equal(sample(served(), 2, SamplingParams(**{**settings, "seed": 9}), seed=5)[0], wanted)
    assert torch.equal(torch.cat([x for _, x in SamplerRun(served(), 2, SamplingParams(**settings))]), wanted)
    one = {**settings, "seed": 6, "class_labels": 1}
    alone, _ = sample(served(), 1, **one)
    with Engine(served(), 2, threaded=False) as engine:
        other = SamplingParams(**{**one, "guidance_scale": 1.0})
        handles = [engine.submit(SamplingParams(**one)), engine.submit(**one), engine.submit(other, guidance_scale=2.0)]
    for handle in handles:
        torch.testing.assert_close(handle.result(0), alone[0], rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_one_seed_is_that_of_the_first_sample() -> None:
    assert SampleBatch.of(served(), 3, seed=7).seeds.tolist() == [7, 8, 9]
    assert SampleBatch.of(served(), 3, seed=torch.tensor(7, dtype=torch.int32)).seeds.tolist() == [7, 8, 9]
    assert SampleBatch.of(served(), 3, seed=[7, 7, 0]).seeds.tolist() == [7, 7, 0]
    assert SampleBatch.of(served(), 2, seed=2**63 - 2).seeds.tolist() == [2**63 - 2, 2**63 - 1]
    with pytest.raises(ValueError, match=r"below 2\^63"):
        SampleBatch.of(served(), 3, seed=2**63 - 2)


def test_one_image_is_that_of_all_samples() -> None:
    image, settings = starts(1), {"steps": 4, "class_labels": [0, 1], "strength": 0.5}
    wanted, _ = sample(served(), 2, init_image=image.expand(2, -1, -1, -1), **settings)
    assert torch.equal(sample(served(), 2, init_image=image[0], **settings)[0], wanted)
    one = [sample(served(), 1, init_image=given, steps=4, seed=2)[0] for given in (image, image[0])]
    assert torch.equal(*one)


def test_lanes_are_two_for_a_guided_sample() -> None:
    assert SampleBatch.of(served(), 4, guidance_scale=[1.0, 2.0, 1.0, -1.0]).lanes == 6
    assert [SampleBatch.of(served(), 1, guidance_scale=scale).lanes for scale in (1.0, 1 + 1e-6, 0.0)] == [1, 2, 2]


def test_every_setting_reaches_the_network() -> None:
    """Changing any one of them changes the image, so that none is ignored."""
    base = {"steps": 4, "solver": "ddim:0.5", "policy": "exit:0.5", "seed": [3], "class_labels": [1]}
    base["guidance_scale"] = 2.0
    changes = [
        {},
        {"steps": 5},
        {"solver": "ddim:0.6"},
        {"policy": "exit:depth=2"},
        {"thresholds": [0.3]},
        {"seed": [4]},
        {"class_labels": [2]},
        {"guidance_scale": 2.1},
        {"guidance_interval": (0, 500)},
        {"tied": True},
        {"init_image": starts(1)},
        {"init_image": starts(1), "strength": 0.3},
    ]
    images = [sample(served(), 1, **{**base, **change})[0] for change in changes]
    assert len({float(image.double().sum()) for image in images}) == len(changes)


PROMPTS = {"text_embeds": torch.zeros(2, 3, 5)}
# no model is needed to refuse these
WRONG = [
    ({"strength": 0.5}, "give that, too"),
    ({"init_image": IMAGES, "strength": 0.0}, r"strength must lie in \(0, 1\]"),
    ({"init_image": IMAGES, "strength": [0.5, 1.01]}, r"strength must lie in \(0, 1\]"),
    ({"init_image": IMAGES, "strength": -0.5}, r"strength must lie in \(0, 1\]"),
    ({"init_image": IMAGES, "strength": math.nan}, "strength must be finite"),
    ({"init_image": IMAGES, "strength": "much"}, "strength must be a number"),
    ({"init_image": IMAGES, "strength": [[0.5], [0.5]]}, r"strength must be a number .* shape \[2, 1\]"),
    ({"init_image": IMAGES.byte()}, r"init_image must be a float tensor, got a tensor \[2, 1, 4, 4\] of torch.uint8"),
    ({"init_image": [[0.0]]}, "init_image must be a float tensor"),
    ({"text_embeds": torch.zeros(2, 3, 5, dtype=torch.int64)}, "text_embeds must be a float tensor"),
    ({"text_embeds": "a cat"}, "text_embeds must be a float tensor, got 'a cat'"),
    ({**PROMPTS, "null_text_embeds": "nothing"}, "null_text_embeds must be a float tensor"),
    ({"solver": object()}, "a solver is"),
    ({"solver": "euler"}, "no solver 'euler'"),
    ({"solver": "ddim:2"}, r"\[0, 1\]"),
    ({"policy": object()}, "a policy is"),
    ({"policy": Depth}, "a policy is"),  # the class, and no policy
    ({"steps": 0}, "steps must be at least 1"),
    ({"steps": 2.5}, "steps must be whole numbers"),
    ({"steps": [3, -2]}, "steps must be at least 1"),
    ({"steps": True}, "steps must be whole numbers"),
    ({"steps": "ten"}, "steps must be a number"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"seed": 2**63}, "seed must be a number"),
    ({"seed": 1.5}, "seed must be whole numbers"),
    ({"class_labels": 0.5}, "class_labels must be whole numbers"),
    ({"class_labels": "cat"}, "class_labels must be a number"),
    ({"class_labels": [None, 1]}, "class_labels must be a number"),
    ({"guided_channels": 1.0}, "guided_channels must be whole numbers"),
    ({"guidance_scale": math.inf}, "guidance_scale must be finite"),
    ({"guidance_scale": [1.0, math.nan]}, "guidance_scale must be finite"),
    ({"thresholds": [0.5, math.nan]}, "thresholds must be finite"),
    ({"tied": 1}, "tied must be True or False, got 1"),
    ({"record_scores": None}, "record_scores must be True or False"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=named)
def test_params_that_cannot_be_are_refused_when_they_are_made(settings: dict, message: str) -> None:
    for make in (SamplingParams, lambda **own: dataclasses.replace(SamplingParams(), **own)):
        with pytest.raises(ValueError, match=message):
            make(**settings)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [(SERVED, *wrong) for wrong in WRONG]
    + [
        (SERVED, {"init_image": IMAGES, "strength": [0.5]}, r"strength must be one number, or one for each sample, 2"),
        (SERVED, {"init_image": IMAGES[:1]}, r"init_image must be float \[1, 4, 4\] or \[2, 1, 4, 4\], got \[1, 1, 4"),
        (SERVED, {"init_image": IMAGES[:, 0]}, r"init_image must be float .* got \[2, 4, 4\]"),
        (SERVED, {"init_image": torch.full((2, 1, 4, 4), math.nan)}, "NaN or infinity"),
        (SERVED, {"init_image": torch.full((2, 1, 4, 4), math.inf)}, "NaN or infinity"),
        (SERVED, PROMPTS, "takes no text"),
        (SERVED, {"null_text_embeds": torch.zeros(3, 5)}, "takes no text"),
        (TEXT, {}, "takes text"),
        (TEXT, {"text_embeds": torch.zeros(2, 3, 4)}, r"text_embeds must be float \[3, 5\] or \[2, 3, 5\]"),
        (TEXT, {"text_embeds": torch.zeros(1, 3, 5)}, r"text_embeds must be float \[3, 5\] or \[2, 3, 5\]"),
        (TEXT, {**PROMPTS, "class_labels": [0, 1]}, "leave class_labels out"),
        (TEXT, {**PROMPTS, "guidance_scale": [1.0, 2.0]}, "guidance needs null_text_embeds"),
        (
            TEXT,
            {**PROMPTS, "guidance_scale": 2.0, "null_text_embeds": torch.zeros(2, 3, 5)},
            r"null_text_embeds must be float \[3, 5\], got \[2, 3, 5\]",
        ),
        (SERVED, {"policy": "exit:0.5,min_layer=5"}, "has no exit layer"),
        (SERVED, {"params": {"steps": 3}}, "params must be SamplingParams, got {'steps': 3}"),
    ],
    ids=named,
)
def test_bad_input_is_named_before_any_work(config, settings, message, monkeypatch) -> None:
    monkeypatch.setattr(UViT, "embed", lambda *_, **__: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        sample(served(config), 2, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed must be whole numbers"),
        ({"seed": None}, "needs a seed"),
        ({"seed": [1, 2]}, "seed must be one number"),
        ({"class_labels": 3}, r"class_labels must be in 0\.\.2"),  # 3 is the null class
        ({"class_labels": -1}, r"class_labels must be in 0\.\.2"),
        ({"class_labels": 0.5}, "class_labels must be whole numbers"),
        ({"class_labels": "cat"}, "class_labels"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"init_image": IMAGES}, "init_image"),
        ({"init_image": "image"}, "init_image"),
        ({"text_embeds": "a cat"}, "text_embeds"),
        ({"guidance_scale": math.inf}, "guidance_scale must be finite"),
        ({"policy": "exit:2"}, "strictly between 0 and 1"),
        ({"policy": "full", "thresholds": 0.5}, "takes no thresholds"),
        ({"params": 3}, "params must be SamplingParams, got 3"),
        ({"priority": -1}, "priority"),
        ({"priority": 101}, "priority must be at most 100"),
        ({"priority": 1.0}, "priority must be an integer"),
        ({"deadline": 0}, "deadline must be a positive number"),
        ({"deadline": math.nan}, "deadline must be a positive number"),
        ({"deadline": math.inf}, "deadline must be a positive number"),
        ({"deadline": "soon"}, "deadline must be a positive number"),
        ({"wait": -1}, "wait must be"),
        ({"wait": math.nan}, "wait must be"),
        ({"on_step": 3}, "on_step must be callable"),
    ],
    ids=named,
)
def test_bad_requests_are_named_at_once_and_hurt_nobody(settings: dict, message: str) -> None:
    with Engine(served(), 2, threaded=False) as engine:
        good = engine.submit(**requests(1)[0])
        with pytest.raises(ValueError, match=message):
            engine.submit(**{"seed": 0, "steps": 2, **settings})
        assert engine.report.waiting == 1
    assert good.result(0).isfinite().all()


@pytest.mark.parametrize("name", ["stepz", "seeds", "guidance", "rule", "label", "labels", "start", "context"])
def test_settings_that_do_not_exist_are_refused(name: str) -> None:
    """At the call, whoever is called, with the names that there are."""
    message = f"unknown setting {name}; there are seed, class_labels, .*, record_scores"
    for call in (sample, SamplerRun, SampleBatch.of):
        with pytest.raises(ValueError, match=message):
            call(served(), 1, **{name: 3})
    with Engine(served(), 2, threaded=False) as engine:
        for params in (None, SamplingParams(seed=0)):
            with pytest.raises(ValueError, match=message):
                engine.submit(params, seed=0, **{name: 3})
        assert engine.report.waiting == 0
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        SamplingParams(**{name: 3})
