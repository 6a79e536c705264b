"""Captured pieces do what eager calls do: on the pretended device, with recorded graphs (recorder.py), which know
addresses only and spoil what they allocate."""

import copy
import dataclasses
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adadiff.forward import runner, spaces
from adadiff.forward.count_sync import Lagged, Measured, bucket
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.forward.pieces import Pieces
from adadiff.forward.warming import warm
from adadiff.models.uvit import UViT
from adadiff.policies.exits import BatchMean, Depth, Full, Patience, Replay, Threshold
from adadiff.policies.interface import ExitPolicy
from adadiff.sampling.batch import Batch
from adadiff.sampling.sampler import sample
from adadiff.serving.engine import Engine
from adadiff.uem import OFFICIAL, PAPER, ExitConfig, Exits
from pretend import DEVICE, OnDevice, PretendDevice
from recorder import RecordedGraphs, recorded
from sampler.tiny import BATCH, UVIT, Case, case, requests, scramble, served

LANES = torch.arange(BATCH)
NETWORKS = [
    pytest.param("uvit", PAPER, id="uvit-paper"),
    pytest.param("dit", PAPER, id="dit-paper"),
    pytest.param("uvit", OFFICIAL, id="uvit-official", marks=pytest.mark.slow),
    pytest.param("uvit", ExitConfig(head="block"), id="uvit-block", marks=pytest.mark.slow),
]


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Blocks as they are called on a device, with one pass after each branch, and as where there is no kernel."""
    monkeypatch.setattr(runner, "is_fused", lambda *_: request.param)
    return request.param


def on_device(what: nn.Module) -> nn.Module:
    made = copy.deepcopy(what)
    for part in made.modules():
        part._parameters.update({name: OnDevice(v.detach()) for name, v in part._parameters.items() if v is not None})
    return made


def elsewhere(c: Case) -> SimpleNamespace:
    return SimpleNamespace(backbone=on_device(c.backbone), exits=on_device(c.exits))


@dataclass(frozen=True)
class Captured:
    """A network whose forward passes are captured, all sharing memory for so many lanes."""

    model: SimpleNamespace
    c: Case
    max_lanes: int | None = None
    count_sync: object = None
    strict: bool = True

    def __call__(self, lanes: Tensor, **own: object) -> ForwardOutput:
        execution = ExecutionOptions(runner="captured", max_lanes=self.max_lanes, count_sync=self.count_sync)
        (x, t, context) = self.c.given[lanes].all
        with PretendDevice(self.strict):
            return forward(self.model, OnDevice(x), t, context, **own, execution=execution)

    def agrees(self, lanes: Tensor, **own: object) -> ForwardOutput:
        """With the same pass on the CPU."""
        found, wanted = self(lanes, **own), forward(self.c, *self.c.given[lanes].all, **own)
        assert torch.equal(found.exit_layer.held, wanted.exit_layer)
        tolerance = {"rtol": 1e-5, "atol": 2e-5}
        torch.testing.assert_close(found.prediction.held, wanted.prediction, **tolerance)
        if wanted.scores is not None:
            torch.testing.assert_close(found.scores.held, wanted.scores, **tolerance, equal_nan=True)
        if wanted.variance is not None:
            torch.testing.assert_close(found.variance.held, wanted.variance, **tolerance)
        return found


def depths(n: int, layers: int) -> dict[str, Tensor]:
    lane = torch.arange(n)
    return {
        "nobody": torch.full((n,), float(layers)),
        "all at once": torch.full((n,), 2.0),
        "alternating": torch.where(lane % 2 == 0, 1.0, float(layers)),
        "one": torch.where(lane == n // 2, 3.0, float(layers)),
        "spread": lane * 5 % layers + 1.0,
    }


@pytest.mark.parametrize("count_sync", [None, pytest.param("lagged", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_pieces_equal_eager_for_every_pattern(kind, config, count_sync, fused, monkeypatch) -> None:
    """One space of 16 lanes serves 13, 5 and 1 of them; every piece is run, captured and replayed."""
    c = case(kind, config, torch.float32)
    with recorded(monkeypatch) as graphs:
        call = Captured(elsewhere(c), c, max_lanes=16, count_sync=count_sync)
        for lanes in (LANES, LANES[[4, 1, 9, 0, 3]], LANES[[7]], LANES):
            for depth in list(depths(len(lanes), c.num_layers).values())[:: 1 if lanes is LANES else 3]:
                for record_scores in (False, True, True):
                    call.agrees(lanes, policy=Replay(), threshold=depth, record_scores=record_scores)
    assert graphs.captures > c.num_layers
    assert graphs.replays > graphs.captures


def thresholds(c: Case) -> Tensor:
    """Each in the middle of the widest gap of its lane's uncertainties, so that no decision hangs on rounding."""
    u = c.uncertainties[:-1].sort(0).values
    gap, at = u.diff(dim=0)[:3].max(0)
    return (u[at, LANES] + gap / 2).float()


class Asked(ExitPolicy):
    """Without limits: asked in Python, between two pieces. By the threshold, but never after layer 2."""

    needs_scores, threshold = True, 0.5

    def exit_mask(self, u: Tensor | None, layer: int, context: object) -> Tensor:
        return (u < context.threshold) & (layer != 2)


class AskedLate(Asked):
    """Its first layers are those of a policy with limits that asks late, but for what comes between two pieces."""

    def exit_layers(self, num_layers: int) -> range:
        return range(3, num_layers)


def policies(c: Case) -> dict[str, dict]:
    threshold, partner = thresholds(c), LANES.clone()
    partner[[2, 7]] = torch.tensor([7, 2])
    tied = threshold.clone()
    tied[7] = tied[2]
    mixed = [Threshold(0.5), Patience(0.5), Depth(3.5)]
    return {
        "threshold": {"policy": Threshold(0.5), "threshold": threshold},
        "tied": {"policy": Threshold(0.5), "threshold": tied, "cfg_partner": partner},
        "patience": {"policy": Patience(0.5), "threshold": threshold},
        "mixed": {
            "policy": mixed,
            "policy_index": LANES % 3,
            "threshold": threshold.where(LANES % 3 < 2, torch.tensor(2.5)),
        },
        "asked": {"policy": Asked(), "threshold": threshold},
        "asked, tied": {"policy": Asked(), "threshold": tied, "cfg_partner": partner},
        "asked late": {"policy": AskedLate(), "threshold": threshold},
        "late": {"policy": Threshold(0.5, min_layer=3), "threshold": threshold},
        "full": {"policy": Full()},
    }


@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_pieces_equal_eager_for_every_policy(kind, config, fused, monkeypatch) -> None:
    """One after the other on the same pieces, which know of none of them."""
    c = case(kind, config, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c)
        for _ in range(2):
            for own in policies(c).values():
                call.agrees(LANES, **own, record_scores=True)


def test_policies_with_limits_share_no_pieces_with_those_that_are_asked(monkeypatch) -> None:
    """The one leaves to its piece what the other does between two pieces, such as noting where long skips lie."""
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c)
        stays = thresholds(c).where(LANES % 3 > 0, torch.tensor(1e-6))  # to the blocks that join skips
        for name in ("asked late", "asked late", "threshold", "late", "threshold", "asked late"):
            call.agrees(LANES, **policies(c)[name] | {"threshold": stays})


def test_passes_in_any_mode_share_a_space(monkeypatch) -> None:
    """Tensors of inference mode cannot be written outside of it."""
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch) as graphs:
        call = Captured(elsewhere(c), c)
        for inference in (True, False, True, False):
            with torch.inference_mode(inference):
                call.agrees(LANES, policy="exit:depth=5", record_scores=True)
    assert graphs.replays > graphs.captures > 0


def test_a_policy_that_looks_at_the_whole_batch(monkeypatch) -> None:
    c = case("uvit", OFFICIAL, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c, max_lanes=20, strict=False)  # it may look
        for threshold in (0.45, 0.5, 0.5, 0.55, 0.5):
            call.agrees(LANES, policy=BatchMean(threshold, patience=False), record_scores=True)


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_any_sequence_of_passes_on_one_space(data: st.DataObject) -> None:
    """Of any numbers of lanes, with any policies, and counts that the host sees late."""
    c = case("uvit", PAPER, torch.float32)
    delays = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    count_sync = data.draw(st.sampled_from([None, "sync", "sync:2", "lagged", "lagged:2"]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "is_fused", lambda *_: True)
        with recorded(patched, delay=itertools.cycle(delays).__next__):
            call = Captured(elsewhere(c), c, max_lanes=data.draw(st.integers(BATCH, 40)), count_sync=count_sync)
            for _ in range(data.draw(st.integers(2, 6))):
                n = data.draw(st.integers(1, BATCH))
                lanes = LANES[torch.randperm(BATCH, generator=torch.Generator().manual_seed(n))[:n]]
                depth = torch.tensor(data.draw(st.lists(st.integers(1, c.num_layers), min_size=n, max_size=n))).float()
                given = data.draw(
                    st.sampled_from(
                        [
                            {"policy": Replay(), "threshold": depth},
                            {"policy": Threshold(0.5), "threshold": thresholds(c)[lanes]},
                            {"policy": Asked(), "threshold": thresholds(c)[lanes]},
                            {"policy": Full()},
                        ]
                    )
                )
                call.agrees(lanes, **given, record_scores=data.draw(st.booleans()))


def test_nan_in_a_sample_reaches_nobody(fused, monkeypatch) -> None:
    c = case("dit_nan", PAPER, torch.float32)
    x, t, context = c.given.all
    x = x.clone()
    x[4] = math.nan
    hurt = Case(c.backbone, c.exits, type(c.given)(x, t, context), c.predictions, c.uncertainties)
    depth, others = depths(BATCH, c.num_layers)["spread"], LANES != 4
    with recorded(monkeypatch):
        clean, call = Captured(elsewhere(c), c, max_lanes=16), Captured(elsewhere(c), hurt, max_lanes=16)
        for _ in range(3):
            want = clean(LANES, policy=Replay(), threshold=depth).prediction.held
            found = call(LANES, policy=Replay(), threshold=depth).prediction.held
            assert found[4].isnan().all()
            torch.testing.assert_close(found[others], want[others], rtol=1e-5, atol=2e-5)


# ---- what lives longer than a pass ----


def test_values_are_read_anew_and_new_weights_are_noticed(monkeypatch) -> None:
    """Values may change where they lie; other tensors, or other modules, in the places of weights need new pieces."""
    c = copy.deepcopy(case("uvit", PAPER, torch.float32))
    with recorded(monkeypatch) as graphs:
        call = Captured(elsewhere(c), c)
        backbone = call.model.backbone

        def passes(captures: bool) -> None:
            before = graphs.captures
            for _ in range(3):
                call.agrees(LANES, policy="exit:depth=5", record_scores=True)
            assert (graphs.captures > before) == captures

        passes(True)
        for own in (c.backbone, backbone):
            value = own.mid_block.mlp.fc2.bias
            (value.held if isinstance(value, OnDevice) else value.data).add_(0.5)
        passes(False)
        c.backbone.mid_block.mlp.fc2.bias.data = c.backbone.mid_block.mlp.fc2.bias + 0.5
        backbone.mid_block.mlp.fc2._parameters["bias"] = OnDevice(c.backbone.mid_block.mlp.fc2.bias.detach().clone())
        passes(True)
        c.backbone.in_blocks[1].attn = copy.deepcopy(c.backbone.in_blocks[0].attn)
        backbone.in_blocks[1].attn = on_device(c.backbone.in_blocks[0].attn)
        passes(True)
        c.exits.weight.data = c.exits.weight * 2
        call.model.exits._parameters["weight"] = OnDevice(c.exits.weight.detach().clone())
        passes(True)


def test_a_model_that_is_gone_keeps_no_memory(monkeypatch) -> None:
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c)
        call(LANES, policy=Full())
        assert len(spaces._spaces.of) == 1
        del call
        assert len(spaces._spaces.of) == 0


def test_memory_runs_out_in_the_middle(monkeypatch) -> None:
    """The error is raised, nothing of the pass is kept, and the next one is right."""
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch) as graphs:
        depth = depths(BATCH, c.num_layers)["spread"]
        given = {"policy": Replay(), "threshold": depth, "record_scores": True}
        for place in range(5):
            call, calls = Captured(elsewhere(c), c), itertools.count()
            graphs.fails = lambda calls=calls, place=place: (
                torch.OutOfMemoryError("no memory") if next(calls) == place else None
            )
            call(LANES, **given)
            with pytest.raises(torch.OutOfMemoryError):
                call(LANES, **given)
            graphs.fails = lambda: None
            for _ in range(3):
                call.agrees(LANES, **given)


def test_what_cannot_be_captured_runs_without_a_graph(monkeypatch, caplog) -> None:
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch) as graphs, caplog.at_level(logging.WARNING, "adadiff"):
        graphs.fails = lambda: RuntimeError("operation not permitted when stream is capturing")
        call = Captured(elsewhere(c), c)
        for _ in range(4):
            call.agrees(LANES, policy="exit:depth=5")
    pieces = 1 + 5 + 1 + 1 - 1  # stem, layers, head; who exits at the last layer that is run leaves nobody to finish
    assert len(caplog.records) == pieces
    assert "layer 1" in caplog.text or "'layer', 1" in caplog.text
    assert graphs.captures == 0


def test_threads_share_no_memory(monkeypatch) -> None:
    """Each captures for itself, and all are right, though they take turns at any time."""
    c, found = case("uvit", PAPER, torch.float32), []
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c, max_lanes=16)

        def some(shift: int) -> None:
            try:
                for depth in list(depths(BATCH, c.num_layers).values()) * 2:
                    call.agrees(LANES, policy=Replay(), threshold=depth.roll(shift), record_scores=True)
            except BaseException as error:
                found.append(error)

        workers = [threading.Thread(target=some, args=(shift,)) for shift in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not found


# ---- pieces alone ----


class Counted:
    """Graphs that count."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def aside(self, work: Callable[[], None]) -> None:
        self.did.append("aside")
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.did.append("capture")
        return lambda: self.did.append("replay")


def test_a_piece_is_run_then_captured_then_replayed() -> None:
    graphs = Counted()
    pieces = Pieces(graphs)
    for _ in range(4):
        pieces.run("a", lambda: None)
    assert graphs.did == ["aside", "capture", "replay", "replay", "replay"]
    assert len(pieces) == 1


def test_the_piece_used_least_recently_is_dropped() -> None:
    graphs = Counted()
    pieces = Pieces(graphs, limit=2)
    for key in "aabbaacc":  # c takes the place of b
        pieces.run(key, lambda: None)
    assert len(pieces) == 2
    graphs.did.clear()
    pieces.run("a", lambda: None)
    assert graphs.did == ["replay"]
    pieces.run("b", lambda: None)
    assert graphs.did == ["replay", "aside"]


# ---- the recorder is able to fail ----


@pytest.fixture
def device() -> Iterator[None]:
    with PretendDevice(strict=True):
        yield


@pytest.mark.usefixtures("device")
def test_the_recorder_shows_what_a_graph_would_do_wrong() -> None:
    graphs, x, out = RecordedGraphs(), torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    scale = [2.0]
    replay = graphs.capture(lambda: out.copy_(x * scale[0]))
    assert out.held.tolist() == [0, 0, 0]  # a capture does nothing
    replay()
    assert out.held.tolist() == [2, 2, 2]
    x.add_(1)
    scale[0] = 5.0
    replay()
    assert out.held.tolist() == [4, 4, 4]  # of the new values, by the number of the capture

    kept: list[Tensor] = []
    graphs.capture(lambda: kept.append(x + 1))()
    assert kept[0].held.isnan().all()  # memory of the pool, which others use
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graphs.capture(lambda: x.copy_(torch.ones(3).pin_memory(), non_blocking=True))


@pytest.mark.usefixtures("device")
def test_a_capture_changes_nothing() -> None:
    x = torch.ones(3, device=DEVICE)

    def work() -> None:
        x.mul_(2)
        x[1:].add_(1)
        torch.mul(x, 2, out=x)

    replay = RecordedGraphs().capture(work)
    assert x.held.tolist() == [1, 1, 1]
    replay()
    assert x.held.tolist() == [4, 6, 6]


# ---- how the host learns of the count ----


class Counts:
    """A set whose count the host may wait for."""

    def __init__(self) -> None:
        self.waited: list[int] = []

    def wait(self, layer: int) -> int:
        self.waited.append(layer)
        return 9

    def seen(self) -> SimpleNamespace:
        return SimpleNamespace(count=9)


@pytest.mark.parametrize(("seconds", "waits"), [(400e-6, [1, 2, 3, 4, 5]), (200e-6, [1, 2, 3, 4])])
def test_long_blocks_are_waited_for_and_short_ones_are_one_late(seconds: float, waits: list[int]) -> None:
    """The first pass is slow, since kernels are compiled in it, and the host is late once."""
    now, active = [0.0], Counts()
    measured = Measured(clock=lambda: now[0])

    def a_pass(*speeds: float) -> list[int]:
        active.waited.clear()
        for layer, speed in enumerate(speeds, start=1):
            now[0] += seconds * speed
            assert measured.bound(active, list(range(1, layer + 1)), 9) == 9
        return active.waited

    assert a_pass(50, 50, 50, 50, 50, 50) == [1, 2, 3, 4, 5, 6]
    assert a_pass(50, 1, 1.9, 0.1, 1) == [1, 2, 3, 4, 5]
    assert measured.seconds(9) == pytest.approx(seconds)
    assert measured.seconds(8) is None
    assert a_pass(50, 1, 1, 1, 1) == waits
    assert Lagged(1).bound(active, [1], 9) == 9  # the first exit of a pass has none before it


def test_every_batch_of_a_space_launches_over_its_buckets(monkeypatch) -> None:
    c = case("uvit", PAPER, torch.float32)
    with recorded(monkeypatch):
        call = Captured(elsewhere(c), c, max_lanes=64, count_sync="sync")
        lanes = torch.cat([LANES, LANES[:8]])
        depth = depths(len(lanes), c.num_layers)["spread"]
        result = call.agrees(lanes, policy=Replay(), threshold=depth)
    runs = [int((depth >= layer).sum()) for layer in range(1, c.num_layers + 1)]
    assert list(result.rows) == [bucket(n, 64) for n in runs]
    assert any(n % 2 for n in runs if n > 16)  # some of which are no buckets themselves


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="max_lanes is for runner='captured'"):
        ExecutionOptions(max_lanes=4)
    with pytest.raises(ValueError, match="max_lanes must be a whole number"):
        ExecutionOptions(runner="captured", max_lanes=0)
    with pytest.raises(ValueError, match="lane by lane, which is not captured"):
        ExecutionOptions(runner="captured", batch_invariant=True)
    c = case("uvit", PAPER, torch.float32)
    with pytest.raises(ValueError, match="captures the work of a GPU"):
        forward(c, *c.given.all, execution=ExecutionOptions(runner="captured"))


def test_labels_of_the_host_are_checked(monkeypatch) -> None:
    """Pieces read them on the device, where nobody does."""
    c = case("uvit", PAPER, torch.float32)
    x, t, context = c.given.all
    wrong = Case(c.backbone, c.exits, type(c.given)(x, t, context + 99), c.predictions, c.uncertainties)
    with recorded(monkeypatch):
        model = elsewhere(c)
        for own in (c, wrong, c):
            call = Captured(model, own)
            if own is wrong:
                with pytest.raises(ValueError, match="labels must be in"):
                    call(LANES, policy="full")
            else:
                call.agrees(LANES, policy="full")


# ---- batches and engines ----


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
    model = on_device(served())
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
    model = on_device(served())
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
    model = SimpleNamespace(backbone=on_device(backbone), exits=on_device(exits))
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
    with recorded(monkeypatch), PretendDevice(strict=True), Engine(on_device(served()), 4, **own) as engine:
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
