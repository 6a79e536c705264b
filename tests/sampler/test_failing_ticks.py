"""A tick that fails has changed nothing: it is made again in halves, until the sample to blame is found."""

import gc
import itertools
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from adadiff.diffusion import tables
from adadiff.forward.decision import PolicyFailure
from adadiff.forward.forward import run_forward
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import Depth
from adadiff.sampling import batch as batch_module
from adadiff.sampling import slots
from adadiff.sampling.pass_size import PassSize
from sampler.test_batch import OTHERS, POISON, admit, check, make, run
from sampler.tiny import images_are_right, is_empty, requests, stepped


def out_of_memory(lanes: int) -> tuple[Callable[..., ForwardOutput], list[int]]:
    """A forward pass for which more than so many lanes are too many, and the lanes of each call."""
    calls = []

    def limited(*args: object, **options: object) -> ForwardOutput:
        calls.append(len(args[1]))
        if calls[-1] > lanes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_forward(*args, **options)

    return limited, calls


def refuses(error: Exception) -> Callable[..., ForwardOutput]:
    """A forward pass that fails whenever the poisoned sample is in it."""

    def call(*args: object, **options: object) -> ForwardOutput:
        if bool((args[3] == POISON["class_labels"]).any()):
            raise error
        return run_forward(*args, **options)

    return call


@pytest.mark.parametrize(("lanes", "halvings"), [(64, 0), (8, 1), (5, 2), (2, 3)])
def test_a_batch_that_does_not_fit_is_halved_and_goes_on(lanes: int, halvings: int) -> None:
    wanted = [request for request in requests(40, seed=5, most=4) if request.get("guidance_scale") is None][:13]
    call, calls = out_of_memory(lanes)
    batch = make(13, call)
    check(wanted, dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)})))
    assert batch.totals.halvings == halvings
    assert sum(n > lanes for n in calls) == halvings  # what did not fit once is not tried again
    assert batch.totals.passes == sum(n for n in calls if n <= lanes)
    assert batch.free == 13


def test_a_failure_that_belongs_to_nobody_ends_the_tick() -> None:
    """A defect: it names a policy that none of the samples follows. Trying again would never end."""
    stranger = Depth(2)

    def fails(*args: object, **options: object) -> ForwardOutput:
        raise PolicyFailure(stranger, ZeroDivisionError("of a stranger"))

    batch = make(2, fails)
    for seed in (1, 2):
        admit(batch, {"seed": seed, "steps": 2, "class_labels": 1, "policy": "exit:0.5"})
    with pytest.raises(RuntimeError, match="policy 'exit:depth=2' failed, and no sample follows it"):
        batch.tick()


def test_a_guided_pair_is_not_torn_apart() -> None:
    wanted = [
        {"seed": i, "steps": 2, "class_labels": i % 3, "guidance_scale": 2.5, "policy": "exit:0.5"} for i in range(5)
    ]
    call, calls = out_of_memory(2)
    batch = make(5, call)
    check(wanted, dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)})))
    assert calls[-1] == 2
    call, _ = out_of_memory(1)
    batch = make(5, call)
    ended = dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)}))
    assert all(isinstance(error, torch.OutOfMemoryError) for error in ended.values())
    assert batch.free == 5


LONG = [{"seed": i, "steps": 100, "class_labels": i % 2, "policy": "exit:depth=1"} for i in range(4)]


def short_of_memory(lanes: int, calls: range) -> tuple[Callable[..., ForwardOutput], list[int]]:
    """As `out_of_memory`, but for some of the calls only, as where somebody else takes the memory for a while."""
    made = []

    def limited(*args: object, **options: object) -> ForwardOutput:
        made.append(len(args[1]))
        if len(made) in calls and made[-1] > lanes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_forward(*args, **options)

    return limited, made


@pytest.mark.parametrize("lanes", [2, 1])
@pytest.mark.parametrize("calls", [range(1, 9), range(20, 29)], ids=["at the start", "later"])
def test_a_batch_is_whole_again_once_memory_is_back(lanes: int, calls: range) -> None:
    call, made = short_of_memory(lanes, calls)
    batch = make(4, call)
    ended = dict(run(batch, {admit(batch, request): i for i, request in enumerate(LONG)}))
    assert batch.totals.halvings > 0
    assert made[-20:] == [4] * 20
    failed = sum(n > lanes for i, n in enumerate(made, start=1) if i in calls)
    assert batch.totals.halvings == failed  # and none of the attempts to grow has failed
    check(LONG, ended)


def test_an_attempt_that_fails_is_repeated_ever_later() -> None:
    """A tick that fails costs a forward pass; where memory stays short, few are spent."""
    size, attempts = PassSize(64), []
    for tick in range(5000):
        if size.most > 16:
            attempts.append(tick)
            size.shrink(16)
        size.tick_is_done(64)
    gaps = [b - a for a, b in itertools.pairwise(attempts)]
    assert gaps == [17, 33, 65, 129, 257, 513, 1025, 1025, 1025]
    assert attempts[0] == 0


def ticks_until_more(size: PassSize) -> int:
    before, ticks = size.most, 0
    while size.most == before:
        size.tick_is_done(64)
        ticks += 1
    return ticks


def test_after_a_good_while_an_attempt_is_cheap_again() -> None:
    size = PassSize(4)
    for _ in range(6):
        size.shrink(2)
        size.tick_is_done(4)
    assert ticks_until_more(size) == 512
    for calm, wait in ((10, 1024), (1100, 16)):  # after a few ticks it is doubled once more, after many it is the first
        for _ in range(calm):
            size.tick_is_done(4)
        size.shrink(2)
        size.tick_is_done(4)
        assert ticks_until_more(size) == wait


def test_nobody_is_tried_where_nobody_is_held_back() -> None:
    """With few samples in flight nothing is learnt of the memory that more would take."""
    size = PassSize(8)
    size.shrink(2)
    for _ in range(100):
        size.tick_is_done(1)
    assert size.most == 2
    for _ in range(40):
        size.tick_is_done(8)
    assert size.most == 8


def test_an_engine_is_whole_again_too() -> None:
    call, made = short_of_memory(2, range(3, 12))
    engine = stepped(4, forward=call)
    handles = [engine.submit(**request) for request in LONG]
    while engine.step():
        pass
    assert engine.report.batch.halvings > 0
    assert made[-20:] == [4] * 20
    images_are_right(handles, LONG)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("bad"), False),
        (ValueError("bad"), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("position", [0, 4])
def test_a_sample_that_cannot_be_run_fails_alone(error: Exception, memory: bool, position: int) -> None:
    wanted = [*OTHERS[:position], POISON, *OTHERS[position:]]
    batch = make(7, refuses(error))
    ended = dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)}))
    assert ended[position] is error
    assert [i for i, image in ended.items() if isinstance(image, Exception)] == [position]
    check(wanted, ended)
    assert (batch.totals.halvings > 0) == memory
    assert batch.free == 7


def test_an_error_that_hits_everybody_ends_everybody() -> None:
    def broken(*_: object, **__: object) -> ForwardOutput:
        raise RuntimeError("no network")

    batch = make(5, broken)
    for request in OTHERS[:5]:
        admit(batch, request)
    tick = batch.tick()
    assert sorted(tick.failed) == list(range(5))
    assert (len(tick.slots), len(tick.done), tick.records) == (0, 0, ())
    assert len(batch.tick().failed) == 0  # they are not tried again, even before their slots are free


def test_who_keeps_an_error_keeps_no_tensors() -> None:
    kept = []

    def broken(*_: object, **__: object) -> ForwardOutput:
        activations = torch.zeros(1000)
        kept.append(weakref.ref(activations))
        raise RuntimeError("no network")

    batch = make(2, broken)
    for request in OTHERS[:2]:
        admit(batch, request)
    gc.disable()
    try:
        failed = batch.tick().failed
    finally:
        gc.enable()
    assert len(failed) == 2
    assert all(activations() is None for activations in kept)


@pytest.mark.parametrize("interrupted", [1, 2, 3, 4, 5])
def test_an_interrupted_tick_has_changed_nothing(interrupted: int) -> None:
    """Ctrl-C is no fault of a sample's. The second call is one half of a tick, the third the other."""
    calls = []

    def call(*args: object, **options: object) -> ForwardOutput:
        calls.append(len(args[1]))
        if len(calls) == interrupted:
            raise KeyboardInterrupt
        if len(args[1]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_forward(*args, **options)

    wanted, batch, at, ended, interrupts = OTHERS, make(6, call), {}, {}, 0
    for i, request in enumerate(wanted):
        at[admit(batch, request)] = i
    while batch.count:
        try:
            for i, image in run(batch, at):
                ended[i] = image
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    assert not any(isinstance(image, Exception) for image in ended.values())
    check(wanted, ended)


GUIDED = {"steps": 3, "solver": "dpm++2m", "policy": "exit:0.4", "class_labels": 1, "guidance_scale": 2.0}
# what takes memory where a request begins: tables of its solver, its noise, its context and what goes there
ALLOCATES = {"pack": tables, "initial_noise": batch_module, "upload": slots, "zeros_like": slots}


@pytest.mark.parametrize("name", ALLOCATES)
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_memory_that_runs_out_where_a_request_begins_costs_it_alone(
    name: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that come after it, of the same settings too, find everything as it was."""
    of_torch = name == "zeros_like"
    make, calls = getattr(torch if of_torch else ALLOCATES[name], name), itertools.count(1)

    def short(*args: object, **options: object) -> object:
        if next(calls) == nth:
            raise MemoryError
        return make(*args, **options)

    engine = stepped(3)
    wanted = [{"seed": 1, "steps": 4}, *({"seed": seed, **GUIDED} for seed in range(2, 7))]
    handles = [engine.submit(**request) for request in wanted]
    if of_torch:  # as these modules see it
        monkeypatch.setattr(ALLOCATES[name], "torch", SimpleNamespace(**{**vars(torch), name: short}))
    else:
        monkeypatch.setattr(ALLOCATES[name], name, short)
    for _ in range(40):
        if not engine.step():
            break
    monkeypatch.undo()
    failed = [i for i, handle in enumerate(handles) if handle.exception(0) is not None]
    assert [type(handles[i].exception(0)) for i in failed] == [MemoryError] * len(failed)
    assert len(failed) == (1 if next(calls) > nth else 0)
    good = [i for i in range(len(wanted)) if i not in failed]
    images_are_right([handles[i] for i in good], [wanted[i] for i in good])
    assert is_empty(engine)
