"""Two networks in one run (DuoDiff): each pass by the network of its own timestep, whoever shares the batch."""

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.solvers import DDIM
from adadiff.forward.forward import forward
from adadiff.forward.networks import Network, run_networks
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.forward.two_stage import TwoStage, two_stage
from adadiff.model import Model
from adadiff.models.dit import DiTConfig
from adadiff.policies.exits import Depth, Full, Replay
from adadiff.policies.interface import ExitPolicy
from sampler import shell
from sampler.shell import config, error_line, read, run, saved
from sampler.tiny import SERVED, inputs, scramble, served

ctrl_c, tiny = shell.ctrl_c, shell.tiny
SHALLOW = dataclasses.replace(SERVED, exits=None, network=dataclasses.replace(SERVED.network, depth=2))
# With 3, 5 and 7 steps no two samples ever stand at the same timestep, and the switch falls between their steps.
STEPS = [3, 5, 7, 5]
LABELS = [0, 2, 1, 0]


def shallow(depth: int = 2, **changes: object) -> Model:
    network = dataclasses.replace(SHALLOW.network, depth=depth)
    made = Model(dataclasses.replace(SHALLOW, network=network, **changes)).requires_grad_(False).eval()
    scramble(made.backbone, 0.3, seed=9)
    return made


@torch.no_grad()
def by_hand(seed: int, label: int, steps: int, network_at: Callable[[float], Model]) -> Tensor:
    """One image, [C, H, W], by the plain networks and DDIM's equation 12 in float64."""
    schedule = served().schedule
    t = DDIM().table(schedule, steps).t
    a = torch.cat([schedule.log_alpha_bar(t).exp(), torch.ones(1, dtype=torch.float64)])
    x = initial_noise(torch.tensor([seed]), served().backbone.sample_shape).double()
    for i, time in enumerate(t.tolist()):
        eps = network_at(time).backbone(x.float(), torch.tensor([time]), torch.tensor([label])).double()
        x = a[i + 1].sqrt() * (x - (1 - a[i]).sqrt() * eps) / a[i].sqrt() + (1 - a[i + 1]).sqrt() * eps
    return x[0].float()


@pytest.mark.parametrize("t_switch", [650.0, 400.0])
def test_each_step_is_by_the_network_of_its_time(t_switch: float) -> None:
    early = shallow()
    images, report = adadiff.sample(
        served(), 4, steps=STEPS, class_labels=LABELS, shallow_model=early, t_switch=t_switch
    )
    for i, (steps, label) in enumerate(zip(STEPS, LABELS, strict=True)):
        wanted = by_hand(i, label, steps, lambda time: early if time >= t_switch else served())
        torch.testing.assert_close(images[i], wanted, rtol=1e-4, atol=1e-4)
        times = DDIM().table(served().schedule, steps).t
        depths = [3 if time >= t_switch else 5 for time in times.tolist()]
        assert set(depths) == {3, 5}
        assert report.exit_layer[:steps, i, 0].tolist() == depths


@pytest.mark.parametrize(("t_switch", "only"), [(0.0, "early"), (1000.0, "full")])
def test_at_the_ends_one_network_does_everything(t_switch: float, only: str) -> None:
    early = shallow()
    images, report = adadiff.sample(
        served(), 4, steps=STEPS, class_labels=LABELS, shallow_model=early, t_switch=t_switch
    )
    alone, other = adadiff.sample(early if only == "early" else served(), 4, steps=STEPS, class_labels=LABELS)
    assert torch.equal(images, alone)
    assert torch.equal(report.exit_layer, other.exit_layer)
    assert report.macs == other.macs


def test_the_default_switch_is_duodiffs() -> None:
    """300 of 1000 steps: of ten trailing ones at 999, 899, ..., 99 the first three."""
    _, report = adadiff.sample(served(), 1, steps=10, class_labels=[1], shallow_model=shallow())
    assert report.exit_layer[:, 0, 0].tolist() == [3] * 3 + [5] * 7


def test_macs_are_those_of_the_networks_that_ran() -> None:
    early, full = shallow(), served()
    _, report = adadiff.sample(full, 3, steps=4, class_labels=[0, 1, 2], shallow_model=early, t_switch=600.0)
    whole = {}
    for name, model in (("early", early), ("full", full)):
        _, alone = adadiff.sample(model, 1, steps=1, class_labels=[0])
        whole[name] = alone.macs
    assert (report.exit_layer[:, 0, 0] == 3).sum() == 2  # at 999 and 749 of 999, 749, 499, 249
    assert report.macs == 3 * (2 * whole["early"] + 2 * whole["full"])
    assert report.macs_full == 3 * 4 * whole["full"]


@pytest.mark.parametrize("policy", ["exit:depth=2", "exit:0.4"])
def test_policies_hold_for_the_full_network_alone_and_samples_for_themselves(policy: str) -> None:
    """Bit for bit: whatever the batch-mates, guided pairs included."""
    execution = ExecutionOptions(batch_invariant=True)
    given = {"policy": policy, "guidance_scale": 2.5, "tied": True, "execution": execution, "t_switch": 500.0}
    given["shallow_model"] = shallow()
    images, report = adadiff.sample(served(), 4, steps=STEPS, class_labels=LABELS, batch=3, **given)
    for i in range(4):
        alone, own = adadiff.sample(served(), 1, steps=STEPS[i], class_labels=LABELS[i], seed=i, **given)
        assert torch.equal(images[i], alone[0])
        assert torch.equal(report.exit_layer[: STEPS[i], i], own.exit_layer[:, 0])
        early_steps = DDIM().table(served().schedule, STEPS[i]).t >= 500
        assert bool((own.exit_layer[early_steps] == 3).all())
        assert policy != "exit:depth=2" or bool((own.exit_layer[~early_steps] == 2).all())


@pytest.mark.parametrize("count_sync", ["sync", "lagged"])
def test_every_way_of_counting_gives_the_same(count_sync: str) -> None:
    given = {"steps": STEPS, "class_labels": LABELS, "policy": "exit:0.4"}
    given |= {"shallow_model": shallow(), "t_switch": 600.0}
    images, report = adadiff.sample(served(), 4, **given)
    others, other = adadiff.sample(served(), 4, execution=ExecutionOptions(count_sync=count_sync), **given)
    assert torch.equal(report.exit_layer, other.exit_layer)
    torch.testing.assert_close(images, others, rtol=1e-4, atol=1e-4)


def test_a_serving_engine_switches_too() -> None:
    given = {"execution": ExecutionOptions(batch_invariant=True), "shallow_model": shallow(), "t_switch": 600.0}
    wanted, _ = adadiff.sample(served(), 4, steps=STEPS, class_labels=LABELS, **given)
    engine = adadiff.Engine(served(), 3, threaded=False, **given)
    handles = [engine.submit(seed=i, class_labels=LABELS[i], steps=STEPS[i]) for i in range(4)]
    while engine.step():
        pass
    assert all(torch.equal(handle.result(0), image) for handle, image in zip(handles, wanted, strict=True))
    fits = adadiff.Engine(served(), "1MiB", threaded=False).capacity
    wide = shallow(depth=4)
    assert adadiff.Engine(served(), "1MiB", shallow_model=wide, threaded=False).capacity <= fits


def switched(
    switch: TwoStage, full: Model, x: Tensor, t: Tensor, context: Tensor, *policies: ExitPolicy, **given: object
) -> ForwardOutput:
    """Called as the sampler calls it."""
    by_lane = {"policy_index": None, "threshold": None, "cfg_partner": None, "execution": ExecutionOptions(), **given}
    network = torch.from_numpy(switch.choose(t.numpy()))
    return run_networks([Network(full, True), *switch.networks], network, x, t, context, policies=policies, **by_lane)


def test_one_forward_pass_in_detail() -> None:
    """Lanes 1, 3 and 5 go through the shallow network, one of them right at the switch; records and rows are those of
    the full one."""
    full, early = served(), shallow()
    given = inputs(full.backbone, 7)
    x, context = given.x, given.context % 3
    t = torch.tensor([10.0, 900.0, 499.99, 500.0, 30.0, 999.0, 20.0])
    depth = torch.tensor([1.0, 1.0, 2.0, 1.0, 5.0, 1.0, 3.0])
    switch, own = TwoStage(early, 500.0), {"threshold": depth, "record_scores": True}
    mixed = switched(switch, full, x, t, context, Replay(), **own)
    late, first = torch.arange(0, 7, 2), torch.arange(1, 7, 2)
    alone = forward(full, x[late], t[late], context[late], policy=Replay(), threshold=depth[late], record_scores=True)
    assert mixed.exit_layer.tolist() == [1, 3, 2, 3, 5, 3, 3]
    torch.testing.assert_close(mixed.prediction[late], alone.prediction, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        mixed.prediction[first], early.backbone(x[first], t[first], context[first]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(mixed.scores[:, late], alone.scores, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert bool(mixed.scores[:, first].isnan().all())
    assert mixed.rows == alone.rows
    whole = forward(early, x[first], t[first], context[first])
    assert mixed.macs == alone.macs + whole.macs
    assert mixed.macs_full == 7 * (alone.macs_full // 4)
    everyone = switched(switch, full, x, t * 0 + 900, context, Replay(), **own)
    assert everyone.exit_layer.tolist() == [3] * 7
    assert everyone.rows == (0,) * 5
    assert bool(everyone.scores.isnan().all())
    assert everyone.macs == 7 * (whole.macs // 3)


def test_policies_and_partners_follow_their_lanes() -> None:
    full, early = served(), shallow()
    given = inputs(full.backbone, 6)
    x, context = given.x, given.context % 3
    t = torch.tensor([900.0, 10.0, 800.0, 20.0, 30.0, 40.0])
    switch = TwoStage(early, 500.0)
    result = switched(
        switch,
        full,
        x,
        t,
        context,
        *(Depth(2), Full(), Depth(4)),
        policy_index=torch.tensor([0, 2, 1, 0, 0, 1]),
        cfg_partner=torch.tensor([2, 1, 0, 4, 3, 5]),
        execution=ExecutionOptions(count_sync="lagged"),
    )
    assert result.exit_layer.tolist() == [3, 4, 3, 2, 2, 5]
    with pytest.raises(ValueError, match="different ones"):
        switched(switch, full, x, t, context, Full(), cfg_partner=torch.tensor([1, 0, 2, 3, 4, 5]))


def test_variances_are_kept() -> None:
    network = DiTConfig(image_size=4, channels=1, patch=2, dim=16, depth=3, heads=2, num_classes=4)
    full = Model(dataclasses.replace(SERVED, network=network, exits=None)).requires_grad_(False).eval()
    early = Model(dataclasses.replace(full.config, network=dataclasses.replace(network, depth=1))).eval()
    for seed, model in enumerate((full, early)):
        scramble(model.backbone, 0.3, seed)
    given = inputs(full.backbone, 4)
    t, context = torch.tensor([900.0, 10.0, 800.0, 20.0]), given.context % 3
    result = switched(two_stage(full, early, 500.0), full, given.x, t, context, Full())
    for lane, model in enumerate((early, full, early, full)):
        own = slice(lane, lane + 1)
        both = model.backbone(given.x[own], t[own], context[own])[0]
        torch.testing.assert_close(
            torch.cat([result.prediction[lane], result.variance[lane]]), both, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": dataclasses.replace(SHALLOW.network, image_size=8)}, r"samples of \(1, 8, 8\) instead of"),
        ({"schedule": "stable_diffusion"}, "schedule stable_diffusion instead of linear"),
        ({"network": dataclasses.replace(SHALLOW.network, num_classes=6), "null_label": 5}, "classes 5 instead of 3"),
        ({"network": dataclasses.replace(SHALLOW.network, num_classes=3), "null_label": None}, "null class None"),
        ({"latent_scale": 0.2}, "latent scale 0.2 instead of None"),
        ({"network": dataclasses.replace(SHALLOW.network, depth=6)}, "7 blocks, the full one 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_do_not_fit_each_other(changes: dict, message: str) -> None:
    early = Model(dataclasses.replace(SHALLOW, **changes)).eval()
    for start in (
        lambda: adadiff.sample(served(), 2, steps=2, shallow_model=early),
        lambda: adadiff.Engine(served(), 2, shallow_model=early, threaded=False),
    ):
        with pytest.raises(ValueError, match=message):
            start()


@pytest.mark.parametrize("t_switch", [-1.0, 1000.5, float("nan"), True, "700"])
def test_switches_that_are_none(t_switch: object) -> None:
    with pytest.raises(ValueError, match=r"t_switch must be a number in 0\.\.1000"):
        two_stage(served(), shallow(), t_switch)


def test_a_switch_needs_a_network_to_switch_from() -> None:
    with pytest.raises(ValueError, match="give shallow_model"):
        adadiff.sample(served(), 2, steps=2, t_switch=500.0)


def test_on_the_command_line(tiny, tmp_path, capsys) -> None:
    early = saved(tmp_path / "early.safetensors", dataclasses.replace(config(), exits=None))
    out = tmp_path / "out"
    line = f"sample {tiny} --out {out} --n 2 --steps 4 --class-labels 3 --policy full"
    assert run(f"{line} --shallow-model {early} --t-switch 600") == 0
    images, _ = adadiff.sample(
        adadiff.load(tiny), 2, steps=4, class_labels=[3, 3], shallow_model=adadiff.load(early), t_switch=600.0
    )
    for i, image in enumerate(images):
        assert (read(out / f"{i:06d}.png") == shell.pixels(image)).all()
    written = json.loads((out / "report.json").read_text())["configuration"]
    assert (written["shallow_model"], written["t_switch"]) == (early, 600.0)
    assert run(f"{line} --shallow-model {early}") == 2  # another switch: not the pictures that lie there
    assert "t_switch" in error_line(capsys.readouterr().err)
    assert run(f"sample {tiny} --out {tmp_path / 'other'} --n 2 --t-switch 600") == 2
    assert "shallow_model" in error_line(capsys.readouterr().err)
