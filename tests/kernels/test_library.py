"""What the operators declare is true, eager calls know nothing of it, and what does not fit is refused."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from adadiff_kernels import (
    DeviceSet,
    Score,
    SolverState,
    StepRows,
    join_skip,
    residual_uem,
    settle_rows,
    solver_step,
)
from operators import CASES, DEVICE, B, Step, normal, serves, some_lanes

OPS = torch.ops.adadiff_kernels


def fused(n: int, T: int, D: int, P: int, out: bool, parts: str, backend: str) -> tuple:
    x, branch = normal(n, T, D), normal(n, T, D)
    score = (normal(P, D), normal(B, P), T - 1) if "score" in parts else (None, None, 0)
    tickets = torch.zeros(B, dtype=torch.int32, device=DEVICE) if "tickets" in parts else None
    affine = (normal(D), normal(D)) if "affine" in parts else (None, None)
    modulated = (normal(B, D), normal(B, D)) if "modulated" in parts else (None, None)
    gate, bias = (normal(B, D), normal(D)) if "gate" in parts else (None, None)
    norm = (1e-6 if "norm" in parts else None, *affine, *modulated)
    norms = normal(n, T, D) if "beside" in parts else None
    return (x, branch, *[normal(n, T, D), norms] * out, some_lanes(n), gate, bias, *score, tickets, *norm, backend)


@pytest.mark.parametrize(
    ("shape", "out", "parts", "backend"),
    [
        pytest.param((3, 5, 12, 2), False, "gate score modulated norm", "reference", id="all of it in PyTorch"),
        pytest.param((3, 5, 12, 2), True, "gate score modulated norm", "reference", id="in place in PyTorch"),
        pytest.param((3, 5, 12, 2), True, "gate score affine norm beside", "reference", id="norms in place in PyTorch"),
        pytest.param((0, 5, 12, 2), False, "gate score affine norm", "reference", id="no rows"),
        pytest.param((1, 1, 1, 1), True, "", "reference", id="the sum alone, of one number"),
        pytest.param((3, 5, 12, 1), False, "score affine norm", "cpu", id="core"),
        pytest.param((2, 3, 12, 2), False, "gate score affine modulated norm", "triton", id="all of it in Triton"),
        pytest.param((2, 3, 12, 1), True, "score tickets norm", "triton", id="in place in Triton"),
        pytest.param((2, 3, 12, 1), True, "score affine norm beside", "triton", id="norms in place in Triton"),
        pytest.param((0, 3, 12, 1), True, "score norm", "triton", id="no rows in Triton"),
    ],
)
def test_the_fused_pass_is_what_it_declares(shape: tuple, out: bool, parts: str, backend: str) -> None:
    operator = OPS.residual_uem_out if out else OPS.residual_uem
    opcheck(operator.default, fused(*shape, out, parts, serves(backend)))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_moves_are_what_they_declare(backend: str) -> None:
    moves = torch.tensor([[0, 4, 2], [1, 6, -1], [-1, -1, -1]], dtype=torch.int32, device=DEVICE)
    opcheck(OPS.settle_rows.default, (moves, normal(3, 2, 5), normal(B, 2, 5), None, serves(backend)))
    opcheck(OPS.settle_rows.default, (moves, normal(3, 2, 5), normal(B, 2, 5), normal(3, 2, 5), backend))
    wide, integers = normal(6, 3, 8)[:, 1:2], torch.arange(6, dtype=torch.int16, device=DEVICE)  # wide: rows lie apart
    opcheck(OPS.settle_rows.default, (moves, wide, normal(B, 1, 8), None, backend))
    opcheck(OPS.settle_rows.default, (moves, integers, torch.zeros(B, dtype=torch.int16, device=DEVICE), None, backend))
    if backend == "cpu":
        return
    x, skip, index = normal(3, 2, 5), normal(B, 2, 5), torch.randperm(B, device=DEVICE)
    for lanes, own in ((some_lanes(3), index), (None, None)):
        opcheck(OPS.join_skip.default, (x, skip, lanes, own, backend))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_step_is_what_it_declares(backend: str) -> None:
    opcheck(OPS.solver_step.default, Step(3).flat(serves(backend)))
    x, eps, coefficients, all_of_them = normal(2, 3), normal(2, 3), normal(2, 9), torch.ones(2, device=DEVICE) > 0
    bare = (x, None, None, eps, coefficients, ~all_of_them, all_of_them, False, 0, False, False)
    bare = (*bare, *(None,) * 9, 0, backend)
    opcheck(OPS.solver_step.default, bare)


def test_the_steps_of_a_set_are_what_they_declare() -> None:
    active = DeviceSet(B, DEVICE, backend="reference")
    own = (active.row_to_lane, active.lane_to_row, active.exit_layer, active._state)
    opcheck(OPS.start_device_set.default, (*own, B - 2, None))
    partner, snapshot = torch.arange(B).int().to(DEVICE), torch.zeros(B, dtype=torch.int32, device=DEVICE)
    u, threshold, mask = torch.rand(B).to(DEVICE), torch.rand(B).to(DEVICE), torch.arange(B).to(DEVICE) > 1
    opcheck(OPS.exit_rows.default, (*own, u, threshold, None, partner, snapshot, B, 1, None))
    opcheck(OPS.exit_rows.default, (*own, None, None, mask, None, None, B, 1, None))


class Dispatched(TorchDispatchMode):
    """Notes whose operators pass."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_eager_calls_pass_the_dispatcher_by(case: Callable) -> None:
    call, given = case(3, None)
    with Dispatched() as dispatched:
        call(*given)
    assert dispatched.namespaces == {"aten"}


@pytest.mark.parametrize("case", CASES)
def test_tensors_without_values_get_the_same_results(case: Callable) -> None:
    """FakeTensor is the only mode here: no compiler says that it traces."""
    call, given = case(3, None)
    mode = FakeTensorMode()
    fakes = tree_map_only(Tensor, mode.from_tensor, given)
    with mode:
        made = call(*fakes)
    for fake, real in zip(made, call(*given), strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_what_is_recorded_of_real_tensors_is_the_operator() -> None:
    def call(x: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        own, saved = x + 1, x * 0
        settle_rows(moves, own, saved)
        return own, saved

    moves = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=DEVICE)
    graph = make_fx(call)(normal(3, 4), moves)
    x = normal(3, 4)
    assert OPS.settle_rows.default in {node.target for node in graph.graph.nodes}
    own, saved = graph(x, moves)
    assert torch.equal(own, (x + 1)[[2, 1, 2]])
    assert torch.equal(saved, torch.stack([x[0] * 0, x[0] + 1, x[0] * 0]))


def step_without_noise(x: Tensor) -> None:
    none = torch.zeros(2, dtype=torch.bool, device=DEVICE)
    solver_step(SolverState(x), x, StepRows(normal(2, 9), none, ~none, history=0, inner=False))


def ticketed(x: Tensor) -> Score:
    return Score(x[0, :1], x[:, 0, :1], 0, LANES[:1])


LANES = torch.zeros(2, dtype=torch.int32, device=DEVICE)
REFUSED = [
    (r"bias must be \[8\], got \(2,\)", lambda x: residual_uem(x, x, row_to_lane=LANES, bias=LANES)),
    (r"out must be \(2, 3, 8\)", lambda x: residual_uem(x, x, row_to_lane=LANES, out=x[:1])),
    (r"skip must have a row for each of 2 rows", lambda x: join_skip(x, x[:1])),
    (r"moves must be int32 \[k, 3\]", lambda x: settle_rows(LANES, x, x)),
    (r"score.tickets must be int32 of 2 or more", lambda x: residual_uem(x, x, row_to_lane=LANES, score=ticketed(x))),
    ("rows and saved must be", lambda x: settle_rows(LANES.new_zeros(1, 3), x, x[:, :1])),
    ("a row adds noise, but z is None", step_without_noise),
]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_what_does_not_fit_is_refused(message: str, call: Callable[[Tensor], None], traced: bool) -> None:
    x = normal(2, 3, 8)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) if traced else nullcontext(),
        pytest.raises(ValueError, match=message),
    ):
        call(torch.empty(2, 3, 8, device=DEVICE) if traced else x)
