"""Batches and engines whose forward passes are captured: right, warmed on request, and never waiting for the device."""

import copy
import dataclasses
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adadiff.engine.engine import Engine
from adadiff.forward import spaces
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.warming import warm
from adadiff.models.uvit import UViT
from adadiff.policies.exits import Replay
from adadiff.sampling.batch import Batch
from adadiff.sampling.sampler import sample
from adadiff.uem import PAPER, Exits
from pretend import DEVICE, OnDevice, PretendDevice, moved
from recorder import recorded
from sampler.slim import WIDTHS, slim_served
from sampler.tiny import UVIT, requests, scramble, served


@pytest.mark.parametrize("count_sync", [None, "lagged"])
def test_samples_are_drawn_by_captured_pieces(count_sync, monkeypatch) -> None:
    """Every kind of request: guided, tied, with initial images, all solvers; ever other numbers of lanes share the
    pieces of one space, and that of guided lanes."""
    wanted = requests(20, seed=3, most=2)
    for number, request in enumerate(wanted):
        request["policy"] = "exit:depth=2.5" if number % 3 else "full"  # decides nothing by rounding
    with Engine(served(), 4, threaded=False) as engine:
        on_cpu = [engine.submit(**request) for request in wanted]
    execution = ExecutionOptions(runner="captured", count_sync=count_sync)
    model = moved(served())
    with recorded(monkeypatch) as graphs, PretendDevice():
        with Engine(model, 4, threaded=False, execution=execution) as engine:
            handles = [engine.submit(**request) for request in wanted]
        assert len(spaces._spaces.of[model.backbone]) == 1
    assert graphs.replays > graphs.captures > 0
    for handle, usual in zip(handles, on_cpu, strict=True):
        assert torch.equal(handle.report.exit_layer, usual.report.exit_layer)
        image = usual.result(0)
        torch.testing.assert_close(handle.result(0), image, rtol=1e-3, atol=1e-3 * float(image.abs().max()))


def test_a_batch_that_runs_out_of_memory_goes_on_with_smaller_memory(monkeypatch) -> None:
    """Memory for 4 lanes cannot be had; for 2 it can."""
    model = moved(served())
    given = {"steps": 3, "class_labels": [0, 1, 2, 0], "policy": "exit:depth=2.5"}
    images, report = sample(served(), 4, batch=4, **given)
    made, usual = [], spaces.Memory

    def memory(lanes: int, *rest: object) -> object:
        made.append(lanes)
        if lanes > 2:
            raise torch.OutOfMemoryError("no memory")
        return usual(lanes, *rest)

    with recorded(monkeypatch), monkeypatch.context() as patched, PretendDevice():
        patched.setattr(spaces, "Memory", memory)
        found, same = sample(model, 4, batch=4, execution=ExecutionOptions(runner="captured"), **given)
    assert made == [4, 2]
    assert torch.equal(same.exit_layer, report.exit_layer)
    torch.testing.assert_close(found, images, rtol=1e-3, atol=1e-3 * float(images.abs().max()))


@pytest.mark.parametrize("context", [True, False], ids=["labels", "none"])
def test_a_warm_space_captures_nothing_more(context: bool, monkeypatch) -> None:
    """Whatever the passes are asked, and however many lanes exit."""
    config = dataclasses.replace(UVIT, depth=2, num_classes=5 if context else 0)
    backbone = UViT(config).requires_grad_(False).eval()
    exits = Exits(backbone, PAPER).requires_grad_(False)
    scramble(backbone, 0.15, seed=1)
    scramble(exits, 0.15, seed=2)
    model = SimpleNamespace(backbone=moved(backbone), exits=moved(exits))
    execution = ExecutionOptions(runner="captured", max_lanes=5, count_sync="sync")
    with recorded(monkeypatch) as graphs, PretendDevice():
        warm(model, execution, torch.zeros(1, dtype=torch.int64, device=DEVICE) if context else None, DEVICE)
        captures = graphs.captures
        for n in (5, 3, 1):
            x, t = OnDevice(torch.randn(n, 3, 8, 8)), torch.linspace(1, 999, n)
            labels = torch.arange(n) if context else None
            for policy in ("full", "exit:0.5", "exit:0.55,min_layer=2", "exit:depth=2", Replay()):
                depth = torch.arange(n) % 3 + 1.0 if isinstance(policy, Replay) else None
                forward(model, x, t, labels, policy=policy, threshold=depth, execution=execution)
    assert graphs.captures == captures > 5 * 3 * 3


def test_a_warm_engine_captures_nothing_more_at_any_width(monkeypatch) -> None:
    own = {"threaded": False, "warm": True, "execution": ExecutionOptions(runner="captured", count_sync="sync")}
    with recorded(monkeypatch) as graphs, PretendDevice(), Engine(moved(slim_served()), 2, **own) as engine:
        engine.step()
        captures = graphs.captures
        assert captures
        for seed, width in enumerate(WIDTHS):
            for policy in (f"width:{width}", f"width:{width}+exit:0.5"):
                engine.submit(seed=seed, steps=2, class_labels=1, policy=policy)
        while engine.step():
            pass
        assert graphs.captures == captures


class Transfers(TorchDispatchMode):
    """Counts copies from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        self.count += isinstance(made, OnDevice) and isinstance(source, Tensor) and not isinstance(source, OnDevice)
        return made


@pytest.mark.parametrize("guided", [False, True])
def test_a_saturated_engine_never_waits_and_uploads_little(guided: bool, monkeypatch) -> None:
    """Requests that come and go in every tick, and images that leave; nothing of it makes the host wait for the
    device. A tick brings the device what it needs in two transfers: what the batch knows, and what the pass decides
    by."""
    execution, seeds = ExecutionOptions(runner="captured", count_sync="lagged"), itertools.count()
    label = {"class_labels": 1, "guidance_scale": 2.0} if guided else {"class_labels": 1}
    own = {"threaded": False, "execution": execution}
    with recorded(monkeypatch), PretendDevice(strict=True), Engine(moved(served()), 4, **own) as engine:
        handles = []

        def ticks(n: int) -> None:
            for _ in range(n):
                while engine.report.waiting < 4:
                    steps, seed = 3 + len(handles) % 4, next(seeds)
                    policy = ("exit:depth=2.5", "exit:0.5")[seed % 2]
                    asked = {"seed": seed, "steps": steps, "policy": policy, **label}
                    handles.append((engine.submit(**asked), asked))
                engine.step()

        ticks(12)
        before = engine.report.batch.ticks
        with Transfers() as transfers:
            monkeypatch.setattr(engine, "_admit", lambda: None)  # its own uploads are those of new samples
            engine.step()
        monkeypatch.undo()
        assert engine.report.batch.ticks == before + 1
        assert len(engine._running)
        assert transfers.count == 2
        ticks(12)
    assert len(handles) > 8
    for handle, asked in handles[::5]:
        image, _ = sample(served(), 1, **asked)
        torch.testing.assert_close(handle.result(0), image[0], rtol=1e-3, atol=1e-3 * float(image.abs().max()))


@pytest.mark.parametrize("threaded", [False, True])
def test_an_engine_can_be_warmed(threaded: bool, monkeypatch) -> None:
    model = copy.deepcopy(served())
    made: list[bool] = []
    monkeypatch.setattr(Batch, "warm", lambda self: made.append(threading.current_thread() is threading.main_thread()))
    with Engine(model, 2, threaded=threaded, warm=True) as engine:
        assert threaded or not engine.ready
        handle = engine.submit(seed=0, steps=2, class_labels=0)
        if not threaded:
            engine.step()
        assert handle.result(5).isfinite().all() if threaded else engine.ready
        assert engine.ready
    assert not engine.ready
    assert made == [not threaded]
    with Engine(model, 2, threaded=False) as engine:
        assert engine.ready
