"""Policies that reuse the rest of the network: refusals before any work, several networks, the batch-global baseline,
and what reports and commands tell."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import adadiff
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.solvers import DDIM
from adadiff.forward.networks import Network
from adadiff.forward.options import ExecutionOptions
from adadiff.model import Model
from adadiff.policies.reuse import BatchCache, ReuseContext, ReusePolicy
from adadiff.policies.spelling import parts_from
from adadiff.sampling.batch import Batch
from adadiff.sampling.capacity import Rooms, capacity_of, peak_bytes
from adadiff.sampling.reports import log_never_acted
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.sampling.warn_once import warn_once
from naming import named
from sampler.cached_rest import models
from sampler.shell import config, error_line, run, saved
from sampler.tiny import SERVED, scramble, served, stepped

INVARIANT = ExecutionOptions(batch_invariant=True)


class Unknown(ReusePolicy):
    gate = "output"


class Quadratic(ReusePolicy):
    order = 2


class Nowhere(ReusePolicy):
    first = 0


class Worded(ReusePolicy):
    first = "2"


@pytest.mark.parametrize(
    ("policy", "steps", "message"),
    [
        ("cache:threshold=0.1,first=5", 4, "leaves nothing out: this network has 5 blocks.* take first of 4 or less"),
        ("cache:threshold=0.1,last=1", 4, "last blocks that always run are for pipelines.*leave last out"),
        ("reuse:every=2,dense_early=4", 4, "lets no sample reuse in 4 steps.* take smaller dense_early"),
        ("reuse:every=2,dense_early=2,dense_late=2", 4, "lets no sample reuse in 4 steps"),
        (Unknown(), 4, "must be None or one of residual, input, estimate, got 'output'"),
        (Quadratic(), 4, "order of .* must be 0 or 1, got 2"),
        (Nowhere(), 4, "first of .* must be a whole number of 1 or more, got 0"),
        (Worded(), 4, "first of .* must be a whole number of 1 or more, got '2'"),
        (f"reuse:every={10**20}", 4, "every must be at most 2147483647"),
        (f"reuse:every=2,dense_late={10**20}", 1, "dense_late must be at most 2147483647"),
        ("cache:batch=-1", 4, "threshold must be finite and at least 0"),
        ("cache:batch=0.1,threshold=0.1", 4, "takes no 'threshold=0.1'"),
        ("cache:threshold=0.1+reuse:every=2", 4, "one reuse policy"),
    ],
    ids=named,
)
def test_what_cannot_work_is_refused_before_any_work(policy: object, steps: int, message: str) -> None:
    engine = stepped(2)
    for ask in (
        lambda: adadiff.sample(served(), 2, steps=steps, policy=policy),
        lambda: engine.submit(seed=1, steps=steps, policy=policy),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


@pytest.mark.parametrize("gate", ["residual", "input"])
def test_a_change_is_nan_where_nothing_can_be_reused(gate: str) -> None:
    """Not what is left of earlier samples in the same slot of the store."""
    seen: list[list[float]] = []

    class Noting(ReusePolicy):
        def reuse_mask(self, change: torch.Tensor, context: ReuseContext) -> torch.Tensor:
            seen.append(change.tolist())
            return context.step >= 0

    policy = Noting()
    policy.gate = gate
    adadiff.sample(served(), 2, steps=3, batch=1, class_labels=[0, 1], policy=policy)
    assert [bool(np.isnan(change).all()) for change in seen] == [True, False, False] * 2


def test_a_forward_pass_alone_has_no_earlier_steps() -> None:
    x, t = torch.zeros(1, 1, 4, 4), torch.zeros(1)
    with pytest.raises(ValueError, match=r"only exit policies can be used here; policy 'cache:threshold=0\.1' is for"):
        adadiff.forward(served(), x, t, torch.zeros(1, dtype=torch.int64), policy="cache:threshold=0.1")


def test_a_plan_of_one_step_and_samples_of_other_lengths_are_no_errors() -> None:
    adadiff.sample(served(), 1, steps=1, policy="reuse:every=2")
    _, report = adadiff.sample(served(), 2, steps=[3, 6], policy="reuse:every=2,dense_early=4")
    assert report.reused[:, :, 0].sum(0).tolist() == [0, 1]


def test_the_batch_global_cache_is_spelled() -> None:
    for text in ("cache:batch=0.25", "cache:batch=0.25,first=2"):
        found = parts_from(text).reuse
        assert isinstance(found, BatchCache)
        assert str(found) == text
        assert parts_from(found).reuse is found


@pytest.mark.parametrize("way", [None, "sync", "lagged"])
def test_the_batch_global_cache_decides_for_all_by_sums_over_all(way: str | None) -> None:
    """By hand, of three samples in step: one number, one decision. Where each decides for itself, some differ."""
    model, n, threshold, steps = served(), 3, 0.3, 8
    own = {"steps": steps, "class_labels": 1, "execution": ExecutionOptions(count_sync=way)}
    images, report = adadiff.sample(model, n, policy=f"cache:batch={threshold}", **own)
    backbone, table = model.backbone, DDIM().table(model.schedule, steps)
    x = initial_noise(torch.arange(n), backbone.sample_shape, torch.device("cpu"))
    reference = rest = None
    hits = []
    for i, t in enumerate(table.t):
        begun, _ = backbone.embed(x, t.float().expand(n), torch.ones(n, dtype=torch.int64))
        h = first = backbone.blocks[0](begun)
        residual = first - begun
        change = torch.inf if reference is None else float((residual - reference).abs().sum() / reference.abs().sum())
        assert abs(change - threshold) > 1e-4
        hits.append(change <= threshold)
        if not hits[-1]:
            skips = [h]
            skips.append(h := backbone.blocks[1](h))
            h = backbone.blocks[2](h)
            for block in backbone.out_blocks:
                h = block(h, skip=skips.pop())
            reference, rest = residual, h - first
        eps = backbone.head((first + rest)[:, backbone.num_prefix_tokens :])
        a = model.schedule.log_alpha_bar(t).exp()
        after = model.schedule.log_alpha_bar(table.t[i + 1]).exp() if i + 1 < steps else torch.ones(())
        x = (after.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - after).sqrt() * eps).float()
    assert report.reused[:, :, 0].tolist() == [[hit] * n for hit in hits]
    assert 0 < sum(hits) < steps - 1
    torch.testing.assert_close(images, x, rtol=1e-3, atol=1e-3)
    _, alone = adadiff.sample(model, n, policy=f"cache:threshold={threshold}", **own)
    assert bool((alone.reused[:, :, 0] != report.reused[:, :, 0]).any())


@dataclasses.dataclass(frozen=True, eq=False)
class Turns:
    """Another network, in which policies decide, at every time in `at`."""

    other: Model
    at: tuple[float, ...]

    @property
    def networks(self) -> tuple[Network]:
        return (Network(self.other, asks=True),)

    def choose(self, t: np.ndarray) -> np.ndarray:
        return np.isin(t.round(), np.array(self.at)).astype(np.int64)


@pytest.mark.parametrize("execution", [INVARIANT, ExecutionOptions(count_sync="sync")], ids=["host", "device"])
@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        ("AAAAAA", [False, True, True, True, True, True]),
        ("AABBAA", [False, True, False, True, False, True]),
        ("ABABAB", [False] * 6),
    ],
)
def test_what_another_network_has_made_is_never_used(turns: str, wanted: list[bool], execution) -> None:
    other = Model(SERVED).requires_grad_(False).eval()
    scramble(other.backbone, 0.3, seed=11)
    scramble(other.exits, 0.3, seed=12)
    times = DDIM().table(served().schedule, 6).t.float().numpy().round()
    choice = Turns(other, tuple(t for t, turn in zip(times, turns, strict=True) if turn == "B"))
    for policy in ("reuse:every=9", "cache:threshold=1e6", "cache:threshold=1e6,gate=input"):
        batch = Batch(served(), 2, execution=execution, choice=choice)
        batch.admit(SampleBatch.of(served(), 2, steps=6, policy=policy, class_labels=1), np.arange(2))
        records = [record for _ in range(6) for record in batch.tick().records]
        for i in range(2):
            assert [bool(record.read().reused[i, 0]) for record in records] == wanted


def test_a_shallow_network_takes_no_part() -> None:
    """Its steps neither reuse nor are reused; the first step of the full one is full."""
    config_ = dataclasses.replace(SERVED, network=dataclasses.replace(SERVED.network, depth=2), exits=None)
    shallow = Model(config_).requires_grad_(False).eval()
    scramble(shallow.backbone, 0.3, 4)
    own = {"steps": 8, "class_labels": 1, "shallow_model": shallow, "t_switch": 500.0}
    images, report = adadiff.sample(served(), 2, policy="reuse:every=2", **own, execution=INVARIANT)
    late = DDIM().table(served().schedule, 8).t < 500
    first = int(late.nonzero()[0])
    assert report.exit_layer[:first, :, 0].tolist() == [[3, 3]] * first
    assert report.reused[:, 0, 0].tolist() == [i >= first and (i - first) % 2 == 1 for i in range(8)]
    with stepped(3, shallow_model=shallow, t_switch=500.0) as engine:
        handles = [engine.submit(seed=i, steps=8, class_labels=1, policy="reuse:every=2") for i in range(2)]
        while engine.step():
            pass
    assert all(torch.equal(handle.result(0), image) for handle, image in zip(handles, images, strict=True))


def test_steps_are_counted_from_where_a_sample_begins() -> None:
    own = {"steps": 8, "class_labels": 1, "init_image": torch.zeros(1, 4, 4), "strength": 0.5}
    _, report = adadiff.sample(served(), 1, policy="reuse:every=2,dense_early=2,dense_late=1", **own)
    assert report.exit_layer[:, 0, 0].tolist() == [0, 0, 0, 0, 5, 5, 1, 5]


def test_work_by_hand() -> None:
    """What a step costs that reuses: stem, the first block, and the head that its full step ended with: of an early
    exit, one behind an MLP."""
    model = models()["dit"]
    backbone, exits, patches = model.backbone, model.exits, 4
    stem_and_head, block = sum(backbone.stem_and_head_macs()), backbone.blocks[0].macs(4)
    own = exits.head_macs(patches)
    assert own > 0
    _, report = adadiff.sample(model, 1, steps=4, policy="reuse:every=2", class_labels=1)
    assert report.exit_layer[:, 0, 0].tolist() == [4, 1, 4, 1]
    assert report.macs == 4 * stem_and_head + (4 + 1 + 4 + 1) * block
    _, report = adadiff.sample(model, 1, steps=4, policy="reuse:every=2+exit:depth=3", class_labels=1)
    assert report.exit_layer[:, 0, 0].tolist() == [3, 1, 3, 1]
    assert report.macs == 4 * (stem_and_head + own) + (3 + 1 + 3 + 1) * block


def test_reports_tell_how_many_steps_reused() -> None:
    _, report = adadiff.sample(served(), 3, steps=8, policy="reuse:every=4", class_labels=1)
    assert report.reuses == 18
    assert "; 75.0% of the steps reused an earlier one" in str(report)
    assert not report.never_acted
    _, report = adadiff.sample(served(), 3, steps=8, policy="exit:0.4", class_labels=1)
    assert report.reused is None
    assert "reused" not in str(report)
    engine = stepped(2)
    handles = [engine.submit(seed=1, steps=4, policy=policy) for policy in ("reuse:every=2", "full")]
    while engine.step():
        pass
    assert handles[0].report.reused[:, 0, 0].tolist() == [False, True, False, True]
    assert handles[1].report.reused is None
    assert (engine.report.batch.reused, engine.report.batch.asked, engine.report.batch.exited) == (2, 4, 2)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "adadiff"]


def test_a_cache_that_never_hits_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    log_never_acted.cache_clear()
    with caplog.at_level(logging.WARNING, "adadiff"):
        for _ in range(2):
            _, report = adadiff.sample(served(), 2, steps=3, policy="cache:threshold=0")
            assert report.never_acted
            assert str(report).endswith("; the policy never let a sample reuse")
    assert messages(caplog) == ["policy cache:threshold=0.0 never let a sample reuse: every block was run"]


def test_a_stochastic_solver_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "adadiff"):
        for solver in ("ddim", "dpm++2m", "ddpm", "ddpm"):
            _, report = adadiff.sample(served(), 1, steps=4, policy="reuse:every=2", solver=solver)
            assert report.reuses == 2
    assert len(messages(caplog)) == 1
    assert "DDPM" in messages(caplog)[0]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny = saved(tmp_path / "tiny.safetensors", config())
    out = tmp_path / "out"
    line = f"sample {tiny} --n 2 --steps 4 --class-labels 3"
    assert run(f"{line} --out {out} --policy reuse:every=2+exit:0.01") == 0
    assert "50% of the steps reused an earlier one" in capsys.readouterr().out
    written = json.loads((out / "report.json").read_text())
    assert written["configuration"]["policy"] == "reuse:every=2+exit:0.01"
    assert run(f"{line} --out {tmp_path / 'other'} --policy cache:threshold=0.1,first=3") == 2
    assert "take first of 2 or less" in error_line(capsys.readouterr().err)
    assert (
        run(f"evaluate {tiny} --n 4 --steps 4 --policy cache:threshold=0.5 --policy full --json {out / 'e.json'}") == 0
    )
    assert "cache:threshold=0.5" in json.loads((out / "e.json").read_text())["results"]
    assert run(f"diff {tiny} --steps 4 --policy reuse:every=2 --other policy=full") == 0
    assert "exits differ" in capsys.readouterr().out


def serving_bytes(made: Model, n: int, request: dict) -> int:
    """Peak bytes of a batch of n samples, from its making to their last step."""

    def run_all() -> None:
        batch = Batch(made, n)
        for i in range(n):  # one after the other: what is kept grows
            batch.admit(SampleBatch.of(made, 1, seed=i, **request), np.zeros(1, dtype=np.int64))
        for _ in range(3):
            assert not batch.tick().failed

    return peak_bytes(run_all)


@pytest.mark.parametrize("kind", ["uvit", "dit", "plain"])
@pytest.mark.parametrize(
    ("policy", "guidance_scale"),
    [
        ("reuse:every=2", 1.0),
        ("reuse:every=2,order=1", 1.0),
        ("cache:threshold=0.5", 2.0),
        ("cache:threshold=0.5,gate=input", 1.0),
    ],
)
def test_bytes_hold_requests_that_reuse_too(kind: str, policy: str, guidance_scale: float) -> None:
    """As many as an engine of so many bytes has in flight take no more."""
    made, spelled = models()[kind], "128KiB"
    capacity, rooms = capacity_of(made, spelled), Rooms(made, spelled)
    request = {"steps": 3, "policy": policy, "class_labels": 1, "guidance_scale": guidance_scale}
    samples = SampleBatch.of(made, 1, **request)
    assert rooms.of(samples) > samples.lanes == Rooms(made, capacity).of(samples)
    assert rooms.of(SampleBatch.of(made, 1, steps=3, class_labels=1)) == 1
    fits = int(capacity / rooms.of(samples))
    assert fits >= 2
    # tables of the solver and the schedule take some, whatever the capacity
    assert serving_bytes(made, fits, request) < 2**17 + 12 * 1024


def test_an_engine_of_bytes_holds_fewer_that_reuse() -> None:
    engine = adadiff.Engine(served(), "200KiB", threaded=False)
    handles = [engine.submit(seed=i, steps=2, policy="reuse:every=2", class_labels=1) for i in range(engine.capacity)]
    engine.step()
    assert 0 < engine.report.running < engine.capacity
    engine.close()
    assert all(handle.report.reuses == 1 for handle in handles)
    with pytest.raises(ValueError, match="a reusing request takes"):
        adadiff.Engine(served(), "20KiB", threaded=False).submit(
            seed=0, policy="cache:threshold=0.1", guidance_scale=2.0
        )
