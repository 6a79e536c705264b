"""Reuse where its estimated error is small: decisions against the formula by hand, files, and what is refused."""

import copy
import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import adadiff
from adadiff.diffusion.solvers import DDIM
from adadiff.engine.engine import Engine
from adadiff.forward.narrow import network_of
from adadiff.forward.options import ExecutionOptions
from adadiff.output.asked import Asked
from adadiff.policies.estimated import ErrorEstimates, EstimatedReuse, Spent, norms_of
from adadiff.policies.estimated_file import estimates_json, read_estimates
from adadiff.policies.reuse import ReusePolicy
from adadiff.policies.spelling import parts_from
from late import use_sets
from pretend import PretendDevice, moved
from recorder import PolledSet
from sampler.cached_rest import Plan, by_hand, models

STEPS = 7
LABELS, SCALES = [0, 1, 2, 1], [1.0, 2.5, 1.0, 2.5]
INVARIANT = ExecutionOptions(batch_invariant=True)
WAYS = {"host": ExecutionOptions(), "invariant": INVARIANT, "sync": ExecutionOptions(count_sync="sync")}


def spent(level: float, share: float) -> Spent:
    return Spent(level, share, 0.1, 0.05, 0.2)


@cache
def estimates(kind: str, level: float | None = None, spread: float = 1.0) -> ErrorEstimates:
    """Made up: deviations lie within a few units of 0, errors fall and rise again. share=0.5 has the level, by default
    one at which some samples reuse."""
    model, level = models()[kind], (1.0 if kind == "dit" else -1.0) if level is None else level
    weights = torch.randn(STEPS, model.config.network.dim, generator=torch.Generator().manual_seed(3)) * spread
    levels = spent(level + 1, 0.3), spent(level - 1, 0.7)
    return ErrorEstimates(
        network=network_of(model.config),
        solver="ddim",
        guidance_scale=1.0,
        samples=32,
        seed=0,
        norms=norms_of(model.backbone.blocks),
        t=tuple(DDIM().table(model.schedule, STEPS).t.tolist()),
        age_power=2.5,
        profile=(0.0, 0.0, 0.5, -0.5, -1.5, -2.5, -0.5),
        weights=tuple(map(tuple, weights.tolist())),
        offsets=tuple([0.1 * s for s in range(STEPS)]),
        by_sample=levels,
        by_step=levels,
    )


@cache
def written(folder: Path, kind: str) -> str:
    file = folder / f"{kind}.json"
    file.write_text(estimates_json(estimates(kind)))
    return str(file)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("estimates"), "uvit")


@pytest.mark.parametrize("kind", ["uvit", "dit", "plain"])
@given(
    level=st.floats(-3, 2),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    by=st.sampled_from(["sample", "step", None]),
    exits=st.one_of(st.none(), st.floats(0.35, 0.65)),
    seed=st.integers(0, 2**40),
    label=st.integers(0, 2),
    scale=st.sampled_from([1.0, 2.5]),
    tied=st.booleans(),
    interval=st.sampled_from([(-1e9, 1e9), (0.0, 600.0), (300.0, 800.0)]),
)
@settings(max_examples=20, deadline=None)
def test_decisions_and_images_are_those_made_by_hand(
    kind, level, spread, by, exits, seed, label, scale, tied, interval
) -> None:
    """Composed with exits, growth is unknown between steps that ended at different layers, or at an exit. Both halves
    of a guided sample decide as one, whether or not they are asked to."""
    exits = None if kind == "plain" else exits
    plan = Plan(estimated=EstimatedReuse(estimates(kind, level, spread), 0.5, by), order=1, exits=exits)
    wanted = by_hand(models()[kind], plan, STEPS, seed, label, scale, True, interval)
    assume(wanted.margin > 1e-3)  # else rounding decides
    own = {"steps": STEPS, "seed": seed, "class_labels": label, "guidance_scale": scale, "tied": tied}
    images, report = adadiff.sample(
        models()[kind], 1, policy=plan.policy, guidance_interval=interval, execution=INVARIANT, **own
    )
    assert report.reused[:, 0].tolist() == wanted.reused
    assert report.exit_layer[:, 0].tolist() == wanted.blocks
    torch.testing.assert_close(images[0], wanted.x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_six_lanes_together_decide_as_each_by_hand(kind: str, way: str) -> None:
    reused = []
    for by in ("sample", "step"):
        plan = Plan(estimated=EstimatedReuse(estimates(kind), 0.5, by), order=1)
        own = {"steps": STEPS, "class_labels": LABELS, "guidance_scale": SCALES, "execution": WAYS[way]}
        images, report = adadiff.sample(models()[kind], 4, policy=plan.policy, **own)
        for i in range(4):
            wanted = by_hand(models()[kind], plan, STEPS, i, LABELS[i], SCALES[i], True)
            assert wanted.margin > 1e-4  # so that rounding decides nothing
            assert report.reused[:, i].tolist() == wanted.reused
            torch.testing.assert_close(images[i], wanted.x, rtol=2e-3, atol=2e-3)
        reused.append(report.reused[:, :, 0])
    assert reused[0].any()
    assert len({tuple(column) for column in reused[0].T.tolist()}) > 1  # by sample, they differ
    assert len({tuple(column) for column in reused[1].T.tolist()}) == 1  # by step, they do not


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    own = {"steps": STEPS, "execution": INVARIANT, "policy": EstimatedReuse(estimates("dit"), 0.5, "sample")}
    together, report = adadiff.sample(models()["dit"], 5, class_labels=[0, 1, 2, 0, 1], seed=3, **own)
    assert report.reused.any()
    for i in range(5):
        alone, _ = adadiff.sample(models()["dit"], 1, class_labels=i % 3, seed=3 + i, **own)
        assert torch.equal(alone[0], together[i])


def test_a_device_decides_what_the_host_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a pass makes the host wait."""
    use_sets(monkeypatch, PolledSet)
    own = {"steps": STEPS, "policy": EstimatedReuse(estimates("dit"), 0.5, "sample")}
    images, report = adadiff.sample(models()["dit"], 4, class_labels=LABELS, guidance_scale=SCALES, **own)
    with PretendDevice():
        model = moved(models()["dit"])
        adadiff.sample(model, 1, class_labels=1, **own)  # the first request compares the weights
    with PretendDevice(strict=True):
        execution = ExecutionOptions(count_sync="lagged")
        engine = Engine(model, 8, execution=execution, threaded=False)
        handles = [engine.submit(seed=i, class_labels=LABELS[i], guidance_scale=SCALES[i], **own) for i in range(4)]
        while engine.step():
            pass
    found = torch.stack([handle.result(0) for handle in handles])
    assert torch.equal(torch.cat([handle.report.reused for handle in handles], 1), report.reused)
    assert report.reused.any()
    torch.testing.assert_close(found, images, rtol=1e-3, atol=1e-2)


def test_after_an_initial_image_growth_is_known_after_two_steps() -> None:
    """A lane that begins at step 3 would reuse there if its first full step told what it cannot know."""
    low = dataclasses.replace(estimates("uvit", level=50.0), offsets=(0.0,) * STEPS)
    image = torch.zeros(1, *models()["uvit"].backbone.sample_shape)
    own = {"steps": STEPS, "class_labels": 1, "init_image": image, "strength": 4 / 7}
    _, report = adadiff.sample(models()["uvit"], 1, policy=EstimatedReuse(low, 0.5), **own)
    made = report.exit_layer[:, 0, 0] > 0
    assert made.sum() == 4
    assert report.reused[:, 0, 0][made].tolist() == [False, False, True, True]


def test_levels_between_measured_shares() -> None:
    """By sample, interpolated; by step, that of the largest share within the one asked for."""
    three = (spent(3.0, 0.2), spent(1.0, 0.4), spent(-1.0, 0.8))
    known = dataclasses.replace(estimates("uvit"), by_sample=three, by_step=three)
    for share, by_sample, by_step in ((0.2, 3.0, 3.0), (0.25, 2.5, 3.0), (0.5, 0.5, 1.0), (0.7, -0.5, 1.0)):
        assert known.level("sample", share) == pytest.approx(by_sample)
        assert known.level("step", share) == by_step
    assert known.level("sample", 0.1997) == known.level("step", 0.1997) == 3.0  # as printed
    assert known.level("step", 0.8004) == -1.0
    for share in (0.19, 0.81, float("nan")):
        with pytest.raises(ValueError, match=r"share must lie from 0\.200 to 0\.800"):
            known.level("sample", share)


def test_the_better_of_both_is_followed_unless_one_is_named() -> None:
    """By errors measured at the share, by sample interpolated; beyond the shares of one, the other."""
    sample = (Spent(3.0, 0.2, 1.0, 0, 2), Spent(1.0, 0.6, 0.01, 0, 1))
    step = (Spent(3.0, 0.3, 0.2, 0, 2), Spent(1.0, 0.8, 0.02, 0, 1))
    known = dataclasses.replace(estimates("uvit"), by_sample=sample, by_step=step)
    assert known.error("sample", 0.4) == pytest.approx(0.1)
    assert [known.error("step", share) for share in (0.3, 0.7, 0.8)] == [0.2, 0.2, 0.02]
    found = [EstimatedReuse(known, share).decides for share in (0.25, 0.3, 0.4, 0.6, 0.7)]
    assert found == ["sample", "step", "sample", "sample", "step"]
    assert EstimatedReuse(known, 0.3, "sample").decides == "sample"
    with pytest.raises(ValueError, match="share must lie"):
        EstimatedReuse(known, 0.1)
    with pytest.raises(ValueError, match="share must lie"):
        EstimatedReuse(known, 0.25, "step")


def test_files_hold_everything(file: str, tmp_path: Path) -> None:
    assert read_estimates(file) == estimates("uvit")
    policy = parts_from(f"estimate:{file},share=0.5,by=step").reuse
    assert policy == EstimatedReuse(estimates("uvit"), 0.5, "step", file)
    assert parts_from(str(policy)).reuse == policy
    third = dataclasses.replace(policy, share=1 / 3)
    assert parts_from(str(third)).reuse == third
    odd = tmp_path / "a+b.json"
    odd.write_text(Path(file).read_text())
    policy = parts_from(f"estimate:'{odd}',share=0.5+exit:0.1").reuse
    assert parts_from(str(policy)).reuse == policy
    odd.write_text(estimates_json(estimates("uvit", level=-2.0)))  # the same length: only its time tells
    assert read_estimates(str(odd)) == estimates("uvit", level=-2.0)


def test_files_of_anything_else_are_refused(file: str, tmp_path: Path) -> None:
    whole = json.loads(Path(file).read_text())
    other = tmp_path / "other.json"
    cases = [
        ({"format": "else"}, "does not hold"),
        ({"format_version": 1}, "format_version 1"),
        ({"solver": 3}, "solver"),
        ({"profile": whole["profile"][:-1]}, "by step"),
        ({"weights": [*whole["weights"][:-1], [1.0]]}, "as many weights"),
        ({"weights": "none"}, "weights"),
        ({"offsets": [None] * STEPS}, "numbers of at most"),
        ({"by_step": []}, "a level at least"),
        ({"by_sample": whole["by_sample"][::-1]}, "shares must rise"),
        ({"by_step": [{**whole["by_step"][0], "share": 1.2}]}, "shares must rise"),
        ({"by_step": [*whole["by_step"], {**whole["by_step"][0], "share": 0.9}]}, "as levels fall"),
        ({"by_step": [[1, 2, 3, 4, 5]]}, "by_step"),
        ({"by_step": [{"level": 1.0}]}, "fields"),
        ({"age_power": 10**400}, "numbers of at most"),
        ({"profile": [1e300] * STEPS}, "numbers of at most"),
        ({"format_version": True}, "format_version True"),
        ({"more": 1}, "more"),
    ]
    for change, words in cases:
        other.write_text(json.dumps({**whole, **change}))
        with pytest.raises(ValueError, match=words):
            read_estimates(str(other))
    for text in ("", "{", "[]", "\0"):
        other.write_text(text)
        with pytest.raises(ValueError, match="calibrate-reuse"):
            read_estimates(str(other))
    with pytest.raises(ValueError, match="there is no file"):
        read_estimates(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="name too long"):
        read_estimates("a" * 300)


def test_what_estimates_do_not_hold_for_is_refused(file: str, tmp_path: Path) -> None:
    own = {"class_labels": 1, "policy": f"estimate:{file},share=0.5"}
    right = {"steps": STEPS, **own}
    adadiff.sample(models()["uvit"], 1, **right)
    cases = [
        ("uvit", {"steps": STEPS + 1}, "for 7 steps, got 8"),
        ("uvit", {"solver": "dpm++2m"}, "with the solver ddim"),
        ("dit", {}, "another network"),
        ("uvit", {"policy": f"estimate:{file}"}, "needs share"),
        ("uvit", {"policy": f"estimate:{file},share=0.5,by=turn"}, "sample or step"),
        ("uvit", {"policy": f"estimate:{file},share=0.5+width:0.5"}, "width"),
        ("uvit", {"policy": f"estimate:{file},share=0.5+reuse:every=2"}, "one reuse policy"),
        ("uvit", {"shallow_model": models()["uvit"], "t_switch": 500.0}, "shallow_model cannot be combined"),
    ]
    for kind, change, words in cases:
        with pytest.raises(ValueError, match=words):
            adadiff.sample(models()[kind], 1, **{**right, **change})
    image = torch.zeros(1, *models()["uvit"].backbone.sample_shape)
    with pytest.raises(ValueError, match="lets no sample reuse in 2 steps"):
        adadiff.sample(models()["uvit"], 1, **right, init_image=image, strength=2 / 7)
    trained = copy.deepcopy(models()["uvit"])
    adadiff.sample(trained, 1, **right)
    for parameter in trained.backbone.blocks[2].parameters():
        parameter.mul_(1.01)
    for changed in (trained, copy.deepcopy(trained)):
        with pytest.raises(ValueError, match="another network"):
            adadiff.sample(changed, 1, **right)
    adadiff.sample(copy.deepcopy(models()["uvit"]).to(torch.bfloat16), 1, **right)
    for change, words in (
        ({"t": [0.0] * STEPS}, "other times"),
        ({"weights": [[0.0] * 3] * STEPS}, "another network"),
        ({"solver": "sampler.own_rules:Own"}, "no solver"),
    ):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**json.loads(Path(file).read_text()), **change}))
        with pytest.raises(ValueError, match=words):
            adadiff.sample(models()["uvit"], 1, **{**right, "policy": f"estimate:{other},share=0.5"})


def test_another_guidance_is_warned_of_once(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other.json"
    other.write_text(Path(file).read_text())
    for scale in (1.0, 2.5, 3.0):
        policy = f"estimate:{other},share=0.5"
        adadiff.sample(models()["uvit"], 1, steps=STEPS, class_labels=1, policy=policy, guidance_scale=scale)
    assert [text for text in caplog.messages if "guidance_scale=1" in text] == [caplog.messages[0]]


def test_exits_beside_it_are_warned_of_once(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A sample that exits early reuses nothing until growth is known again."""
    other = tmp_path / "other.json"
    other.write_text(Path(file).read_text())
    for more in ("", "+exit:0.5", "+exit:0.5", "+full"):
        policy = f"estimate:{other},share=0.5{more}"
        adadiff.sample(models()["uvit"], 1, steps=STEPS, class_labels=1, policy=policy)
    assert len([text for text in caplog.messages if "exits early reuses nothing" in text]) == 1


def test_a_folder_of_samples_names_the_estimates_that_it_holds_for(file: str, tmp_path: Path) -> None:
    """So that the same command does not complete it by others, which the same file holds later."""
    other, model = tmp_path / "other.json", tmp_path / "m.safetensors"
    adadiff.save(models()["uvit"], model)
    asked = Asked(
        model=str(model), n=2, steps=STEPS, class_labels=1, policy=f"estimate:{other},share=0.5", device="cpu"
    )
    found = []
    for level in (-1.0, -1.0, -2.0):
        other.write_text(estimates_json(estimates("uvit", level=level)))
        found.append((asked.configuration(models()["uvit"]), asked.files(models()["uvit"])))
    assert found[0] == found[1]
    for before, after in zip(found[0], found[2], strict=True):
        assert before != after
        assert before.keys() == after.keys()
    assert str(other) in found[0][1]


def test_an_own_policy_estimates_too() -> None:
    """The hook is open: a lane reuses after a full step if its features grew by little in it."""

    class Small(ReusePolicy):
        gate, order = "estimate", 1

        def estimate(self, growth: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
            assert growth.shape[1:] == (models()["uvit"].backbone.tokens - 2, models()["uvit"].backbone.dim)
            return growth.abs().flatten(1).mean(1)

        def reuse_mask(self, change: torch.Tensor, context: object) -> torch.Tensor:
            return change <= 20.0

    class Wrong(Small):
        def estimate(self, growth: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
            return growth

    class Unordered(Small):
        order = 0

    own = {"steps": STEPS, "class_labels": [0, 1, 2]}
    _, report = adadiff.sample(models()["uvit"], 3, policy=Small(), **own)
    assert report.reused.any()
    with pytest.raises(ValueError, match=r"estimate must return float32 \[3\]"):
        adadiff.sample(models()["uvit"], 3, policy=Wrong(), **own)
    with pytest.raises(ValueError, match="needs order=1"):
        adadiff.sample(models()["uvit"], 3, policy=Unordered(), **own)
