"""A service in which another, shallower network draws the noisy timesteps of a model."""

import dataclasses

import numpy as np
import torch

import adadiff
from adadiff.model import Model
from adadiff.sampling.sampler import sample
from adadiff.serving.allowed import presets_for
from adadiff.serving.opening import opened
from adadiff.serving.served import ServedModel
from adadiff.serving.settings import names_of, shallow_of
from sampler.slim import slim_served
from sampler.tiny import SERVED, scramble, served
from serving.apps import EXACT, client_of, draw, expected, pixels, run
from serving.test_command import shell_options

SWITCH = 500.0


def shallow() -> Model:
    """3 blocks in place of 5."""
    config = dataclasses.replace(SERVED, network=dataclasses.replace(SERVED.network, depth=2), exits=None)
    made = Model(config).requires_grad_(False).eval()
    scramble(made, 0.3, seed=7)
    return made


def test_images_are_those_of_both_networks() -> None:
    both = {"shallow_model": shallow(), "t_switch": SWITCH}

    async def work() -> None:
        model = ServedModel.open("tiny", served(), 4, execution=EXACT, **both)
        async with client_of(model, ServedModel.open("alone", served(), 4)) as client:
            given = {"class_label": 1, "seed": 3, "num_inference_steps": 4}
            reply = (await draw(client, model="tiny", **given)).json()
            models = {one["id"]: one["adadiff"] for one in (await client.get("/v1/models")).json()["data"]}
            assert [models[name]["shallow_layers"] for name in ("tiny", "alone")] == [3, None]
        (image, report) = sample(served(), 1, seed=3, steps=4, class_labels=1, execution=EXACT, **both)
        assert np.array_equal(pixels(reply["data"][0]["b64_json"]), expected(image[0]))
        layers = report.exit_layer[:, 0, 0].tolist()
        assert sorted(set(layers)) == [3, 5]
        assert reply["data"][0]["adadiff"]["exit_layers"] == layers

    run(work())


def test_policies_that_choose_networks_do_not_fit() -> None:
    presets = {"narrow": "width:0.5", "early": "exit:depth=2"}
    assert set(presets_for(slim_served(), presets)) == {"narrow", "early"}
    assert set(presets_for(slim_served(), presets, shallow=True)) == {"early"}


def test_the_command_opens_both() -> None:
    line = "canvases digits --shallow-model canvases=canvases_shallow --t-switch 600 --capacity 1"
    options = shell_options(line)
    named = names_of(options.models)
    shallow = shallow_of(options.shallow_model, named, options.t_switch)
    models = opened(named, capacity=1, shallow=shallow, t_switch=options.t_switch)
    try:
        found = [one.engine.shallow_model for one in models]
        weights = adadiff.load("canvases_shallow").state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in found[0].state_dict().items())
        assert found[1] is None
    finally:
        for one in models:
            one.engine.close(drain=False)
    alone = shell_options("canvases --shallow-model canvases_shallow")
    assert shallow_of(alone.shallow_model, names_of(alone.models), None) == {"canvases": "canvases_shallow"}
