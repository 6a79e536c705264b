"""Reuse of the rest of the network on a device that is not waited for: a pretended one, which knows what would wait."""

import copy
import logging

import pytest
import torch

import adadiff
from adadiff.engine.engine import Engine
from adadiff.forward import reuse_lanes
from adadiff.forward.options import ExecutionOptions
from late import use_sets
from pretend import PretendDevice, moved
from recorder import PolledSet
from sampler.cached_rest import models
from sampler.tiny import served

LAGGED = ExecutionOptions(count_sync="lagged")
STEPS, SCALES = 7, [1.0, 2.5, 1.0, 2.5]
POLICIES = [
    *("cache:threshold=0.8", "cache:threshold=0.6,gate=input+exit:0.46", "reuse:every=3,dense_early=2,dense_late=1"),
    *("cache:threshold=0.8,first=2+exit:0.42", "cache:batch=0.8", "reuse:every=3,order=1+exit:0.46"),
]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    use_sets(monkeypatch, PolledSet)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("kind", ["uvit", "dit"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_device_decides_what_the_host_decides(kind: str, policy: str) -> None:
    """Nothing of a pass, nor of what is kept of it, makes the host wait; heads of the DiT are told apart there."""
    given = {"steps": STEPS, "class_labels": [0, 1, 2, 1], "guidance_scale": SCALES, "policy": policy}
    images, report = adadiff.sample(models()[kind], 4, **given)
    own = {name: value for name, value in given.items() if name != "class_labels" and name != "guidance_scale"}
    with PretendDevice(strict=True):
        engine = Engine(moved(models()[kind]), 8, execution=LAGGED, threaded=False)
        handles = [
            engine.submit(seed=i, class_labels=[0, 1, 2, 1][i], guidance_scale=SCALES[i], **own) for i in range(4)
        ]
        while engine.step():
            pass
    same = [handle.report for handle in handles]
    assert torch.equal(torch.cat([one.exit_layer for one in same], 1), report.exit_layer)
    assert torch.equal(torch.cat([one.reused for one in same], 1), report.reused)
    assert report.reused.any()
    assert (engine.report.batch.macs, engine.report.batch.macs_full) == (report.macs, report.macs_full)
    found = torch.stack([handle.result(0) for handle in handles])
    torch.testing.assert_close(found, images, rtol=1e-3, atol=1e-3 * float(images.abs().max()))


@pytest.mark.usefixtures("pretended")
def test_lane_by_lane_on_a_device() -> None:
    given = {"steps": STEPS, "class_labels": 1, "guidance_scale": SCALES, "policy": POLICIES[1]}
    execution = ExecutionOptions(batch_invariant=True)
    images, report = adadiff.sample(models()["dit"], 4, execution=execution, **given)
    with PretendDevice(strict=False):
        found, same = adadiff.sample(moved(models()["dit"]), 4, execution=execution, **given)
    assert torch.equal(same.reused, report.reused)
    torch.testing.assert_close(found, images, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("policies", [POLICIES, ["reuse:every=2", "full", "exit:depth=2", "cache:threshold=0.35"]])
def test_an_engine_whose_requests_come_and_go(policies: list[str]) -> None:
    wanted = [
        {"seed": i, "steps": 3 + i % 4, "class_labels": i % 3, "policy": policies[i % len(policies)],
         "guidance_scale": SCALES[i % 4]}
        for i in range(8) if "batch" not in policies[i % len(policies)]
    ]  # fmt: skip
    with PretendDevice(strict=True), Engine(moved(served()), 5, execution=LAGGED, threaded=False) as engine:
        handles = []
        for i, request in enumerate(wanted):
            handles.append(engine.submit(**request))
            if i % 2:
                engine.step()
        while engine.step():
            pass
    for handle, request in zip(handles, wanted, strict=True):
        _, report = adadiff.sample(served(), 1, **request)
        assert torch.equal(handle.report.exit_layer, report.exit_layer)
        assert handle.report.reuses == report.reuses


@pytest.mark.usefixtures("pretended")
def test_captured_passes_that_reuse_are_run_eagerly_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    reuse_lanes.log_not_captured.cache_clear()
    given = {"steps": 5, "class_labels": 1, "policy": "reuse:every=2"}
    captured = ExecutionOptions(runner="captured", count_sync="lagged")
    images, report = adadiff.sample(served(), 3, **given)
    with caplog.at_level(logging.WARNING, "adadiff"), PretendDevice():
        found, same = adadiff.sample(moved(served()), 3, execution=captured, **given)
    assert torch.equal(same.reused, report.reused)
    torch.testing.assert_close(found, images, rtol=1e-3, atol=1e-3 * float(images.abs().max()))
    assert [record.getMessage() for record in caplog.records if "captured" in record.getMessage()] == [
        "runner='captured': forward passes in which a sample reuses earlier steps are run eagerly"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["eager", "captured"])
@pytest.mark.parametrize("kind", ["uvit", "dit"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_decides_what_the_host_decides(kind: str, policy: str, runner: str) -> None:
    given = {"steps": STEPS, "class_labels": [0, 1, 2, 1], "guidance_scale": SCALES, "policy": policy}
    images, report = adadiff.sample(models()[kind], 4, **given)
    model = copy.deepcopy(models()[kind]).cuda()
    found, same = adadiff.sample(model, 4, execution=ExecutionOptions(runner=runner), **given)
    assert torch.equal(same.exit_layer, report.exit_layer)
    assert torch.equal(same.reused, report.reused)
    assert same.macs == report.macs
    torch.testing.assert_close(found, images, rtol=1e-2, atol=1e-2 * float(images.abs().max()))
