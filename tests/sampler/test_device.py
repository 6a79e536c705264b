"""On a device: nothing mixes it with the CPU, and what must not wait for it does not.

Three ways, of which two need no GPU: a pretended device with real values (pretend.py), PyTorch's own FakeTensor,
which has no values to read, and, where there is one, a GPU under `set_sync_debug_mode("error")`.
"""

import copy
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from adadiff.forward import device as device_engine
from adadiff.forward.counts import Counts, Lagged, Sync
from adadiff.forward.forward import ForwardOutput, evaluate
from adadiff.models.uvit import UViT
from adadiff.policies.exit_policies import Depth, Full, Patience, Replay, Threshold
from adadiff.sampling.sampler import sample
from adadiff.serving.engine import Engine
from adadiff.uem import OFFICIAL, PAPER, ExitConfig, Exits
from adadiff_kernels import CountSnapshot, DeviceSet, settle_rows
from late import use_sets
from pretend import DEVICE, OnDevice, PretendDevice, TensorsMadeFromValues, Waits
from sampler.tiny import BATCH, case, requests, served

LANES = torch.arange(BATCH)
NETWORKS = [
    pytest.param("uvit", PAPER, id="uvit-paper"),
    pytest.param("uvit", OFFICIAL, id="uvit-official"),
    pytest.param("dit", PAPER, id="dit-paper"),
    pytest.param("uvit", ExitConfig(head="block"), id="uvit-block"),
]
OPTIONS = [{}, {"counts": "lagged"}, {"batch_invariant": True}]


class Polled(DeviceSet):
    """As with the compiled kernel: the device writes what the host is to know into memory of the host."""

    def __init__(self, B: int, device: torch.device):
        with PretendDevice():  # sets are kept, so that making one may wait
            super().__init__(B, device, backend="reference", word=self)

    def post(self, word: Tensor) -> None:
        self._read = int(word.held)

    def read(self) -> int:
        return self._read

    def wait(self, layer: int) -> int:
        return self.seen().count


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    use_sets(monkeypatch, Polled)


def moved(what: nn.Module | Tensor, move: Callable[[Tensor], Tensor] = OnDevice) -> nn.Module | Tensor:
    """A copy with its values, or a module's weights, elsewhere: on the pretended device."""
    if isinstance(what, Tensor):
        return move(what)
    made = copy.deepcopy(what)
    for part in made.modules():
        part._parameters.update({name: move(v.detach()) for name, v in part._parameters.items() if v is not None})
    return made


def settings(kind: str, config: ExitConfig, rules: str) -> dict:
    """Rules with what goes with them, by lane, on the CPU. Each threshold lies in the middle of the widest gap of its
    lane's uncertainties among the lower ones, so that no decision hangs on rounding."""
    u = case(kind, config, torch.float32).uncertainties[:-1].sort(0).values
    gap, at = u.diff(dim=0)[:3].max(0)
    threshold = u[at, LANES] + gap / 2
    if rules == "threshold":
        return {"rule": Threshold(0.5), "threshold": threshold}
    if rules == "patience, tied":
        pairs = LANES.clone()
        pairs[[2, 7]], threshold[7] = torch.tensor([7, 2]), threshold[2]
        return {"rule": Patience(0.5), "threshold": threshold, "pairs": pairs}
    if rules == "full":
        return {"rule": Full()}
    rule = [Threshold(0.5), Patience(0.5), Depth(3.5)]
    return {"rule": rule, "which": LANES % 3, "threshold": threshold.where(LANES % 3 < 2, 2.5)}


RULES = ["threshold", "patience, tied", "mixed", "full"]


def run(
    kind: str, config: ExitConfig, rules: str, strict: bool, lanes: Tensor = LANES, **options: object
) -> tuple[ForwardOutput, ForwardOutput]:
    """On the pretended device, and on the CPU."""
    c = case(kind, config, torch.float32)
    (x, t, context), own = c.given[lanes].all, settings(kind, config, rules)
    own = {name: value[lanes] if isinstance(value, Tensor) else value for name, value in own.items()}
    own |= {"record": True}
    on_cpu = evaluate(c.backbone, c.exits, x=x, t=t, context=context, **own)
    backbone, exits = moved(c.backbone), moved(c.exits)
    with PretendDevice(strict):
        result = evaluate(backbone, exits, x=OnDevice(x), t=t, context=context, **own, **options)
    assert {v.device for v in (result.eps, result.exit_layer, result.scores)} == {DEVICE}
    with PretendDevice():
        macs, swapped = result.macs, result.moved
    values = (result.eps.held, result.exit_layer.held, macs, result.macs_full, swapped, result.scores.held)
    variance = None if result.variance is None else result.variance.held
    return ForwardOutput(*values, variance=variance), on_cpu


def assert_close(found: ForwardOutput, wanted: ForwardOutput) -> None:
    assert torch.equal(found.exit_layer, wanted.exit_layer)
    assert (found.macs, found.macs_full) == (wanted.macs, wanted.macs_full)
    tolerance = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(found.eps, wanted.eps, **tolerance)
    torch.testing.assert_close(found.scores, wanted.scores, **tolerance, equal_nan=True)
    torch.testing.assert_close(found.variance, wanted.variance, **tolerance)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_nothing_waits_for_the_device(kind, config, rules) -> None:
    assert_close(*run(kind, config, rules, strict=True, counts="lagged"))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("counts", [None, "sync:2"])
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_a_host_that_waits(kind, config, counts) -> None:
    assert_close(*run(kind, config, "mixed", strict=False, counts=counts))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("rules", ["threshold", "mixed"])
def test_the_same_bits_in_any_company_on_a_device(rules) -> None:
    everybody, usual = run("uvit", PAPER, rules, strict=False, batch_invariant=True)
    assert_close(everybody, usual)
    lanes = torch.tensor([9, 2, 7, 0])
    some, _ = run("uvit", PAPER, rules, strict=False, batch_invariant=True, lanes=lanes)
    assert torch.equal(some.exit_layer, everybody.exit_layer[lanes])
    assert torch.equal(some.eps, everybody.eps[lanes])


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
    run("uvit", OFFICIAL, "full", strict=True, counts=Lagged())
    assert not names
    run("uvit", OFFICIAL, "full", strict=True, counts=Lagged(), nvtx=True)
    assert names == [f"block {layer}" for layer in range(1, 8)]


@pytest.mark.parametrize("used", [0, 1, 2])
def test_rows_settle_without_a_look_at_the_moves(used: int) -> None:
    """By PyTorch, where Triton is missing: of unused moves as of others, in any dtype."""
    moves = torch.tensor([[0, 3, 6], [2, 1, -1], [-1, -1, -1], [-1, -1, -1]][2 - used : 5 - used], dtype=torch.int32)
    for rows in (torch.arange(14.0).view(7, 2), (torch.arange(14) % 3 == 0).view(7, 2)):
        saved = torch.zeros_like(rows[:5])
        held = OnDevice(rows.clone()), OnDevice(saved.clone())
        for row, lane, source in moves.tolist()[:used]:
            saved[lane] = rows[row]
            rows[row] = rows[source if source >= 0 else row]
        with PretendDevice(strict=True):
            settle_rows(OnDevice(moves), *held)
            settle_rows(OnDevice(moves[:0]), *held)
        assert torch.equal(held[0].held, rows)
        assert torch.equal(held[1].held, saved)
    held, saved = OnDevice(torch.arange(7)), OnDevice(torch.full((7,), -1))
    with PretendDevice(strict=True):  # as many moves as rows exit, which is what a host's plan has
        settle_rows(OnDevice(torch.tensor([[0, 5, 6], [2, 4, -1]], dtype=torch.int32)[:used]), held, saved)
    assert held.held.tolist() == [[0, 1, 2, 3, 4, 5, 6], [6, 1, 2, 3, 4, 5, 6], [6, 1, 2, 3, 4, 5, 6]][used]
    assert saved.held.tolist() == [[-1] * 7, [*[-1] * 5, 0, -1], [*[-1] * 4, 2, 0, -1]][used]


def test_an_evaluation_in_a_graph_keeps_its_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph goes on writing to it; and what it cannot know, all rows run through every block."""
    c, threshold = case("uvit", PAPER, torch.float32), LANES % 7 + 1.0

    def run() -> ForwardOutput:
        return evaluate(c.backbone, c.exits, Replay(), *c.given.all, threshold=threshold, counts="lagged")

    monkeypatch.setattr(device_engine, "_idle", type(device_engine._idle)())  # no other test's
    usual = run()
    ((idle,),) = [sets for (B, *_), sets in device_engine._idle.__dict__.items() if B == BATCH]
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["adadiff_kernels.compaction.device_set"], "captures", lambda device: True)
        recorded = run()
    assert torch.equal(recorded.exit_layer, usual.exit_layer)
    torch.testing.assert_close(recorded.eps, usual.eps, rtol=1e-5, atol=1e-5)
    assert set(recorded.rows) == {BATCH}
    assert device_engine._of_graphs.pop() is idle
    run()
    assert idle not in [active for sets in device_engine._idle.__dict__.values() for active in sets]


def test_the_pretended_device_has_the_manners_of_one() -> None:
    """What it lets pass is worth nothing unless it stops what a device would stop."""
    cpu, waits = torch.arange(4.0), pytest.raises(Waits)
    with PretendDevice(strict=True):
        x = torch.zeros(4, device=DEVICE)
        assert x.device == DEVICE
        x.copy_(cpu.pin_memory(), non_blocking=True)
        assert (x + 1)[1:].add_(1).device == DEVICE
        with pytest.raises(RuntimeError, match="tensors on"):
            _ = x + cpu
        with pytest.raises(RuntimeError, match="tensors on"):
            torch.cat([x, cpu])
        for call in (
            lambda: int(x.sum()),
            lambda: bool((x > 1).any()),
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x[torch.tensor([0])],
            lambda: x.cpu(),
            lambda: cpu.to(DEVICE),
            lambda: cpu.to(DEVICE, non_blocking=True),  # from memory that is not pinned
            lambda: cpu.pin_memory().to(DEVICE),
            lambda: torch.equal(x, x),
            lambda: torch.tensor([1.0], device=DEVICE),
        ):
            with waits:
                call()
    assert x.held.tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("pretended")
def test_a_host_that_waits_is_noticed() -> None:
    """The tests above can fail."""
    with pytest.raises(Waits):
        run("uvit", OFFICIAL, "threshold", strict=True, batch_invariant=True)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_are_drawn_on_a_device(options: dict) -> None:
    """Every kind of request: guided, tied, with start images, all solvers; through `sample`, and all in one engine."""
    model, wanted = moved(served()), requests(5, seed=3, most=2)
    for request in wanted:
        request["rule"] = "depth:2.5"  # decides nothing by rounding
    with Engine(served(), 4, start=False) as engine:
        on_cpu = [engine.submit(**request) for request in wanted]
    with PretendDevice(), Engine(model, 4, start=False, **options) as engine:
        handles = [engine.submit(**request) for request in wanted]
    for handle, usual in zip(handles, on_cpu, strict=True):
        assert torch.equal(handle.report.exit_layer, usual.report.exit_layer)
        image = usual.result(0)
        torch.testing.assert_close(handle.result(0), image, rtol=1e-3, atol=1e-3 * float(image.abs().max()))
    given = {"steps": 3, "labels": [0, 1, 2], "guidance": 1.0, "rule": "depth:2.5"}
    images, report = sample(served(), 3, batch=2, **given)
    with PretendDevice():
        others, same = sample(model, 3, batch=2, **options, **given)
    assert torch.equal(same.exit_layer, report.exit_layer)
    torch.testing.assert_close(others, images, rtol=1e-3, atol=1e-3 * float(images.abs().max()))


class Blind(DeviceSet):
    """Of which the host knows nothing but, where it must wait, a number."""

    def seen(self) -> CountSnapshot:
        return CountSnapshot(0, self.num_lanes)

    def wait(self, layer: int) -> int:
        return 5


class NoWord:
    def post(self, word: Tensor) -> None: ...


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[UViT, Exits, Tensor, Tensor, Tensor]]:
    """A network and inputs of FakeTensor on a device: there are no values."""
    c, mode = case("uvit", PAPER, torch.float32), FakeTensorMode()

    def move(value: Tensor) -> Tensor:
        with mode:
            return mode.from_tensor(value).to(DEVICE)

    given = [moved(what, move) for what in (c.backbone, c.exits, *c.given.all)]
    with mode, TensorsMadeFromValues(lambda value: value.to(DEVICE)):
        yield given


@pytest.mark.parametrize("rule", [Threshold(0.5), Patience(0.5)], ids=str)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # and no kernel is given it
def test_no_value_is_read(fake, rule, monkeypatch) -> None:
    use_sets(monkeypatch, lambda B, device: Blind(B, device, backend="reference", word=NoWord()))
    pairs = torch.arange(BATCH, device=DEVICE)
    result = evaluate(fake[0], fake[1], rule, *fake[2:], record=True, counts="lagged", pairs=pairs)
    assert {v.device for v in (result.eps, result.exit_layer, result.scores)} == {DEVICE}
    assert result.eps.shape == fake[2].shape


def test_a_value_that_is_read_is_noticed(fake, monkeypatch) -> None:
    use_sets(monkeypatch, lambda B, device: DeviceSet(B, device, backend="reference", word=NoWord()))
    with pytest.raises(DataDependentOutputException):
        evaluate(fake[0], fake[1], Threshold(0.5), *fake[2:], counts=Sync())


@pytest.mark.gpu
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_a_gpu_is_not_waited_for(kind, config, rules) -> None:
    c, given = case(kind, config, torch.float32), settings(kind, config, rules)
    backbone, exits = copy.deepcopy(c.backbone).cuda(), copy.deepcopy(c.exits).cuda()
    x = c.given.x.cuda()

    def call(how: Counts) -> ForwardOutput:
        return evaluate(backbone, exits, x=x, t=c.given.t, context=c.given.context, **given, counts=how)

    exact = call(Sync())
    call(Lagged())  # sets, pinned memory and kernels are made at the first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = call(Lagged())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result.exit_layer, exact.exit_layer)
    torch.testing.assert_close(result.eps, exact.eps, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_gpu_draws_what_the_cpu_draws(options: dict) -> None:
    given = {"steps": 4, "labels": [0, 1, 2, 0], "guidance": [0, 1, 0, 2], "rule": "depth:2.5"}
    images, report = sample(served(), 4, batch=3, **given)
    others, same = sample(copy.deepcopy(served()).cuda(), 4, batch=3, **options, **given)
    assert torch.equal(same.exit_layer, report.exit_layer)
    torch.testing.assert_close(others, images, rtol=1e-2, atol=1e-2 * float(images.abs().max()))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_in_any_company() -> None:
    c, threshold = case("uvit", PAPER, torch.float32), LANES % 7 + 1.0
    backbone, exits = copy.deepcopy(c.backbone).cuda(), copy.deepcopy(c.exits).cuda()

    def run(lanes: Tensor) -> ForwardOutput:
        given = c.given[lanes]
        rest = {"threshold": threshold[lanes] / 10, "batch_invariant": True}
        return evaluate(backbone, exits, Threshold(0.5), given.x.cuda(), given.t, given.context, **rest)

    everybody = run(LANES)
    for lanes in (LANES[:1], LANES.flip(0), LANES[3:8]):
        some = run(lanes)
        assert torch.equal(some.exit_layer, everybody.exit_layer[lanes])
        assert torch.equal(some.eps, everybody.eps[lanes])
