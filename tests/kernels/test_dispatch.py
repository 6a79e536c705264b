"""Which implementation serves, and what is said where a choice cannot be honoured."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from adadiff_kernels import Norm, Score, extension, join_skip, launch, residual_uem, uem_score

X, LANES = torch.zeros(2, 3, 8), torch.zeros(2, dtype=torch.int32)
SOURCES = (Path(__file__).parents[2], Path(__file__).parents[2] / "python")
SCORE = Score(torch.zeros(1, 8), torch.zeros(2, 1), 0)


def run(backend: str | None, score: Score | None = SCORE) -> None:
    residual_uem(X, X, row_to_lane=LANES, score=score, backend=backend)


def test_a_name_nobody_has_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"backend must be one of \('reference', 'cpu', 'triton'\) or None, got 'cuda'"
    ):
        run("cuda")


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, r"pip install 'adadiff_kernels\[gpu\]'"), ("3.5.1", "3.6 or newer is needed, got 3.5.1")],
)
def test_triton_missing_or_old_is_said(monkeypatch, version: str | None, message: str) -> None:
    monkeypatch.setitem(sys.modules, "triton", None if version is None else SimpleNamespace(__version__=version))
    launch.triton_missing.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=message):
            run("triton")
        run(None)
    finally:
        launch.triton_missing.cache_clear()


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0+git12ab34cd", "4.0rc1"])
def test_versions_of_any_spelling_serve(monkeypatch, version: str) -> None:
    """NVIDIA's images and nightly builds call the distribution pytorch-triton: what counts is the module."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert launch.triton_missing.__wrapped__() is None


WITHOUT = """
import sys, torch
sys.modules["triton"] = None  # as if it were not there
import adadiff, adadiff_kernels
model = adadiff.load("digits")
images, _ = adadiff.sample(model, 2, steps=2, policy="exit:0.2", class_labels=[0, 1])
assert images.isfinite().all()
x, lanes = torch.zeros(2, 3, 8), torch.zeros(2, dtype=torch.int32)
try:
    adadiff_kernels.residual_uem(x, x, row_to_lane=lanes, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_a_machine_without_triton_samples_and_says_what_is_missing() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, SOURCES), *sys.path])}
    done = subprocess.run([sys.executable, "-c", WITHOUT], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "backend='triton': Triton is not installed; pip install 'adadiff_kernels[gpu]'\n"


@pytest.mark.parametrize("outputs", [1, 2])
def test_gradients_are_pytorchs(outputs: int) -> None:
    """The core has none, and would return scores that nothing learns from."""
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(outputs, 8, requires_grad=True)
    score = Score(weight, torch.zeros(2, outputs), 0)
    _, _, u = residual_uem(x, X, row_to_lane=LANES, score=score)
    wanted = torch.autograd.grad(torch.sigmoid(x @ weight.T).mean((1, 2)).sum(), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(u.sum(), (x, weight)), wanted)
    for given in (uem_score(x, score, LANES), uem_score(X, score, LANES)):
        assert given.requires_grad
    with torch.no_grad():
        assert not residual_uem(x, X, row_to_lane=LANES, score=score)[2].requires_grad


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_without_gradients_refuse_to_lose_them(backend: str) -> None:
    x = torch.zeros(2, 3, 8, requires_grad=True)
    weight = Score(torch.zeros(1, 8, requires_grad=True), SCORE.offset, 0)
    for call in (
        lambda: residual_uem(x, X, row_to_lane=LANES, backend=backend),
        lambda: residual_uem(X, X, row_to_lane=LANES, score=weight, backend=backend),
        lambda: residual_uem(X, X, row_to_lane=LANES, norm=Norm(1e-6, x[0, 0], x[0, 1]), backend=backend),
        lambda: join_skip(X, x, backend=backend),
    ):
        with pytest.raises(RuntimeError, match=f"backend='{backend}' has no gradients; use 'reference'"):
            call()


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="needs tensors on a CUDA device, got cpu"):
        run("triton")


def test_the_core_is_asked_only_for_what_it_has(monkeypatch) -> None:
    pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    run("cpu")
    with pytest.raises(RuntimeError, match=r"one output per token .* got 2 of torch.float32"):
        run("cpu", Score(torch.zeros(2, 8), torch.zeros(2, 2), 0))
    with pytest.raises(RuntimeError, match="does not have this operator"):
        join_skip(X, X, backend="cpu")
    monkeypatch.setattr(extension, "core", None)
    with pytest.raises(RuntimeError, match="the extension is not built"):
        run("cpu")


def test_the_core_needs_tensors_of_the_cpu() -> None:
    pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    x = X.to("meta")
    with pytest.raises(RuntimeError, match="needs tensors on the CPU, got meta"):
        residual_uem(x, x, row_to_lane=LANES.to("meta"), backend="cpu")


def test_kernels_are_launched_where_their_tensors_lie(monkeypatch) -> None:
    """Triton takes the thread's current device, which is 0 in every new thread."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: f"entered {device}")
    there = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in (0, 1)]
    assert isinstance(launch.on_device_of(there[0]), nullcontext)
    assert launch.on_device_of(there[1]) == "entered cuda:1"
    assert isinstance(launch.on_device_of(X), nullcontext)


def test_importing_does_not_import_triton() -> None:
    code = (
        "import sys, adadiff_kernels; assert not {'triton', 'adadiff_kernels.residual_uem.kernel'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_bias_joins_the_branch() -> None:
    """One rounding: in bfloat16, 256 + 1 + 1 passes through 257, which is not a bfloat16."""
    one = torch.ones(8, dtype=torch.bfloat16)
    x, branch = (torch.full((2, 3, 8), value, dtype=torch.bfloat16) for value in (1, 256))
    y, _, _ = residual_uem(x, branch, row_to_lane=LANES, bias=one)
    assert bool((y == 258).all())
    mixed, _, _ = residual_uem(x.float(), branch, row_to_lane=LANES, bias=one)
    assert mixed.dtype == torch.float32
    assert bool((mixed == 258).all())
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \(3,\)"):
        residual_uem(X, X, row_to_lane=LANES, bias=one[:3])


def test_one_graph_joins_any_number_of_rows() -> None:
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    join = torch.compile(join_skip, backend=backend, dynamic=True, fullgraph=True)
    skip, index = torch.randn(7, 3, 8), torch.arange(7, dtype=torch.int32).flip(0)
    for n in (6, 5, 3, 2):
        x, lanes = torch.randn(n, 3, 8), torch.arange(n, dtype=torch.int32)
        assert torch.equal(join(x, skip, lanes, index), torch.cat([x, skip.flip(0)[:n]], -1))
    assert backend.frame_count == 1
