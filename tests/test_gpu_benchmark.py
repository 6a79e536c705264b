"""The GPU suites without a GPU: every suite at tiny sizes, kernels interpreted, and what becomes of their rows."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# ruff: noqa: E402  (scripts, which import each other by bare names)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu.check
import gpu.conditional
import gpu.run
import gpu.session
import gpu.tables
import harness
import rows
import tables
from gpu.session import Session

CPU = torch.device("cpu")
GPU = {"gpu": "a GPU", "gpu_gib": 1.0}


class Kept(Session):
    """A dry run whose rows are kept, as if a device had measured them."""

    dry = True

    def __post_init__(self) -> None:
        pass


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setattr(gpu.session, "gpu_state", dict)
    return Kept(CPU, rows.Rows(tmp_path, GPU, "a commit"))


def run_suite(kept: Kept, name: str) -> list[rows.Row]:
    needed = {"passes": ["triton"], "gemm": ["triton"], "decision": ["triton", "adadiff_kernels.device_set"]}
    for module in needed.get(name, []):
        pytest.importorskip(module)
    gpu.run.run_suite(kept, gpu.run.SUITES[name])
    written = rows.read(kept.rows.path)
    assert written
    assert all(row["suite"] == f"gpu-{name}" and row["machine"]["gpu"] == "a GPU" for row in written)
    assert sum(row["last"] for row in written) == len({(row["kind"], repr(row["parameters"])) for row in written})
    return written


def shown(written: list[rows.Row]) -> list[tables.Table]:
    found = gpu.tables.all_tables(written)
    for table in found:
        assert all(len(line) == len(table.header) for line in table.body)
        assert all(isinstance(cell, str) for line in table.body for cell in line)
        assert tables.plain(table)
        assert tables.markdown(table)
    assert [table.title for table in tables.all_tables(written)] == [table.title for table in found]
    return found


def test_ceilings(kept: Kept) -> None:
    copy, product = run_suite(kept, "ceilings")
    assert copy["gb_per_second"] == pytest.approx(2 * 4096 / copy["seconds"]["median"] / 1e9)
    assert product["tflops"] == pytest.approx(2 * 64**3 / product["seconds"]["median"] / 1e12)
    (table,) = shown([copy, product])
    assert [line[0] for line in table.body] == ["copy", "product"]


def test_passes(kept: Kept) -> None:
    written = run_suite(kept, "passes")
    assert {row["variant"] for row in written} == {"fused", "fused, no score", "eager", "compiled"}
    by_way = {row["variant"]: row for row in written[:4]}
    by_rows = {row["parameters"]["rows"]: row for row in written if row["parameters"]["shape"] == "tiny"}
    assert {rows: row["dtype"] for rows, row in by_rows.items()} == {
        "bfloat16": "bfloat16",
        "float32 beside bfloat16": "float32",
    }
    for row in [*by_way.values(), *by_rows.values()]:
        moved = 2 * 2 * 5 * 32 * (2 + (4 if row["dtype"] == "float32" else 2))
        assert row["gb_per_second"] == pytest.approx(moved * row["sets"] / row["seconds"]["median"] / 1e9)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_second"] / row["copy_gb_per_second"])
    assert by_way["fused, no score"]["over_no_score"] == 1
    (table,) = shown(written)
    assert len(table.body) == len(written) / 4


@pytest.mark.parametrize(
    ("batch", "outputs", "share", "added", "of_copy", "adds"),
    [
        (64, 1, 0.89, 0.031, "89%", "+3.1% *"),
        (64, 16, 0.87, 0.029, "87% *", "+2.9%"),
        (256, 64, 0.95, 0.099, "95%", "+9.9%"),
        (64, 64, 0.95, 0.101, "95%", "+10.1% *"),
        (8, 1, 0.5, 0.5, "50%", "+50.0%"),
    ],
)
def test_what_misses_its_number_is_marked(batch, outputs, share, added, of_copy, adds) -> None:
    row = {
        "suite": "gpu-passes",
        "kind": "pass",
        "variant": "fused",
        "usable": True,
        "parameters": {"shape": "S", "rows": "bfloat16", "batch": batch, "outputs": outputs},
        "machine": {"gpu": "a GPU"},
        "versions": {"torch": "2.11"},
        "gb_per_second": 1.0,
        "share_of_copy": share,
        "over_no_score": 1 + added,
    }
    (table,) = gpu.tables.passes([row])
    assert table.body[0][3:5] == (of_copy, adds)


def test_a_pass_that_is_wrong_is_not_measured(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    right = gpu.run.passes.residual_uem

    def wrong(*given: object, **named: object) -> tuple[torch.Tensor | None, ...]:
        y, h, u = right(*given, **named)
        return y, h, None if u is None else u + 0.1

    monkeypatch.setattr(gpu.run.passes, "residual_uem", wrong)
    with pytest.raises(RuntimeError, match=r"u of fused .* is off by"):
        gpu.run.run_suite(kept, gpu.run.passes)
    assert not kept.rows.rows


def test_decision(kept: Kept) -> None:
    written = run_suite(kept, "decision")
    assert {row["kind"] for row in written} == {"decision", "layer"}
    assert {row["variant"] for row in written if row["kind"] == "layer"} == {"eager", "graph", "graph, decided"}
    assert len(shown(written)) == 2


def test_gemm(kept: Kept) -> None:
    if pytest.importorskip("triton").__version__.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 takes no loop bound from memory beside this NumPy")
    written = run_suite(kept, "gemm")
    for row in written:
        if row["variant"].startswith("persistent"):  # one tile size for any number of rows
            assert row["same_bits_at"] == [1, 3]
            assert row["same_bits_last"]
        macs = row["parameters"]["samples"] * 5 * 32 * 48
        assert row["tflops"] == pytest.approx(2 * macs / row["seconds"]["median"] / 1e12)
    (table,) = shown(written)
    assert [line[0] for line in table.body] == ["tiny, cuBLAS", "tiny, grouped_mm", "tiny, persistent, 32 x 16"]


@pytest.mark.parametrize("M", [0, 1, 33, 208])  # 208: thirteen tiles down, eight of one band and five of the next
def test_a_product_of_as_many_rows_as_the_device_says(M: int) -> None:
    if pytest.importorskip("triton").__version__.startswith("3.6."):
        pytest.skip("see test_gemm")
    from gpu.kernels import Product

    a, w = torch.randn(208, 32).bfloat16(), torch.randn(40, 32).bfloat16()
    out = Product(a, w, torch.tensor([M], dtype=torch.int32), (16, 16, 16), programs=3)()
    torch.testing.assert_close(out[:M], (a[:M].float() @ w.float().T).bfloat16(), rtol=2**-7, atol=1e-5)
    assert out[M:].isnan().all()  # as they were allocated


def test_network(kept: Kept) -> None:
    written = run_suite(kept, "network")
    by_name = {row["variant"]: row for row in written}
    assert [name for name in by_name if name.startswith("plain")] == list(by_name)[:3]
    for strategy in gpu.run.network.STRATEGIES:
        blocks = {"nobody": 65, "same": 35, "spread": 3 + 6 + 8 + 10 + 13, "two-phase": 3 * 2 + 2 * 13}
        for pattern, number in blocks.items():
            row = by_name[f"{pattern}, {strategy}"]
            assert (row["blocks"], row["blocks_full"]) == (number, 65)
            assert row["rows_run"] == number if strategy == "sync" else number <= row["rows_run"] <= 65
            assert row["tflops"] == pytest.approx(2 * row["macs"] / row["seconds"]["median"] / 1e12)
            ideal = row["macs_full"] / row["macs"]
            assert row["share_of_flop_ideal"] == pytest.approx(row["speedup"] / ideal)
    assert shown(written)
    page = gpu.tables.network_side_by_side([{**row, "parameters": {"preset": "p", "batch": 8}} for row in written])
    assert [line[0] for line in page[0].body] == ["p, nobody", "p, same", "p, spread", "p, two-phase"]


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpu.run.main(["--suite", "ceilings", "--dry", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_interleaving_takes_another_timer() -> None:
    seconds = {"a": 1.0, "b": 2.0}
    measured = harness.interleave({name: (lambda name=name: name) for name in seconds}, 3, timer=lambda c: seconds[c()])
    assert measured.ratio("b", "a").samples == (2.0,) * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("main", "name"), [(gpu.check.main, "gpu-check"), (lambda: gpu.run.main([]), "gpu-bench")])
def test_without_a_device_one_line_says_so(main, name: str) -> None:
    with pytest.raises(SystemExit, match=f"^{name}: PyTorch finds no CUDA device here[^\n]*$"):
        main()


@pytest.mark.parametrize(("cuda", "words"), [(None, "is built without CUDA"), ("13.0", "is built for CUDA 13.0")])
def test_a_build_of_pytorch_that_sees_no_gpu_is_named(monkeypatch: pytest.MonkeyPatch, cuda, words: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert gpu.session.no_device() == f"PyTorch finds no CUDA device here (torch {torch.__version__} {words})"


def test_what_the_build_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.check, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.check.shutil, "which", lambda name, path=None: None)
    check = gpu.check.Check()
    gpu.check.build(check)
    assert check.outcomes["build"] == (
        "left out, missing: setuptools, pybind11, cmake, ninja, a C++ compiler; PyTorch takes the extension's place"
    )
    assert not check.failed


def test_files_with_gpu_tests_are_found() -> None:
    found = gpu.check.marked()
    assert {"tests/gpu/test_engine.py", "tests/gpu/test_kernels.py"} <= set(found)
    assert "tests/sampler/test_cli.py" not in found


@pytest.mark.parametrize(
    ("code", "seconds", "outcome", "failed"),
    [
        ("print('fine')", 60.0, "ok, ", False),
        ("print('bad'); raise SystemExit(3)", 60.0, "FAILED, ", True),
        ("import time; time.sleep(60)", 0.3, "not finished after 0 s", True),
        ("", -1.0, "not run: no time left", True),
    ],
)
def test_a_step_says_what_came_of_it(code: str, seconds: float, outcome: str, failed: bool, capfd) -> None:
    check = gpu.check.Check(limit=seconds)
    done = check.command("step", [sys.executable, "-c", code])
    assert check.outcomes["step"].startswith(outcome)
    assert check.failed is failed
    assert (done is None) == outcome.startswith("not")
    if done is not None:
        assert done.stdout.strip() in capfd.readouterr().out
    check.note("a later one", "ok")
    assert check.failed is failed


@pytest.mark.parametrize(
    ("status", "outcome", "failed"), [(0, "ok", False), (9, "FAILED", True), (1, "left out: the tool does not", False)]
)
def test_a_sanitizer_that_finds_nothing_fails_nothing(monkeypatch, status: int, outcome: str, failed: bool) -> None:
    """Nor does one that cannot work on this machine; what it finds does."""
    check = gpu.check.Check()

    def command(name: str, line: list[str], *_: object, **__: object) -> subprocess.CompletedProcess[str]:
        ended = status if "--tool" in line else 0
        check.note(name, "FAILED" if ended else "ok", ended != 0)
        return subprocess.CompletedProcess(line, ended, "Device not supported\n")

    monkeypatch.setattr(check, "command", command)
    monkeypatch.setattr(gpu.check.shutil, "which", lambda name: name)
    gpu.check.sanitize(check)
    assert check.outcomes["compute-sanitizer memcheck"].startswith(outcome)
    assert check.failed is failed


def test_the_small_run_agrees_with_its_references() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("adadiff_kernels.device_set")
    import gpu.small

    assert len(gpu.small.run(CPU)) == 6


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_graphs_with_if_nodes_compile(tmp_path: Path) -> None:
    assert gpu.conditional.compile_library(tmp_path, "sm_90").stat().st_size > 0


def test_why_there_are_no_if_nodes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.conditional.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="there is no nvcc"):
        gpu.conditional.compile_library(tmp_path)
