"""A tick that fails has changed nothing: it is made again in halves, until the sample to blame is found."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from adadiff.forward.forward import run_forward
from adadiff.forward.output import ForwardOutput
from sampler.test_batch import OTHERS, POISON, admit, check, make, run
from sampler.tiny import requests


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
