"""On a device: nothing mixes it with the CPU, and what must not wait for it does not.

Three ways, of which two need no GPU: a pretended device with real values (pretend.py), PyTorch's own FakeTensor,
which has no values to read, and, where there is one, a GPU under `set_sync_debug_mode("error")`.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from adadiff.engine.engine import Engine
from adadiff.forward import placement
from adadiff.forward.count_sync import CountSync, Lagged, Sync
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import Depth, Full, Patience, Replay, Threshold
from adadiff.sampling.sampler import sample
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from adadiff_kernels import CountSnapshot, DeviceSet
from late import use_sets
from pretend import DEVICE, OnDevice, PretendDevice, TensorsMadeFromValues, Waits, elsewhere, moved
from recorder import PolledSet
from sampler.tiny import BATCH, case, requests, served, thresholds

LANES = torch.arange(BATCH)
NETWORKS = [
    pytest.param("uvit", PAPER, id="uvit-paper"),
    pytest.param("uvit", OFFICIAL, id="uvit-official"),
    pytest.param("dit", PAPER, id="dit-paper"),
    pytest.param("uvit", ExitConfig(head="block"), id="uvit-block"),
]
EXECUTIONS = [
    pytest.param(ExecutionOptions(), id="usual"),
    pytest.param(ExecutionOptions(count_sync="lagged"), id="lagged"),
    pytest.param(ExecutionOptions(batch_invariant=True), id="batch-invariant"),
]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    use_sets(monkeypatch, PolledSet)


def on_gpu(what: object) -> SimpleNamespace:
    return SimpleNamespace(backbone=copy.deepcopy(what.backbone).cuda(), exits=copy.deepcopy(what.exits).cuda())


def settings(kind: str, config: ExitConfig, policies: str) -> dict:
    """Policies with what goes with them, by lane, on the CPU."""
    threshold = thresholds(case(kind, config, torch.float32))
    if policies == "threshold":
        return {"policy": Threshold(0.5), "threshold": threshold}
    if policies == "patience, tied":
        partner = LANES.clone()
        partner[[2, 7]], threshold[7] = torch.tensor([7, 2]), threshold[2]
        return {"policy": Patience(0.5), "threshold": threshold, "cfg_partner": partner}
    if policies == "full":
        return {"policy": Full()}
    policy = [Threshold(0.5), Patience(0.5), Depth(3.5)]
    return {"policy": policy, "policy_index": LANES % 3, "threshold": threshold.where(LANES % 3 < 2, 2.5)}


POLICIES = ["threshold", "patience, tied", "mixed", "full"]


def run(
    kind: str,
    config: ExitConfig,
    policies: str,
    strict: bool,
    lanes: Tensor = LANES,
    move: Callable[[Tensor], Tensor] = lambda value: value,
    **options: object,
) -> tuple[ForwardOutput, ForwardOutput]:
    """On the pretended device, and on the CPU. move: what is by lane, there; options: `ExecutionOptions` there."""
    c = case(kind, config, torch.float32)
    (x, t, context), own = c.given[lanes].all, settings(kind, config, policies)
    own = {name: value[lanes] if isinstance(value, Tensor) else value for name, value in own.items()}
    own |= {"record_scores": True}
    on_cpu = forward(c, x, t, context, **own)
    there, t, context = elsewhere(c), move(t), move(context)
    own = {name: move(value) if isinstance(value, Tensor) else value for name, value in own.items()}
    with PretendDevice(strict):
        result = forward(there, OnDevice(x), t, context, **own, execution=ExecutionOptions(**options))
    assert {v.device for v in (result.prediction, result.exit_layer, result.scores)} == {DEVICE}
    with PretendDevice():
        macs, rows_moved = result.macs, result.rows_moved
    values = (result.prediction, result.exit_layer, result.scores, result.variance)
    prediction, exit_layer, scores, variance = (None if value is None else value.held for value in values)
    held = ForwardOutput(prediction, exit_layer, result.costs, result.rows, rows_moved, scores, variance)
    assert held.macs == macs
    return held, on_cpu


def assert_close(found: ForwardOutput, wanted: ForwardOutput) -> None:
    assert torch.equal(found.exit_layer, wanted.exit_layer)
    assert (found.macs, found.macs_full) == (wanted.macs, wanted.macs_full)
    tolerance = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(found.prediction, wanted.prediction, **tolerance)
    torch.testing.assert_close(found.scores, wanted.scores, **tolerance, equal_nan=True)
    torch.testing.assert_close(found.variance, wanted.variance, **tolerance)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_nothing_waits_for_the_device(kind, config, policies) -> None:
    assert_close(*run(kind, config, policies, strict=True, count_sync="lagged"))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_nothing_waits_for_what_lies_there_already(kind, config, policies) -> None:
    assert_close(*run(kind, config, policies, strict=True, move=OnDevice, count_sync="lagged"))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("count_sync", [None, "sync:2"])
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_a_host_that_waits(kind, config, count_sync) -> None:
    assert_close(*run(kind, config, "mixed", strict=False, count_sync=count_sync))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("policies", ["threshold", "mixed"])
def test_the_same_bits_in_any_company_on_a_device(policies) -> None:
    everybody, usual = run("uvit", PAPER, policies, strict=False, batch_invariant=True)
    assert_close(everybody, usual)
    lanes = torch.tensor([9, 2, 7, 0])
    some, _ = run("uvit", PAPER, policies, strict=False, batch_invariant=True, lanes=lanes)
    assert torch.equal(some.exit_layer, everybody.exit_layer[lanes])
    assert torch.equal(some.prediction, everybody.prediction[lanes])


@pytest.mark.usefixtures("pretended")
def test_blocks_are_named_for_profilers_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    class Range:
        def __init__(self, name: str):
            names.append(name)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda.nvtx, "range", Range)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    run("uvit", OFFICIAL, "full", strict=True, count_sync=Lagged())
    assert not names
    run("uvit", OFFICIAL, "full", strict=True, count_sync=Lagged(), nvtx=True)
    assert names == [f"block {layer}" for layer in range(1, 8)]


def test_a_forward_pass_in_a_graph_keeps_its_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph goes on writing to it; and what it cannot know, all rows run through every block."""
    c, threshold = case("uvit", PAPER, torch.float32), LANES % 7 + 1.0

    def run() -> ForwardOutput:
        execution = ExecutionOptions(count_sync="lagged")
        return forward(c, *c.given.all, policy=Replay(), threshold=threshold, execution=execution)

    monkeypatch.setattr(placement, "_idle", type(placement._idle)())  # no other test's
    usual = run()
    ((idle,),) = [sets for (B, *_), sets in placement._idle.__dict__.items() if B == BATCH]
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["adadiff_kernels.compaction.device_set"], "captures", lambda device: True)
        recorded = run()
    assert torch.equal(recorded.exit_layer, usual.exit_layer)
    torch.testing.assert_close(recorded.prediction, usual.prediction, rtol=1e-5, atol=1e-5)
    assert set(recorded.rows) == {BATCH}
    assert placement._of_graphs.pop() is idle
    run()
    assert idle not in [active for sets in placement._idle.__dict__.values() for active in sets]


@pytest.mark.usefixtures("pretended")
def test_a_host_that_waits_is_noticed() -> None:
    """The tests above can fail."""
    with pytest.raises(Waits):
        run("uvit", OFFICIAL, "threshold", strict=True, batch_invariant=True)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_samples_are_drawn_on_a_device(execution: ExecutionOptions) -> None:
    """Every kind of request: guided, tied, with initial images, all solvers; through `sample`, and all in one
    engine."""
    model, wanted = moved(served()), requests(5, seed=3, most=2)
    for request in wanted:
        request["policy"] = "exit:depth=2.5"  # decides nothing by rounding
    with Engine(served(), 4, threaded=False) as engine:
        on_cpu = [engine.submit(**request) for request in wanted]
    with PretendDevice(), Engine(model, 4, threaded=False, execution=execution) as engine:
        handles = [engine.submit(**request) for request in wanted]
    for handle, usual in zip(handles, on_cpu, strict=True):
        assert torch.equal(handle.report.exit_layer, usual.report.exit_layer)
        image = usual.result(0)
        torch.testing.assert_close(handle.result(0), image, rtol=1e-3, atol=1e-3 * float(image.abs().max()))
    given = {"steps": 3, "class_labels": [0, 1, 2], "guidance_scale": 2.0, "policy": "exit:depth=2.5"}
    images, report = sample(served(), 3, batch=2, **given)
    with PretendDevice():
        others, same = sample(model, 3, batch=2, execution=execution, **given)
    assert torch.equal(same.exit_layer, report.exit_layer)
    torch.testing.assert_close(others, images, rtol=1e-3, atol=1e-3 * float(images.abs().max()))


@pytest.mark.usefixtures("pretended")
def test_groups_are_refused_on_a_device() -> None:
    execution, model = ExecutionOptions(group_size=2), moved(served())
    with pytest.raises(ValueError, match="leave group_size out"):
        run("uvit", PAPER, "full", strict=False, group_size=2)
    with PretendDevice(), pytest.raises(ValueError, match="leave group_size out"):
        sample(model, 3, execution=execution, steps=2)


class Blind(DeviceSet):
    """Of which the host knows nothing but, where it must wait, a number."""

    def seen(self) -> CountSnapshot:
        return CountSnapshot(0, self.num_lanes)

    def wait(self, layer: int) -> int:
        return 5


class NoWord:
    def post(self, word: Tensor) -> None: ...


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SimpleNamespace, tuple[Tensor, Tensor, Tensor]]]:
    """A network and inputs of FakeTensor on a device: there are no values."""
    c, mode = case("uvit", PAPER, torch.float32), FakeTensorMode()

    def move(value: Tensor) -> Tensor:
        with mode:
            return mode.from_tensor(value).to(DEVICE)

    given = elsewhere(c, move), tuple(moved(what, move) for what in c.given.all)
    with mode, TensorsMadeFromValues(lambda value: value.to(DEVICE)):
        yield given


@pytest.mark.parametrize("policy", [Threshold(0.5), Patience(0.5)], ids=str)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # and no kernel is given it
def test_no_value_is_read(fake, policy, monkeypatch) -> None:
    use_sets(monkeypatch, lambda B, device: Blind(B, device, backend="reference", word=NoWord()))
    model, given = fake
    options = {"cfg_partner": torch.arange(BATCH, device=DEVICE), "execution": ExecutionOptions(count_sync="lagged")}
    result = forward(model, *given, policy=policy, record_scores=True, **options)
    assert {v.device for v in (result.prediction, result.exit_layer, result.scores)} == {DEVICE}
    assert result.prediction.shape == given[0].shape


def test_a_value_that_is_read_is_noticed(fake, monkeypatch) -> None:
    use_sets(monkeypatch, lambda B, device: DeviceSet(B, device, backend="reference", word=NoWord()))
    model, given = fake
    with pytest.raises(DataDependentOutputException):
        forward(model, *given, policy=Threshold(0.5), execution=ExecutionOptions(count_sync=Sync()))


@pytest.mark.gpu
@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_a_gpu_is_not_waited_for(kind, config, policies) -> None:
    c, given = case(kind, config, torch.float32), settings(kind, config, policies)
    model, x = on_gpu(c), c.given.x.cuda()

    def call(how: CountSync) -> ForwardOutput:
        return forward(model, x, c.given.t, c.given.context, **given, execution=ExecutionOptions(count_sync=how))

    exact = call(Sync())
    call(Lagged())  # sets, pinned memory and kernels are made at the first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = call(Lagged())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result.exit_layer, exact.exit_layer)
    torch.testing.assert_close(result.prediction, exact.prediction, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_gpu_draws_what_the_cpu_draws(execution: ExecutionOptions) -> None:
    given = {"steps": 4, "class_labels": [0, 1, 2, 0], "guidance_scale": [1, 2, 1, 3], "policy": "exit:depth=2.5"}
    images, report = sample(served(), 4, batch=3, **given)
    others, same = sample(copy.deepcopy(served()).cuda(), 4, batch=3, execution=execution, **given)
    assert torch.equal(same.exit_layer, report.exit_layer)
    torch.testing.assert_close(others, images, rtol=1e-2, atol=1e-2 * float(images.abs().max()))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_in_any_company() -> None:
    c, threshold = case("uvit", PAPER, torch.float32), LANES % 7 + 1.0
    model, execution = on_gpu(c), ExecutionOptions(batch_invariant=True)

    def run(lanes: Tensor) -> ForwardOutput:
        (x, t, context), own = c.given[lanes].all, threshold[lanes] / 10
        return forward(model, x.cuda(), t, context, policy=Threshold(0.5), threshold=own, execution=execution)

    everybody = run(LANES)
    for lanes in (LANES[:1], LANES.flip(0), LANES[3:8]):
        some = run(lanes)
        assert torch.equal(some.exit_layer, everybody.exit_layer[lanes])
        assert torch.equal(some.prediction, everybody.prediction[lanes])
