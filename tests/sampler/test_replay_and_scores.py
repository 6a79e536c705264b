"""What a run leaves behind: its exits can be run again, and the uncertainties it was decided by are kept on request."""

import math

import pytest
import torch
from torch import Tensor

from adadiff.diffusion.noise import initial_noise
from adadiff.engine.engine import Engine
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import Replay
from adadiff.sampling.sampler import SamplerRun, sample
from sampler.test_text_and_images import SHAPE, schedule
from sampler.tiny import Inputs, plain_layers, plain_predictions, plain_uncertainties, requests, served, stepped

EXACT = ExecutionOptions(batch_invariant=True)
L = 5
RUN = {
    "seed": [3, 4, 5, 6, 7, 8],
    "steps": [4, 2, 5, 3, 5, 1],
    "class_labels": [0, 1, 2, 0, 1, 2],
    "guidance_scale": [1.0, 2.5, 1.0, 0.5, 3.0, 1.0],
    "guidance_interval": (100.0, 900.0),
}
POLICIES = ["exit:0.5", "exit:patience=0.5", "exit:depth=2.6", "exit:0.45,min_layer=2", "full"]


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, NaN in the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("solver", ["ddpm", "dpm++2m", "dpm-fast", "unipc:order=3", "heun"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_is_repeated_bit_for_bit(policy: str, solver: str) -> None:
    """In batches of the same size, and, computed lane by lane, of any; with scores computed or not."""
    given = {"solver": solver, **RUN}
    if solver == "dpm-fast":
        given["steps"] = [6, 4, 5, 3, 5, 4]
    for batch, execution, again in ((3, ExecutionOptions(), 3), (3, EXACT, 3), (4, EXACT, 1), (2, EXACT, 6)):
        images, report = sample(served(), 6, policy=policy, batch=batch, execution=execution, **given)
        for needs_scores in (False, True):
            replay = Replay.from_report(report, needs_scores)
            repeated, exits = sample(served(), 6, policy=replay, batch=again, execution=execution, **given)
            assert torch.equal(repeated, images)
            assert torch.equal(exits.exit_layer, report.exit_layer)
            assert exits.macs_full == report.macs_full
            if batch == again:
                assert exits.rows_moved == report.rows_moved
    if policy != "full":
        assert len(report.exit_layer.unique()) > 2


def test_exits_can_be_changed_before_they_are_run() -> None:
    """As long as the lanes of the run are those of the report; 0 where there was no lane."""
    _, report = sample(served(), 6, policy="exit:0.5", **RUN)
    changed = torch.where(report.exit_layer > 0, torch.randint(1, 6, report.exit_layer.shape), 0).to(torch.uint8)
    _, found = sample(served(), 6, policy=Replay(changed, needs_scores=False), batch=2, **RUN)
    assert torch.equal(found.exit_layer, changed)
    partly = changed.clone()
    partly[1] = 0  # not known: the full network
    _, found = sample(served(), 6, policy=Replay(partly, needs_scores=False), batch=2, **RUN)
    assert torch.equal(found.exit_layer[1], torch.where(changed[1] > 0, L, 0))
    assert torch.equal(found.exit_layer[2:], changed[2:])


def repeatable(n: int, seed: int) -> list[dict]:
    """Of n `requests`, those of samples that exit; reuse is not repeated by exits alone."""
    return [request for request in requests(n, seed=seed) if not request["policy"].startswith(("cache", "reuse"))]


def test_a_request_is_repeated_by_its_report() -> None:
    wanted = [request for request in repeatable(30, seed=2) if "init_image" not in request][:6]
    engine = stepped(20)
    handles = [engine.submit(**request) for request in wanted]
    engine.close()
    again = stepped(20)
    repeated = [
        again.submit(**{**request, "policy": Replay.from_report(handle.report)})
        for request, handle in zip(wanted, handles, strict=True)
    ]
    again.close()
    for handle, repeat in zip(handles, repeated, strict=True):
        assert torch.equal(repeat.result(0), handle.result(0))
        assert torch.equal(repeat.report.exit_layer, handle.report.exit_layer)


def test_runs_that_exits_alone_do_not_repeat_are_refused() -> None:
    _, report = sample(served(), 2, policy="reuse:every=2", steps=3, class_labels=[0, 1])
    with pytest.raises(ValueError, match="reused earlier steps"):
        Replay.from_report(report)


@pytest.mark.parametrize("change", [{"n": 7}, {"steps": [4, 2, 6, 3, 5, 1]}], ids=str)
def test_a_larger_run_than_the_one_recorded_is_refused(change: dict) -> None:
    _, report = sample(served(), 6, policy="exit:0.5", **RUN)
    own = {
        key: (value[:6] + value[-1:] if "n" in change and isinstance(value, list) else value)
        for key, value in RUN.items()
    }
    with pytest.raises(ValueError, match="the recorded run has 5 steps of 6 samples, this one has more"):
        sample(
            served(),
            change.get("n", 6),
            policy=Replay.from_report(report),
            **{**own, **{k: v for k, v in change.items() if k != "n"}},
        )


def test_a_recorded_run_takes_no_thresholds() -> None:
    _, report = sample(served(), 6, policy="exit:0.5", **RUN)
    with pytest.raises(ValueError, match="leave thresholds out"):
        sample(served(), 6, policy=Replay.from_report(report), thresholds=3.0, **RUN)


def by_hand(seed: int, steps: int, label: int, scale: float, exit_layer: Tensor) -> Tensor:
    """DDIM, exiting where `exit_layer`, [steps, 2], says. Every layer's uncertainty: float64 [steps, 2, L], NaN where
    the lane did not run."""
    times, alpha_bar = schedule("linear", steps)
    x = initial_noise(torch.tensor([seed]), SHAPE)[0].double()
    found = torch.full((steps, 2, L), torch.nan, dtype=torch.float64)
    for k in range(steps):
        predictions = []
        for half, context in enumerate((label, 3)):
            if exit_layer[k, half] == 0:
                continue
            given = Inputs(x[None].float(), torch.tensor([times[k]]).float(), torch.tensor([context]))
            rows = plain_layers(served().backbone, given)
            ran = slice(0, int(exit_layer[k, half]))
            found[k, half, ran] = plain_uncertainties(served().backbone, served().exits, given, rows)[ran, 0].double()
            plain = plain_predictions(served().backbone, served().exits, given, rows)
            predictions.append(plain[int(exit_layer[k, half]) - 1, 0].double())
        eps = predictions[0]
        if len(predictions) == 2:
            eps = predictions[1] + scale * (predictions[0] - predictions[1])
        x0 = (x - math.sqrt(1 - alpha_bar[k]) * eps) / math.sqrt(alpha_bar[k])
        x = math.sqrt(alpha_bar[k + 1]) * x0 + math.sqrt(1 - alpha_bar[k + 1]) * eps
    found[:, :, L - 1] = torch.nan  # nobody is asked after the last
    return found


@pytest.mark.parametrize("execution", [ExecutionOptions(), EXACT, ExecutionOptions(count_sync="lagged")], ids=str)
@pytest.mark.parametrize(("policy", "first"), [("exit:0.5", 1), ("exit:0.45,min_layer=2", 2), ("exit:patience=0.5", 1)])
def test_scores_by_hand(policy: str, first: int, execution: ExecutionOptions) -> None:
    """Of every lane, at every layer that it ran and was asked after, whatever batch it was in."""
    images, report = sample(served(), 6, policy=policy, batch=4, record_scores=True, execution=execution, **RUN)
    assert (report.scores.shape, report.scores.dtype) == ((5, 6, 2, L), torch.float32)
    for i, (seed, steps, label, scale) in enumerate(
        zip(*(RUN[key] for key in ("seed", "steps", "class_labels", "guidance_scale")), strict=True)
    ):
        wanted = by_hand(seed, steps, label, scale, report.exit_layer[:steps, i])
        wanted[:, :, : first - 1] = torch.nan
        own = report.scores[:steps, i].double()
        torch.testing.assert_close(own, wanted, rtol=0, atol=2e-4, equal_nan=True)
        assert report.scores[steps:, i].isnan().all()
        if policy.startswith("exit:0"):  # they are what was decided by
            layer = report.exit_layer[:steps, i].long()
            last = own.gather(2, (layer - 1).clamp(min=0)[..., None])[..., 0]
            threshold = 0.5 if first == 1 else 0.45
            early = (layer > 0) & (layer < L)
            assert bool((last[early] < threshold).all())
            assert bool(((own < threshold).sum(2)[early] == 1).all())
    without, plain = sample(served(), 6, policy=policy, batch=4, execution=execution, **RUN)
    assert plain.scores is None
    assert torch.equal(without, images)
    assert (plain.macs, plain.rows_moved) == (report.macs, report.rows_moved)


@pytest.mark.parametrize("policy", ["full", "exit:depth=3"])
def test_scores_that_nobody_needs_are_not_computed_for_the_record(policy: str) -> None:
    _, report = sample(served(), 6, policy=policy, record_scores=True, **RUN)
    _, plain = sample(served(), 6, policy=policy, **RUN)
    assert report.scores.isnan().all()
    assert report.macs == plain.macs


def test_a_report_under_way_has_what_is_known() -> None:
    run = SamplerRun(served(), 6, policy="exit:0.5", batch=2, record_scores=True, **RUN)
    assert run.report.scores.isnan().all()
    for index, _ in run:
        report = run.report
        for i in index.tolist():  # all is known of who is done
            assert torch.equal(report.scores[:, i].isfinite().any(2), report.exit_layer[:, i] > 0)
    _, whole = sample(served(), 6, policy="exit:0.5", batch=2, record_scores=True, **RUN)
    assert same(report.scores, whole.scores)


@pytest.mark.parametrize("memory", [100, 3])
def test_scores_of_requests_are_of_those_that_asked(memory: int) -> None:
    """Beside others that did not ask, and also where memory for all at once is lacking: the same bits as alone, and
    what was computed besides for others' sake, which is what a replay with scores finds."""
    wanted = [request for request in repeatable(60, seed=6) if "init_image" not in request][:10]

    def limited(*given: object, **options: object) -> ForwardOutput:
        if len(given[1]) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_forward(*given, **options)

    engine = stepped(20, forward=limited)
    handles = [engine.submit(**request, record_scores=i % 2 == 0) for i, request in enumerate(wanted)]
    engine.step()
    assert (engine.report.batch.halvings > 0) == (memory == 3)
    engine.close()
    for i, (handle, request) in enumerate(zip(handles, wanted, strict=True)):
        found = handle.report.scores
        if i % 2:
            assert found is None
            continue
        _, report = sample(served(), 1, record_scores=True, execution=EXACT, **request)
        assert (found.shape, found.dtype) == ((request["steps"], 1, 2, L), torch.float32)
        replay = {**request, "policy": Replay.from_report(report, needs_scores=True)}
        _, everything = sample(served(), 1, record_scores=True, execution=EXACT, **replay)
        assert same(found, torch.where(found.isnan(), torch.nan, everything.scores))
        assert same(report.scores, torch.where(report.scores.isnan(), torch.nan, found))
    assert any(handle.report.scores.isfinite().any() for handle in handles[::2])


def test_scores_of_a_threaded_engine() -> None:
    with Engine(served(), 4, execution=EXACT) as engine:
        handle = engine.submit(seed=3, steps=4, policy="exit:0.5", record_scores=True)
        handle.result(60)
    _, report = sample(served(), 1, seed=3, steps=4, policy="exit:0.5", record_scores=True, execution=EXACT)
    assert same(handle.report.scores, report.scores)
    assert report.scores.isfinite().any()


def test_scores_do_not_depend_on_mates() -> None:
    """What is computed for a mate is not told: a sample has the scores that its own policy asks for, alone or not."""
    engine = stepped(4)
    others = [{"seed": 9, "steps": 3, "policy": "exit:0.45,min_layer=2"}, {"seed": 8, "steps": 3, "policy": "exit:0.5"}]
    for request in ({"seed": 3, "steps": 3, "policy": policy} for policy in ("full", "exit:0.45,min_layer=3")):
        handles = [engine.submit(**own, record_scores=True) for own in (request, *others)]
        while engine.step():
            pass
        for own, handle in zip((request, *others), handles, strict=True):
            _, alone = sample(served(), 1, execution=EXACT, **own, record_scores=True)
            assert same(handle.report.scores, alone.scores)
