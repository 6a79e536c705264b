"""Policies that somebody else writes: each is asked for its own samples alone, may fail, and may spoil what it gets."""

import gc
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from adadiff.engine.engine import Handle
from adadiff.forward.forward import forward, run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import Patience, Threshold
from adadiff.policies.interface import ExitContext, ExitPolicy, LimitPolicy
from adadiff.sampling.sampler import sample
from adadiff.uem import PAPER
from sampler.tiny import BATCH, case, images_are_right, is_empty, requests, served, stepped

F32 = torch.float32


@dataclass(frozen=True)
class Frozen(ExitPolicy):
    """As the paper's, but for reading a threshold of its own, which the interface advises against."""

    threshold: float = 0.5

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        return u < self.threshold


class Plain(ExitPolicy):
    def __init__(self, theta: float):
        self.theta = theta

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        return u < self.theta


@dataclass
class Unhashable(ExitPolicy):
    theta: float
    seen: list[int] = field(default_factory=list)

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        self.seen.append(layer)
        return u < self.theta


class Limits(LimitPolicy):
    def __init__(self, theta: float):
        self.theta = theta

    def limits(self, context: ExitContext) -> Tensor:
        return torch.full((context.num_layers - 1, len(context.t)), self.theta)


class Inherits(Threshold):
    """Its limits depend on time, whatever those of the class it inherits from depend on."""

    def limits(self, context: ExitContext) -> Tensor:
        return super().limits(context) * (context.t < 600)


def end(engine: object) -> None:
    while engine.step():
        pass


@pytest.mark.parametrize("kind", [Frozen, Plain, Unhashable, Limits, Inherits])
def test_two_that_read_their_own_thresholds_do_not_share_one(kind: type) -> None:
    """0.05 and 0.9 in one batch exit where each does alone, the one never, the other early."""
    wanted = [
        {"seed": 3, "steps": 4, "class_labels": 1, "policy": kind(theta), "guidance_scale": scale}
        for theta in (0.05, 0.9)
        for scale in (1.0, 2.0)
    ]
    engine = stepped(8)
    handles = [engine.submit(**request) for request in wanted]
    handles += [engine.submit(**request) for request in requests(2, seed=1)]
    end(engine)
    images_are_right(handles, [*wanted, *requests(2, seed=1)])
    shy, bold = (handles[i].report.exit_layer[:, 0, 0].tolist() for i in (0, 2))
    assert shy == [5] * 4
    assert bold == ([5, 5, 1, 1] if kind is Inherits else [2, 1, 1, 1])  # at times 999, 749, 499, 249
    assert is_empty(engine)


@pytest.mark.parametrize("count_sync", [None, "sync", "lagged"])
@pytest.mark.parametrize("kind", [Frozen, Plain, Limits, Threshold])
def test_lanes_of_one_pass_ask_their_own(kind: type, count_sync: str | None) -> None:
    c, index = case("uvit", PAPER, F32), torch.arange(BATCH) % 2
    execution = ExecutionOptions(count_sync=count_sync)
    result = forward(c, *c.given.all, policy=[kind(0.05), kind(0.9)], policy_index=index, execution=execution)
    assert result.exit_layer.tolist() == [1 if k else c.num_layers for k in index.tolist()]
    torch.testing.assert_close(result.prediction, c.exiting(result.exit_layer), rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Raising(ExitPolicy):
    """Raises after a layer, at times below `before`."""

    layer: int = 3
    before: float = 2000

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        if layer == self.layer and bool((context.t < self.before).any()):
            mine = f"layer {layer}"
            raise LookupError(mine)
        return u < 0


class RaisingLimits(LimitPolicy):
    def limits(self, context: ExitContext) -> Tensor:
        mine = "layer 3"
        raise LookupError(mine)


def raised(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


def is_original(error: BaseException, method: str) -> None:
    """The error itself, from where it was raised, with what was known there."""
    assert type(error) is LookupError
    assert error.__cause__ is None
    assert error.__context__ is None
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    assert frame.f_code.co_name == method
    assert frame.f_locals["mine"] == "layer 3"
    assert "raise LookupError(mine)" in traceback.format_exception(error)[-2]
    assert line > frame.f_code.co_firstlineno


@pytest.mark.parametrize("execution", [{}, {"batch_invariant": True}, {"count_sync": "sync"}], ids=str)
@pytest.mark.parametrize(("policy", "method"), [(Raising(), "exit_mask"), (RaisingLimits(), "limits")])
def test_what_a_policy_raises_is_raised_as_it_was(policy: ExitPolicy, method: str, execution: dict) -> None:
    c, options = case("uvit", PAPER, F32), ExecutionOptions(**execution)
    is_original(raised(lambda: forward(c, *c.given.all, policy=policy, execution=options)), method)
    given = {"steps": 2, "policy": policy, "execution": options}
    is_original(raised(lambda: sample(served(), 3, **given)), method)


@pytest.mark.parametrize(("policy", "method"), [(Raising(), "exit_mask"), (RaisingLimits(), "limits")])
def test_a_policy_that_raises_fails_its_own_samples_alone(policy: ExitPolicy, method: str) -> None:
    wanted, calls = requests(8, seed=3), []

    def counted(*given: object, **options: object) -> ForwardOutput:
        calls.append(len(given[1]))
        return run_forward(*given, **options)

    engine = stepped(20, forward=counted)
    bad, handles = [], []
    for i, request in enumerate(wanted):
        if i % 3 == 0:
            bad.append(engine.submit(seed=i, steps=3, policy=policy, guidance_scale=1.0 + i % 2))
        handles.append(engine.submit(**request))
    engine.step()
    assert len(calls) == 2  # once with them, once without
    assert all(handle.done() for handle in bad)
    end(engine)
    images_are_right(handles, wanted)
    for handle in bad:
        assert handle.progress[0] == 0
        is_original(handle.exception(0), method)
    assert (engine.report.failed, engine.report.batch.halvings, is_empty(engine)) == (len(bad), 0, True)


def test_a_policy_may_fail_later_and_several_in_one_tick() -> None:
    engine = stepped(8)
    good = requests(2, seed=9, most=5)
    handles = [engine.submit(**request) for request in good]
    late = [engine.submit(seed=1, steps=4, policy=Raising(before=600)) for _ in range(2)]
    others = [engine.submit(seed=1, steps=4, policy=Raising(layer=layer, before=600)) for layer in (1, 2)]
    end(engine)
    images_are_right(handles, good)
    for handle in [*late, *others]:
        assert (handle.progress, type(handle.exception(0))) == ((2, 4), LookupError)  # at times 999, 749
        assert len(handle.report.exit_layer) == 2
    assert [str(handle.exception(0)) for handle in others] == ["layer 1", "layer 2"]
    assert is_empty(engine)


class Answering(ExitPolicy):
    def __init__(self, answer: Callable[[Tensor], object]):
        self.answer = answer

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> object:
        return self.answer(u)


class AnsweringLimits(LimitPolicy):
    def __init__(self, answer: Callable[[Tensor], object]):
        self.answer = answer

    def limits(self, context: ExitContext) -> object:
        return self.answer(context.t.expand(context.num_layers - 1, -1))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Answering(lambda u: None), r"exit_mask must return bool \[1\] on cpu, got None"),
        (Answering(lambda u: u), r"got torch.float32 \[1\] on cpu"),
        (Answering(lambda u: torch.zeros(2, dtype=torch.bool)), r"got torch.bool \[2\]"),
        (Answering(lambda u: [True]), r"got \[True\]"),
        (AnsweringLimits(lambda t: None), r"limits must return float32 \[4, 1\], got None"),
        (AnsweringLimits(lambda t: t.double()), r"got torch.float64 \[4, 1\]"),
        (AnsweringLimits(lambda t: t[:2]), r"got torch.float32 \[2, 1\]"),
    ],
)
def test_an_answer_that_is_none_fails_its_own_samples_alone(policy: ExitPolicy, message: str) -> None:
    engine, good = stepped(4), {"seed": 0, "steps": 2, "policy": "exit:patience=0.5"}
    if isinstance(policy, AnsweringLimits):
        good["policy"] = "exit:0.5"  # else all are asked by mask
    handle, bad = engine.submit(**good), engine.submit(seed=1, steps=2, policy=policy)
    end(engine)
    images_are_right([handle], [good])
    with pytest.raises(ValueError, match=message if isinstance(policy, Answering) else "limits must return float32"):
        bad.result(0)
    lonely = raised(lambda: sample(served(), 1, steps=2, policy=policy))
    with pytest.raises(ValueError, match=message):
        raise lonely


def test_one_answer_for_all_is_an_answer() -> None:
    policy = Answering(lambda u: (u < 2).all())
    _, report = sample(served(), 3, steps=2, policy=policy)
    assert bool((report.exit_layer[..., 0] == 1).all())


@pytest.mark.parametrize("count_sync", [None, "sync", "lagged"])
@pytest.mark.parametrize("answer", [lambda u: ~(u > 0.5), lambda u: torch.tensor(True)], ids=["by row", "for all"])
def test_nan_never_exits_whatever_a_policy_answers(answer: Callable[[Tensor], Tensor], count_sync: str | None) -> None:
    """Lane 4 alone, be the policy the only one or one of two."""
    c, index = case("uvit", PAPER, F32), torch.arange(BATCH) % 2
    (x, *given), execution = c.given.all, ExecutionOptions(count_sync=count_sync)
    hurt = torch.where((torch.arange(BATCH) == 4).view(-1, 1, 1, 1), torch.nan, x)
    own = Answering(answer)
    for options in ({"policy": own}, {"policy": [own, Patience(0.5)], "policy_index": index}):
        wanted = forward(c, x, *given, **options, execution=execution).exit_layer
        assert wanted[4] < c.num_layers
        wanted[4] = c.num_layers
        assert torch.equal(forward(c, hurt, *given, **options, execution=execution).exit_layer, wanted)


def test_who_keeps_a_policys_error_keeps_no_activations() -> None:
    kept = []

    def noted(*given: object, **options: object) -> ForwardOutput:
        hidden = torch.zeros(1000)
        kept.extend([weakref.ref(hidden), weakref.ref(given[1])])
        return run_forward(*given, **options)

    engine = stepped(4, forward=noted)
    handle = engine.submit(seed=0, steps=2, policy=Raising())
    engine.submit(seed=1, steps=1)
    gc.disable()
    try:
        end(engine)
        assert type(handle.exception(0)) is LookupError
        alive = [ref() is not None for ref in kept[:2]]  # of the pass that failed
    finally:
        gc.enable()
    assert alive == [False, False]


class Meddling(ExitPolicy):
    """Decides as the paper's, and then spoils whatever it was given."""

    needs_ids = True
    threshold = 0.5

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        mask = u < context.threshold
        for value in (u, context.t, context.threshold):
            value.fill_(torch.nan)
        context.state.fill_(7 + layer)
        for value in (context.ids.sample, context.ids.step, context.ids.half):
            value.fill_(-1)
        return mask


class MeddlingLimits(LimitPolicy):
    needs_ids = True
    threshold = 0.5

    def limits(self, context: ExitContext) -> Tensor:
        limits = context.threshold.clone().expand(context.num_layers - 1, -1)
        for value in (context.t, context.threshold, context.state):
            value.fill_(torch.nan)
        context.ids.sample.fill_(-1)
        return limits


@pytest.mark.parametrize("count_sync", [None, "sync", "lagged"])
@pytest.mark.parametrize("kind", [Meddling, MeddlingLimits])
@pytest.mark.parametrize("mate", [Threshold(0.5), Patience(0.5)], ids=str)
def test_what_a_policy_writes_spoils_nothing(kind: type, mate: ExitPolicy, count_sync: str | None) -> None:
    """Neither for its mates, nor for itself at the next layer, nor what is recorded, nor the caller's tensors."""
    c, index = case("uvit", PAPER, F32), torch.arange(BATCH) % 2
    threshold = torch.linspace(0.3, 0.7, BATCH)
    given = {"policy_index": index, "record_scores": True, "execution": ExecutionOptions(count_sync=count_sync)}
    before = [value.clone() for value in (*c.given.all, index, threshold)]
    clean = forward(c, *c.given.all, policy=[Threshold(0.5), mate], threshold=threshold, **given)
    found = forward(c, *c.given.all, policy=[kind(), mate], threshold=threshold, **given)
    assert torch.equal(found.exit_layer, clean.exit_layer)
    assert torch.equal(found.prediction, clean.prediction)
    torch.testing.assert_close(found.scores, clean.scores, rtol=0, atol=0, equal_nan=True)
    assert len(clean.exit_layer.unique()) > 2
    assert all(torch.equal(a, b) for a, b in zip(before, (*c.given.all, index, threshold), strict=True))


@pytest.mark.parametrize("kind", [Meddling, MeddlingLimits])
def test_what_a_policy_writes_spoils_no_mates_image(kind: type) -> None:
    wanted = [request for request in requests(30, seed=4) if request["policy"] != "full"][:6]
    engine, handles = stepped(16), []
    mine = {"seed": 2, "steps": 5, "class_labels": 0, "guidance_scale": 1.5}
    handles = [engine.submit(policy=kind(), **mine)]
    handles += [engine.submit(**request) for request in wanted]
    end(engine)
    images_are_right(handles, [{"policy": "exit:0.5", **mine}, *wanted])


@dataclass(frozen=True)
class Counting(ExitPolicy):
    """Exits once its memory, which starts at 0, has counted to the threshold."""

    threshold: float = 3

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        context.state.add_(1)
        return context.state >= context.threshold


def test_a_policys_memory_is_kept_by_lane() -> None:
    c, index = case("uvit", PAPER, F32), torch.arange(BATCH) % 2
    threshold = torch.arange(BATCH) % 6 + 1.0
    wanted = threshold.clone()
    threshold[index == 1] = 0.5
    for count_sync in (None, "sync"):
        execution = ExecutionOptions(count_sync=count_sync)
        given = {"policy_index": index, "threshold": threshold, "execution": execution}
        result = forward(c, *c.given.all, policy=[Counting(), Patience(0.5)], **given)
        assert result.exit_layer[index == 0].tolist() == wanted[index == 0].tolist()


def test_a_handle_of_a_failed_request_is_a_future_like_others() -> None:
    engine, ended = stepped(2), []
    handle = engine.submit(seed=0, steps=2, policy=Raising())
    handle.add_done_callback(lambda own: ended.append(type(own.exception(0))))
    end(engine)
    assert isinstance(handle, Handle)
    assert ended == [LookupError]
    assert not handle.cancel()
