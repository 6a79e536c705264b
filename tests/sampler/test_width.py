"""Width by timestep, sample by sample: each lane runs the narrow network of its own time, whoever shares the batch."""

import bisect
import json
import logging
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff.engine.engine import Engine
from adadiff.forward.forward import run_forward
from adadiff.forward.narrow import narrow, network_of
from adadiff.forward.options import ExecutionOptions
from adadiff.model import Model
from adadiff.policies.parts import Parts
from adadiff.policies.spelling import parts_from
from adadiff.policies.width import Width
from adadiff.policies.width_file import width_json
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from sampler.slim import SLIM_SERVED, fresh, slim_served
from sampler.test_calibration import HALF, made
from sampler.test_two_stage import by_hand, shallow
from sampler.tiny import served

INVARIANT = ExecutionOptions(batch_invariant=True)
FOLLOWED = Width((200.0, 480.0, 777.0), (1.0, 0.25, 0.8, 0.5))
OTHER = Width((500.0,), (0.25, 1.0))
# With 3, 5 and 7 steps no two samples ever stand at the same timestep
STEPS, LABELS = [3, 5, 7, 5, 7, 3, 5], [0, 2, 1, 0, 1, 2, 0]


def test_thresholds_of_the_whole_network_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not where no network is narrow, nor where depths come from a table, which hold at any width."""
    model, given = slim_served(), {"steps": 2, "class_labels": 1}
    calibrated = made(HALF).policy("budget", 0.5)
    with caplog.at_level(logging.WARNING, "adadiff"):
        adadiff.sample(model, 1, policy=[calibrated, Width((), (1.0,))], **given)
        assert "calibrated" not in caplog.text
        for _ in range(2):
            adadiff.sample(model, 1, policy=[calibrated, OTHER], **given)
    assert caplog.text.count("its thresholds were calibrated on the whole network") == 1


def test_each_step_is_by_the_network_of_its_time() -> None:
    images, report = adadiff.sample(slim_served(), 4, steps=STEPS[:4], class_labels=LABELS[:4], policy=FOLLOWED)
    ran = []

    def network_at(time: float) -> Model:
        ran.append(narrow(slim_served(), FOLLOWED.widths[bisect.bisect_right(FOLLOWED.times, time)]))
        return ran[-1]

    for i, (steps, label) in enumerate(zip(STEPS[:4], LABELS[:4], strict=True)):
        torch.testing.assert_close(images[i], by_hand(i, label, steps, network_at), rtol=2e-4, atol=2e-4)
    assert len({id(one) for one in ran}) == 4
    each = [sum(m.backbone.stem_and_head_macs()) + sum(b.macs(6) for b in m.backbone.blocks) for m in ran]
    assert report.macs == sum(each)
    assert report.macs_full == len(ran) * max(each)
    assert not report.never_acted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 2.5},
        {"guidance_scale": [1.0, 3.0, 1.0, 2.0, 1.0, 1.5, 1.0], "guidance_interval": (300, 900)},
        {"policy": ("exit:0.5", FOLLOWED), "guidance_scale": 2.0},
        {"policy": ("exit:patience=0.5", FOLLOWED), "tied": True, "guidance_scale": 2.0},
        {"solver": "ddim:0.7"},
    ],
    ids=["plain", "guided", "guided in part", "exits", "tied exits", "noise"],
)
def test_a_sample_does_not_depend_on_its_mates(settings: dict) -> None:
    """Bit for bit: of its seven, in another order, and beside samples that follow other policies."""
    given = {"policy": FOLLOWED, **settings}
    by_sample = {"steps": STEPS, "class_labels": LABELS, "seed": list(range(7))}
    scales = given.pop("guidance_scale", [1.0] * 7)
    by_sample["guidance_scale"] = scales if isinstance(scales, list) else [scales] * 7
    model, images, layers = slim_served(), [], []
    for i in range(7):
        own = {key: values[i] for key, values in by_sample.items()}
        image, report = adadiff.sample(model, 1, execution=INVARIANT, **own, **given)
        images.append(image[0])
        layers.append(report.exit_layer[:, 0])
    together, report = adadiff.sample(model, 7, batch=5, execution=INVARIANT, **by_sample, **given)
    assert torch.equal(together, torch.stack(images))
    for i, own in enumerate(layers):
        assert torch.equal(report.exit_layer[: len(own), i], own)
    if "policy" in settings:
        assert 1 < report.mean_exit_layer < 4.9
    mates = ["full", OTHER, "exit:0.5", ("exit:depth=2", OTHER), "width:0.25"]
    with Engine(model, 9, threaded=False, execution=INVARIANT) as engine:
        handles = []
        for i in (4, 0, 6, 2, 5, 1, 3):
            own = {key: values[i] for key, values in by_sample.items()}
            handles.append((i, engine.submit(**own, **given)))
            engine.submit(seed=99 + i, steps=4, class_labels=1, policy=mates[i % len(mates)])
            engine.step()
        while engine.step():
            pass
    for i, handle in handles:
        assert torch.equal(handle.result(0), images[i])


def test_products_see_the_rows_of_their_width_alone() -> None:
    model, seen = slim_served(), []

    def recording(network: Model, x: torch.Tensor, t: torch.Tensor, *given: object, **options: object):
        block, rows = network.backbone.blocks[3], []
        hooks = [m.register_forward_pre_hook(lambda _, h: rows.append(len(h[0]))) for m in (block.attn.qkv, block.mlp)]
        output = run_forward(network, x, t, *given, **options)
        for hook in hooks:
            hook.remove()
        seen.append((network.config.network.width, t.tolist(), rows))
        return output

    batch = Batch(model, 7, forward=recording)
    samples = SampleBatch.of(
        model, 7, steps=STEPS, class_labels=LABELS, policy=FOLLOWED, guidance_scale=[1, 2] * 3 + [1]
    )
    batch.admit(samples, torch.arange(7).numpy())
    while batch._slots.running.any():
        seen.clear()
        batch.tick()
        for width, times, rows in seen:
            assert {FOLLOWED.widths[bisect.bisect_right(FOLLOWED.times, t)] for t in times} == {width}
            assert rows == [len(times)] * 2
        assert len({width for width, _, _ in seen}) == len(seen)


def test_one_width_is_that_network() -> None:
    model = slim_served()
    given = {"steps": 4, "class_labels": [0, 1, 2], "policy": "full"}
    half, _ = adadiff.sample(narrow(model, 0.5), 3, **given)
    assert torch.equal(adadiff.sample(model, 3, **{**given, "policy": "width:0.5"})[0], half)
    whole, plain = adadiff.sample(model, 3, **given)
    images, report = adadiff.sample(model, 3, **{**given, "policy": "width:1"})
    assert torch.equal(images, whole)
    assert (report.macs, report.macs_full) == (plain.macs, plain.macs_full)
    assert not torch.equal(half, whole)


def test_weights_that_change_in_flight_are_those_of_the_next_step() -> None:
    model = fresh("dit")
    samples = SampleBatch.of(model, 2, steps=3, class_labels=[0, 1], policy="width:0.5")
    batch, same = Batch(model, 2), Batch(model, 2)
    for one in (batch, same):
        one.admit(samples, torch.arange(2).numpy())
        one.tick()
    other = fresh("dit")
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    model.load_state_dict(other.state_dict(), assign=True)
    batch.tick()
    expected = Batch(other, 2)
    expected.admit(SampleBatch.of(other, 2, steps=3, class_labels=[0, 1], policy="width:0.5"), torch.arange(2).numpy())
    expected.tick()
    slots = torch.arange(2).numpy()
    expected.replace(slots, same.peek(slots))
    expected.tick()
    assert torch.equal(batch.peek(slots), expected.peek(slots))


def test_equal_policies_share_a_choice() -> None:
    """A server that reads the same file for every request runs its samples of one width together."""
    choices = {id(SampleBatch.of(slim_served(), 1, policy=Width((500.0,), (0.25, 1.0))).choice) for _ in range(3)}
    assert choices == {id(SampleBatch.of(slim_served(), 2, policy=OTHER).choice)}


def written(path: Path, **changes: object) -> str:
    values = json.loads(width_json(FOLLOWED, json.loads(network_of(SLIM_SERVED)), share=0.5, settings={"n": 2}))
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    path.write_text(json.dumps(values))
    return f"width:{path}"


def test_a_schedule_is_read_from_its_file(tmp_path: Path) -> None:
    policy = written(tmp_path / "a.json")
    found = parts_from(policy).width
    assert (found.times, found.widths, str(found)) == (FOLLOWED.times, FOLLOWED.widths, policy)
    given = {"steps": 5, "class_labels": 1}
    assert torch.equal(
        adadiff.sample(slim_served(), 2, policy=policy, **given)[0],
        adadiff.sample(slim_served(), 2, policy=FOLLOWED, **given)[0],
    )
    both = parts_from(f"exit:0.5+{policy}")
    assert both == Parts(exit=parts_from("exit:0.5").exit, width=found)
    written(tmp_path / "a.json", times=[], widths=[0.25])  # the file is read again, not remembered
    assert parts_from(policy).width.widths == (0.25,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, this release reads 1"),
        ({"widths": [0.5]}, "3 times need 4 widths, got 1"),
        ({"times": None}, "it lacks times"),
        ({"times": "500"}, "times must be a list"),
        ({"network": []}, "network must be a table"),
        ({"widths": [1, "a", 1, 1]}, "finite numbers"),
        ({"widths": [1, 2, 1, 1]}, r"in \(0, 1\]"),
        ({"times": [1, [2], 3]}, "finite numbers"),
        ({"depth": 3}, "unknown key 'depth'"),
    ],
)
def test_a_damaged_schedule_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    policy = written(tmp_path / "a.json", **changes)
    with pytest.raises(ValueError, match=f"cannot use policy '{policy}': .*{message}"):
        adadiff.sample(slim_served(), 1, policy=policy)


def test_what_is_no_schedule_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("[")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "large").write_bytes(b" " * (2**24 + 1))
    for text, message in {
        str(tmp_path / "none.json"): "neither a number nor a file",
        str(tmp_path / "text" / "x"): "neither a number nor a file",
        str(tmp_path / "text"): "is not JSON",
        str(tmp_path / "list"): "a table of values",
        str(tmp_path / "large"): "more than",
        str(tmp_path): "no regular file",
        "": "no regular file",
        "0": r"in \(0, 1\]",
        "1.5": r"in \(0, 1\]",
        "nan": "finite",
    }.items():
        with pytest.raises(ValueError, match=f"cannot use policy 'width:{text}': .*{message}"):
            parts_from(f"width:{text}")
    with pytest.raises(ValueError, match="has no depth"):
        width_json(FOLLOWED, {}, depth=3)


def test_a_model_that_cannot_follow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policy 'width:0\.5' needs a model that was trained at several widths"):
        adadiff.sample(served(), 1, policy="width:0.5")
    with pytest.raises(ValueError, match=r"asks for width 0\.3; this model was trained at"):
        adadiff.sample(slim_served(), 1, policy=Width((3.0,), (1.0, 0.3)))
    with pytest.raises(ValueError, match="was found for another network"):
        adadiff.sample(fresh(), 1, policy=written(tmp_path / "a.json"))
    early = shallow()
    with pytest.raises(ValueError, match="leave one of them out"):
        adadiff.sample(slim_served(), 1, policy="width:0.5", shallow_model=early)
    with (
        Engine(slim_served(), 2, threaded=False, shallow_model=early) as engine,
        pytest.raises(ValueError, match="leave one of them out"),
    ):
        engine.submit(seed=0, policy="width:0.5")


def test_widths_follow_the_times() -> None:
    """Below the first time the first width, from a time on the next one."""
    t = torch.tensor([0.0, 199.9, 200.0, 479.0, 480.0, 776.0, 777.0, 1000.0]).numpy()
    assert FOLLOWED.widths_at(t).tolist() == [1, 1, 0.25, 0.25, 0.8, 0.8, 0.5, 0.5]
