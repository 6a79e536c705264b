"""Lanes that reuse the rest of the network: what is computed, against caches kept by hand, sample by sample."""

from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import adadiff
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.solvers import DDIM
from adadiff.forward.options import ExecutionOptions
from sampler.cached_rest import Made, Plan, by_hand, models

INVARIANT = ExecutionOptions(batch_invariant=True)
WAYS = {
    "host": ExecutionOptions(),
    "invariant": INVARIANT,
    "sync": ExecutionOptions(count_sync="sync"),
    "lagged": ExecutionOptions(count_sync="lagged"),
}
STEPS = 7


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["uvit", "dit", "plain"])
def test_who_never_reuses_has_what_the_plain_network_makes_bit_for_bit(kind: str, way: str) -> None:
    own = {"steps": 4, "class_labels": [0, 1, 2], "guidance_scale": [1.0, 2.0, 3.0], "execution": WAYS[way]}
    images, _ = adadiff.sample(models()[kind], 3, **own)
    for policy in (
        "cache:threshold=0,order=1",
        "cache:threshold=0,gate=input,first=2",
        "reuse:every=1",
        "cache:batch=0",
    ):
        found, report = adadiff.sample(models()[kind], 3, policy=policy, **own)
        assert torch.equal(found, images)
        assert not report.reused.any()
        assert report.macs == report.macs_full
        assert report.never_acted


@pytest.mark.parametrize("kind", ["uvit", "dit"])
@given(
    plan=st.builds(
        Plan,
        cache=st.one_of(st.none(), st.floats(0.1, 1.0)),
        gate=st.sampled_from(["residual", "input"]),
        first=st.integers(1, 3),
        every=st.integers(1, 4),
        dense_early=st.integers(1, 3),
        dense_late=st.integers(0, 2),
        exits=st.one_of(st.none(), st.floats(0.35, 0.65)),
        order=st.integers(0, 1),
    ),
    seed=st.integers(0, 2**40),
    label=st.integers(0, 2),
    scale=st.sampled_from([1.0, 2.5]),
    tied=st.booleans(),
    interval=st.sampled_from([(-1e9, 1e9), (0.0, 600.0), (300.0, 800.0)]),
)
@settings(max_examples=20, deadline=None)
def test_decisions_and_images_are_those_made_by_hand(kind, plan, seed, label, scale, tied, interval) -> None:
    """Of every gate, guided and not, composed with exits, in an interval that begins or ends on the way: a half that
    appears late finds nothing to reuse."""
    if plan.cache is None:
        plan = Plan(None, "", 1, plan.every, plan.dense_early, plan.dense_late, plan.exits, plan.order)
    wanted = by_hand(models()[kind], plan, STEPS, seed, label, scale, tied, interval)
    assume(wanted.margin > 1e-4)  # else rounding decides
    own = {"steps": STEPS, "seed": seed, "class_labels": label, "guidance_scale": scale, "tied": tied}
    images, report = adadiff.sample(
        models()[kind], 1, policy=str(plan), guidance_interval=interval, execution=INVARIANT, **own
    )
    assert report.exit_layer[:, 0].tolist() == wanted.blocks
    assert report.reused[:, 0].tolist() == wanted.reused
    torch.testing.assert_close(images[0], wanted.x, rtol=2e-3, atol=2e-3)


# changes of the DiT's first blocks are larger
PLANS = {
    kind: [
        Plan(cache),
        Plan(cache, first=2, exits=0.42),
        Plan(0.6, gate="input", exits=0.46),
        Plan(every=3, dense_early=2, dense_late=1, exits=0.46),
        Plan(cache, exits=0.42, order=1),
        Plan(every=3, order=1),
    ]
    for kind, cache in (("uvit", 0.35), ("dit", 0.8))
}
LABELS, SCALES = [0, 1, 2, 1], [1.0, 2.5, 1.0, 2.5]


@cache
def made(kind: str, plan: Plan, i: int) -> Made:
    """Of the i-th of four samples, two of which are guided."""
    return by_hand(models()[kind], plan, STEPS, i, LABELS[i], SCALES[i])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_every_way_to_run_a_pass_decides_as_by_hand(kind: str, way: str) -> None:
    """Six lanes together, which stand in different rows and leave at different layers."""
    for plan in PLANS[kind]:
        own = {"steps": STEPS, "class_labels": LABELS, "guidance_scale": SCALES, "execution": WAYS[way]}
        images, report = adadiff.sample(models()[kind], 4, policy=str(plan), **own)
        for i in range(4):
            wanted = made(kind, plan, i)
            assert wanted.margin > 1e-5  # so that rounding decides nothing
            assert report.exit_layer[:, i].tolist() == wanted.blocks
            assert report.reused[:, i].tolist() == wanted.reused
            torch.testing.assert_close(images[i], wanted.x, rtol=2e-3, atol=2e-3)


def test_the_cases_by_hand_hold_everything() -> None:
    """Each plan lets samples reuse and keeps some from it; in some, what is reused ended at an exit."""
    for kind, plans in PLANS.items():
        early = 0
        for plan in plans:
            all_ = [made(kind, plan, i) for i in range(4)]
            blocks, reused = (
                torch.tensor([getattr(one, name) for one in all_])[:, :, 0] for name in ("blocks", "reused")
            )
            assert reused.any()
            assert not reused[:, 1:].all()
            ends = (plan.first < blocks[:, :-1]) & (blocks[:, :-1] < models()[kind].num_layers)
            early += int((ends & ~reused[:, :-1] & reused[:, 1:]).sum())
        assert early > 0


def test_a_prediction_that_is_held_makes_larger_steps_of_ddim() -> None:
    """A network whose stem is blind to the image, and whose head is to the time, predicts by time alone. A plan of
    every second step holds what it predicts, and two steps of DDIM with one prediction are one larger step."""
    model = adadiff.Model(models()["dit"].config).requires_grad_(False).eval()
    model.load_state_dict(models()["dit"].state_dict())
    backbone = model.backbone
    for parameter in (*backbone.x_embedder.parameters(), *backbone.final_layer.adaLN_modulation.parameters()):
        parameter.zero_()
    for parameter in backbone.modulation.parameters():
        parameter[0] = 0  # of the first block, which then adds nothing
    images, report = adadiff.sample(model, 2, steps=8, policy="reuse:every=2", class_labels=1)
    assert report.reused[:, :, 0].sum(0).tolist() == [4, 4]
    t = DDIM().table(model.schedule, 8).t[::2]
    a = model.schedule.log_alpha_bar(t).exp()
    after = torch.cat([a[1:], torch.ones(1, dtype=torch.float64)])
    x = initial_noise(torch.tensor([0, 1]), backbone.sample_shape, torch.device("cpu"))
    for i in range(4):
        eps = backbone(x, t[i].float().expand(2), torch.tensor([1, 1]))[:, :1]
        x = after[i].sqrt() * (x - (1 - a[i]).sqrt() * eps) / a[i].sqrt() + (1 - after[i]).sqrt() * eps
    torch.testing.assert_close(images, x.float(), rtol=1e-4, atol=1e-4)
    whole, _ = adadiff.sample(model, 2, steps=8, class_labels=1)
    assert float((whole - images).abs().max()) > 0.01  # what is held is not what would have been computed
