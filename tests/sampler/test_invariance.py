"""`batch_invariant`: a request's exits and image are the same bits whatever else runs, alone or among 63 others.

The libraries of a machine may round a product by its number of rows. Here all of them visibly do, or only those of
which there is one per sample (time embedding, UEM time part), and the mode must not notice; without it, they show.
"""

import math
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from adadiff.engine.engine import Engine, Handle
from adadiff.forward.forward import forward
from adadiff.forward.lane_by_lane import lane_by_lane
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import Depth, Full, Patience, Replay, Threshold
from adadiff.policies.interface import ExitPolicy
from adadiff.sampling import batch
from adadiff.sampling.sampler import sample
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from adadiff_kernels import Noise
from adadiff_kernels.solver_step import reference
from sampler.tiny import BATCH, alone, case, requests, served

NETWORKS = [
    pytest.param("uvit", PAPER, id="uvit-paper"),
    pytest.param("uvit", OFFICIAL, id="uvit-official"),
    pytest.param("dit", PAPER, id="dit-paper"),
    pytest.param("adaln", PAPER, id="adaln-paper"),
]
REQUESTS = requests(16, seed=21, most=4)


def off(rows: int) -> float:
    """What a product over so many rows is multiplied with."""
    return 1 + 1e-4 * math.sin(rows)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """request.param: "all" products round by their number of rows, only those "per sample", or those of the "heads"."""
    for network in NETWORKS:
        case(*network.values, torch.float32)  # plain results are kept for other tests, so they are made before
    linear, conv, einsum, attention, product = (
        nn.Linear.forward,
        nn.Conv2d.forward,
        torch.einsum,
        F.scaled_dot_product_attention,
        F.linear,
    )
    which = request.param

    def of_linear(self: nn.Linear, h: Tensor) -> Tensor:
        if which == "all" or (which == "per sample" and h.ndim == 2):
            return linear(self, h) * off(h.numel() // self.in_features)
        return linear(self, h)

    monkeypatch.setattr(nn.Linear, "forward", of_linear)
    if which != "heads":
        monkeypatch.setattr(torch, "einsum", lambda how, a, b: einsum(how, a, b) * off(len(b)))
    if which != "per sample":
        monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: conv(self, x) * off(len(x)))
    if which == "all":
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attention(q, k, v) * off(len(q)))
        monkeypatch.setattr(F, "linear", lambda h, *w: product(h, *w) * off(h.numel() // h.shape[-1]))


disturbed = pytest.mark.parametrize("products", ["all", "per sample", "heads"], indirect=True)


def spread(kind: str, config: ExitConfig) -> Tensor:
    """Thresholds by lane, of every size that matters, in no order."""
    u = case(kind, config, torch.float32).uncertainties[:-1]
    return u.flatten().quantile(torch.linspace(0.02, 0.6, BATCH))[torch.arange(BATCH) * 5 % BATCH]


def run(
    kind: str, config: ExitConfig, lanes: Tensor, policy: ExitPolicy | None = None, batch_invariant: bool = True
) -> ForwardOutput:
    """These lanes by themselves: each with a threshold of its own, and every third with another policy."""
    c = case(kind, config, torch.float32)
    threshold, index = spread(kind, config), torch.arange(BATCH) % 3
    policies, thresholds = [Threshold(0.5), Patience(0.5), Depth(3.5)], threshold.where(index < 2, 1.0 + index)
    if policy is not None:
        policies, thresholds, index = [policy], torch.arange(BATCH) % c.num_layers + 1.0, None
    return forward(
        c,
        *c.given[lanes].all,
        policy=policies,
        policy_index=None if index is None else index[lanes],
        threshold=thresholds[lanes],
        execution=ExecutionOptions(batch_invariant=batch_invariant),
        record_scores=True,
    )


def same(some: ForwardOutput, everybody: ForwardOutput, lanes: Tensor) -> bool:
    return (
        torch.equal(some.exit_layer, everybody.exit_layer[lanes])
        and torch.equal(some.prediction, everybody.prediction[lanes])
        and torch.equal(some.scores.nan_to_num(-1), everybody.scores[:, lanes].nan_to_num(-1))
    )


@disturbed
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
@settings(max_examples=3)
@given(lanes=st.permutations(range(BATCH)), n=st.integers(1, BATCH))
def test_a_forward_pass_is_the_same_bits_among_any_mates(kind, config, lanes, n) -> None:
    everybody = run(kind, config, torch.arange(BATCH))
    assert len(everybody.exit_layer.unique()) >= 3
    assert same(run(kind, config, torch.tensor(lanes[:n])), everybody, torch.tensor(lanes[:n]))


@pytest.mark.parametrize(
    ("products", "kind", "config"),
    [  # the official UEM is blind to time, and this U-ViT does not embed it; adaLN's heads no convolution
        ("all", "uvit", PAPER),
        ("all", "uvit", OFFICIAL),
        ("all", "adaln", PAPER),
        ("per sample", "uvit", PAPER),
        ("per sample", "adaln", PAPER),
        ("heads", "uvit", PAPER),
        ("heads", "uvit", OFFICIAL),
    ],
    indirect=["products"],
)
@pytest.mark.usefixtures("products")
def test_without_the_mode_a_forward_pass_is_not(kind, config) -> None:
    """The comparison fails where products are not the same in any batch, so it can fail."""
    lanes = torch.arange(6)
    mode = {"batch_invariant": False, "policy": Replay()}
    assert not same(run(kind, config, lanes, **mode), run(kind, config, torch.arange(BATCH), **mode), lanes)


@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_the_mode_changes_rounding_only(kind, config) -> None:
    c, lanes = case(kind, config, torch.float32), torch.arange(BATCH)
    for policy in (Replay(), Full()):
        threshold = None if policy == Full() else lanes % c.num_layers + 1.0
        given = {"policy": policy, "threshold": threshold, "record_scores": True}
        usual, invariant = (
            forward(c, *c.given.all, **given, execution=ExecutionOptions(batch_invariant=mode))
            for mode in (False, True)
        )
        assert torch.equal(invariant.exit_layer, usual.exit_layer)
        assert (invariant.macs, invariant.macs_full) == (usual.macs, usual.macs_full)
        assert invariant.rows_moved == usual.rows_moved
        torch.testing.assert_close(invariant.prediction, usual.prediction, rtol=0, atol=2e-5)
        torch.testing.assert_close(invariant.scores, usual.scores, rtol=0, atol=5e-6, equal_nan=True)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic between two forward passes, too, is off by how many samples it is done for."""
    step, first, draw, guide = batch.solver_step, batch.initial_noise, Noise.draw, reference.guide
    monkeypatch.setattr(
        batch, "solver_step", lambda state, eps, *rest, **z: step(state, eps * off(len(eps)), *rest, **z)
    )
    monkeypatch.setattr(batch, "initial_noise", lambda seeds, *rest: first(seeds, *rest) * off(len(seeds)))
    monkeypatch.setattr(Noise, "draw", lambda self, *rest: draw(self, *rest) * off(len(self.seeds)))
    monkeypatch.setattr(reference, "guide", lambda cond, *rest: guide(cond, *rest) * off(len(cond)))


@pytest.fixture
def threads() -> Iterator[None]:
    """Two threads, where tests have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_threads_change_no_bit(kind, config, request) -> None:
    for setting in (torch.no_grad(), torch.inference_mode()):
        with setting:
            torch.set_num_threads(1)
            alone = run(kind, config, torch.arange(BATCH))
            request.getfixturevalue("threads")
            torch.set_num_threads(2)
            assert same(run(kind, config, torch.arange(BATCH)), alone, torch.arange(BATCH))


@pytest.mark.usefixtures("threads")
def test_lanes_run_beside_each_other_on_threads_of_their_own() -> None:
    both, before = threading.Barrier(2, timeout=20), torch.get_num_threads()

    def work(lane: int) -> tuple[int, int, bool]:
        if lane < 2:
            both.wait()  # passed only if another lane runs
        return lane, torch.get_num_threads(), torch.is_grad_enabled()

    assert lane_by_lane(work, 7, torch.device("cpu")) == [(lane, 1, False) for lane in range(7)]
    newcomer = []
    thread = threading.Thread(target=lambda: newcomer.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *newcomer] == [before, before]


@pytest.mark.usefixtures("threads")
def test_a_lane_that_fails_stops_the_others() -> None:
    done = []

    def work(lane: int) -> None:
        done.append(lane)
        if lane == 3:
            raise LookupError("lane 3")
        time.sleep(0.001)

    with pytest.raises(LookupError, match="lane 3"):
        lane_by_lane(work, 1000, torch.device("cpu"))
    assert len(done) < 100
    assert lane_by_lane(lambda lane: lane, 3, torch.device("cpu")) == [0, 1, 2]


def serve(capacity: int, draw: random.Random, batch_invariant: bool = True) -> list[Handle]:
    """All requests in some order, with ticks between their arrivals, and others who come and go at any tick."""
    execution = ExecutionOptions(batch_invariant=batch_invariant)
    engine = Engine(served(), capacity, threaded=False, execution=execution)
    handles: list[Handle | None] = [None] * len(REQUESTS)
    passing: list[Handle] = []
    for i in draw.sample(range(len(REQUESTS)), len(REQUESTS)):
        if REQUESTS[i].get("guidance_scale") is None or capacity > 1:
            handles[i] = engine.submit(**REQUESTS[i], priority=draw.randrange(2))
        if draw.random() < 0.3:
            passing.append(engine.submit(seed=draw.randrange(2**31), steps=9, policy="exit:0.5"))
        for _ in range(draw.randrange(3)):
            engine.step()
        if passing and draw.random() < 0.3:
            passing.pop().cancel()
    for other in passing:
        other.cancel()
    engine.close()
    return handles


def compare(handles: list[Handle], wanted: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """How many requests have the exits, and how many the image, that they have alone."""
    pairs = [(handle, own) for handle, own in zip(handles, wanted, strict=True) if handle is not None]
    assert pairs
    exits = sum(torch.equal(handle.report.exit_layer[:, 0], own[1]) for handle, own in pairs)
    return exits, sum(torch.equal(handle.result(0), own[0]) for handle, own in pairs)


def the_same_bits_in_any_company() -> None:
    wanted = [alone(request) for request in REQUESTS]
    assert len(torch.cat([exit_layer for _, exit_layer in wanted]).unique()) == 6  # none, and all five
    for capacity, seed in ((1, 0), (3, 1), (64, 2)):
        handles = serve(capacity, random.Random(seed))
        n = sum(handle is not None for handle in handles)
        assert n == len(REQUESTS) or capacity == 1
        assert compare(handles, wanted) == (n, n)


@disturbed
@pytest.mark.usefixtures("products")
def test_requests_are_the_same_bits_in_any_company() -> None:
    the_same_bits_in_any_company()


@pytest.mark.usefixtures("steps")
def test_requests_are_the_same_bits_whatever_is_done_between_forward_passes() -> None:
    the_same_bits_in_any_company()


@disturbed
@pytest.mark.usefixtures("products")
def test_without_the_mode_requests_are_not() -> None:
    wanted = [alone(request, batch_invariant=False) for request in REQUESTS]
    _, images = compare(serve(64, random.Random(3), batch_invariant=False), wanted)
    assert images < len(REQUESTS) / 2


def test_one_among_sixty_three_others() -> None:
    engine = Engine(served(), 128, threaded=False, execution=ExecutionOptions(batch_invariant=True))
    crowd = requests(63, seed=33)
    others = [engine.submit(**request) for request in crowd[:40]]
    mine = {"seed": 5, "steps": 5, "solver": "dpm++2m", "policy": "exit:patience=0.6"}
    mine |= {"class_labels": 1, "guidance_scale": 2.0}
    handle = engine.submit(**mine)
    others += [engine.submit(**request) for request in crowd[40:]]
    engine.step()
    assert engine.report.running == 64 - sum(other.done() for other in others)
    engine.close()
    image, exit_layer = alone(mine)
    assert torch.equal(handle.result(0), image)
    assert torch.equal(handle.report.exit_layer[:, 0], exit_layer)


def test_a_run_of_many_samples_is_the_same_bits_in_any_batch() -> None:
    execution = ExecutionOptions(batch_invariant=True)
    settings = {
        "steps": [3, 1, 4, 2, 5],
        "solver": "dpm++2m",
        "policy": "exit:0.5",
        "seed": [5, 6, 7, 8, 9],
        "class_labels": [0, 1, 2, 0, 1],
        "guidance_scale": [1.0, 2.0, 1.0, 3.0, 1.5],
    }
    whole, report = sample(served(), 5, batch=5, execution=execution, **settings)
    for size in (1, 2, 3):
        images, other = sample(served(), 5, batch=size, execution=execution, **settings)
        assert torch.equal(images, whole)
        assert torch.equal(other.exit_layer, report.exit_layer)
    own = {"seed": 8, "class_labels": 0, "guidance_scale": 3.0, "steps": 2, "solver": "dpm++2m", "policy": "exit:0.5"}
    assert torch.equal(alone(own)[0], whole[3])


@pytest.mark.parametrize("capacity", [2, 3, 64])
def test_without_the_mode_images_are_close_where_nobody_decides_by_rounding(capacity: int) -> None:
    """Promise 2: rounding may turn a decision that is as close as it is, which is rare; all other images are close."""
    wanted = [alone(request, batch_invariant=False) for request in REQUESTS]
    handles = serve(capacity, random.Random(capacity), batch_invariant=False)
    turned = 0
    for handle, (image, exit_layer), request in zip(handles, wanted, REQUESTS, strict=True):
        if torch.equal(handle.report.exit_layer[:, 0], exit_layer):
            torch.testing.assert_close(handle.result(0), image, rtol=1e-3, atol=1e-3 * float(image.abs().max()))
        else:
            assert request["policy"].startswith(("exit:0.", "exit:patience"))
            turned += 1
    assert turned <= 2
