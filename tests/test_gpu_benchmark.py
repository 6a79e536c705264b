"""The GPU suites without a GPU: every suite at tiny sizes, kernels interpreted, and what becomes of their rows."""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, rows
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import session as gpu_session
from benchmarks.gpu import small as gpu_small
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu import tail_launch as gpu_tail_launch
from benchmarks.gpu import traces as gpu_traces
from benchmarks.gpu.session import Session, Task
from benchmarks.report import tables
from pretend import DEVICE, PretendDevice
from recorder import recorded

CPU = torch.device("cpu")
GPU = {"gpu": "a GPU", "gpu_gib": 1.0}


class Kept(Session):
    """A dry run whose rows are kept, as if a device had measured them."""

    dry = True

    def __post_init__(self) -> None:
        pass


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setattr(gpu_session, "gpu_state", dict)
    return Kept(CPU, rows.Rows(tmp_path, GPU, "a commit"))


def run_suite(kept: Kept, name: str) -> list[rows.Row]:
    if name == "passes":
        pytest.importorskip("triton")
    gpu_run.run_suite(kept, gpu_run.SUITES[name])
    written = rows.read(kept.rows.path)
    assert written
    assert all(row["suite"] == f"gpu-{name}" and row["machine"]["gpu"] == "a GPU" for row in written)
    assert sum(row["last"] for row in written) == len({(row["kind"], repr(row["parameters"])) for row in written})
    return written


def shown(written: list[rows.Row]) -> list[tables.Table]:
    found = gpu_tables.all_tables(written)
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


@pytest.mark.slow
def test_passes(kept: Kept) -> None:
    written = run_suite(kept, "passes")
    single = [row for row in written if row["parameters"]["outputs"] == 1]
    assert {row["variant"] for row in single} == {"fused", "fused, no score", "eager", "compiled"}
    tiles = {"fused, tiles of 16", "fused, tiles of 32"}
    assert {row["variant"] for row in written} == {"fused", "fused, no score", "eager", "compiled", *tiles}
    by_way = {row["variant"]: row for row in single[:4]}
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
    assert len(table.body) == len(single) / 4 + sum(row["variant"] in tiles for row in written) / 2
    assert [line[5] != "" for line in table.body] == ["P = 1," not in line[0] for line in table.body]


@pytest.mark.parametrize(
    ("batch", "outputs", "share", "added", "of_copy", "adds"),
    [
        (64, 1, 0.89, 0.031, "89%", "+3.1% *"),
        (64, 16, 0.87, 0.031, "87% *", "+3.1%"),
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
    (table,) = gpu_tables.passes([row])
    assert table.body[0][3:5] == (of_copy, adds)


def test_a_pass_that_is_wrong_is_not_measured(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    right = gpu_run.passes.residual_uem

    def wrong(*given: object, **named: object) -> tuple[torch.Tensor | None, ...]:
        y, h, u = right(*given, **named)
        return y, h, None if u is None else u + 0.1

    monkeypatch.setattr(gpu_run.passes, "residual_uem", wrong)
    with pytest.raises(RuntimeError, match=r"u of fused .* is off by"):
        gpu_run.run_suite(kept, gpu_run.passes)
    assert not kept.rows.rows


def test_attention(kept: Kept) -> None:
    written = run_suite(kept, "attention")
    assert {row["parameters"]["rows"] for row in written} == {1, 2}
    assert "default" in {row["variant"] for row in written}
    for row in written:
        n = row["parameters"]["rows"]
        assert row["tflops"] == pytest.approx(4 * n * 2 * 5 * 5 * 8 / row["seconds"]["median"] / 1e12)
        assert row["first_seconds"] > 0 < row["host_seconds"]
    (table,) = shown(written)
    assert len(table.body) == len(written)


def test_mlp(kept: Kept) -> None:
    written = run_suite(kept, "mlp")
    assert [row["variant"] for row in written] == [
        "GELU apart",
        "GELU compiled",
        "sum by the pass",
        "sum by the product",
    ] * 2  # networks; on a CPU no product has the tanh GELU as its epilogue
    for row in written:
        macs = (4 if row["variant"].startswith("GELU") else 8) * 2 * 5 * 16 * 16
        assert row["tflops"] == pytest.approx(2 * macs / row["seconds"]["median"] / 1e12)
    (table,) = shown(written)
    assert len(table.body) == len(written)


def test_decision(kept: Kept) -> None:
    written = run_suite(kept, "decision")
    assert {row["kind"] for row in written} == {"decision"}  # there is no device to launch graphs
    assert {row["parameters"]["exiting"] for row in written} == {"nobody", "every other"}
    (table,) = shown(written)
    assert [line[0] for line in table.body] == [row["variant"] for row in written[:5]]


def test_a_decision_that_counts_wrong_is_not_measured(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    from adadiff_kernels import DeviceSet

    monkeypatch.setattr(DeviceSet, "wait", lambda self, layer: 1)
    with pytest.raises(RuntimeError, match="known to the host counts 1 remaining rows, expected 3; not measured"):
        gpu_run.run_suite(kept, gpu_run.SUITES["decision"])


def test_tail_launches_are_shown() -> None:
    row = {
        "suite": "gpu-decision",
        "kind": "tail launch",
        "parameters": {},
        "usable": True,
        "machine": {"gpu": "a GPU"},
        "versions": {"torch": "2.11"},
        "launches": 100,
        "accepts": {"product": "yes", "GELU": "cudaErrorNotSupported"},
    }
    rows_ = [{**row, "variant": name, "seconds": {"median": s}} for name, s in (("1", 10e-6), ("100", 307e-6))]
    (table,) = gpu_tables.decision(rows_)
    assert table.body == [("one launch, µs", "3.00"), ("product", "yes"), ("GELU", "cudaErrorNotSupported")]


def test_serving(kept: Kept) -> None:
    written = run_suite(kept, "serving")
    names = ["continuous, plain", "continuous, plain, compiled", "ours, sync", "ours, lagged"]
    assert [row["variant"] for row in written] == names
    for row in written:
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"]["median"] / 50)
        assert row["fastest_plain"] in names[:2]
    (table,) = shown(written)
    assert [line[0] for line in table.body] == names


def test_a_trace_is_written_whole(tmp_path: Path) -> None:
    session = Session(CPU)
    text = gpu_traces.trace(session, gpu_traces.forward_pass(session, 2), tmp_path / "trace-2.json.gz")
    assert "aten::addmm" in text
    (found,) = tmp_path.iterdir()
    with gzip.open(found) as file:
        assert json.load(file)["traceEvents"]


def test_network(kept: Kept) -> None:
    written = run_suite(kept, "network")
    by_name = {row["variant"]: row for row in written}
    assert [name for name in by_name if name.startswith("plain")] == list(by_name)[:4]
    for strategy in gpu_run.network.strategies(kept):
        blocks = {"nobody": 65, "same": 35, "spread": 3 + 6 + 8 + 10 + 13, "two-phase": 3 * 2 + 2 * 13}
        for pattern, number in blocks.items():
            row = by_name[f"{pattern}, {strategy}"]
            assert (row["blocks"], row["blocks_full"]) == (number, 65)
            assert row["rows_run"] == number if strategy == "sync" else number <= row["rows_run"] <= 65
            assert row["tflops"] == pytest.approx(2 * row["macs"] / row["seconds"]["median"] / 1e12)
            ideal = row["macs_full"] / row["macs"]
            assert row["share_of_flop_ideal"] == pytest.approx(row["speedup"] / ideal)
    assert shown(written)
    page = gpu_tables.network_side_by_side([{**row, "parameters": {"preset": "p", "batch": 8}} for row in written])
    assert [line[0] for line in page[0].body] == ["p, nobody", "p, same", "p, spread", "p, two-phase"]


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpu_run.main(["--suite", "ceilings", "--dry", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_interleaving_takes_another_timer() -> None:
    seconds = {"a": 1.0, "b": 2.0}
    measured = harness.interleave({name: (lambda name=name: name) for name in seconds}, 3, timer=lambda c: seconds[c()])
    assert measured.ratio("b", "a").samples == (2.0,) * 3


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["network", "serving", "attention", "mlp", "decision"])
def test_suites_mix_no_devices(suite: str, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended device what would raise on a GPU raises: an index, a table or an input left on the CPU."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # its tensors cannot change in place
    try:
        with PretendDevice(), recorded(monkeypatch) as graphs:
            gpu_run.run_suite(Kept(DEVICE, kept.rows, presets=("dit_xl_2_256",)), gpu_run.SUITES[suite])
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert {row["suite"] for row in rows.read(kept.rows.path)} == {f"gpu-{suite}"}
    assert bool(graphs.captures) == (suite in ("network", "serving"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_one_line_says_so() -> None:
    with pytest.raises(SystemExit, match=r"^gpu-bench: PyTorch finds no CUDA device here[^\n]*$"):
        gpu_run.main([])


def test_why_there_is_no_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    words = f"torch {torch.__version__} is built without CUDA"
    assert gpu_session.no_device() == f"PyTorch finds no CUDA device here ({words})"
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update.")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert gpu_session.no_device() == (
        "PyTorch finds no CUDA device here (The NVIDIA driver on your system is too old (found version 11040).)"
    )
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert gpu_session.no_device().endswith(f"(torch {torch.__version__} is built for CUDA 13.0)")


def test_what_needs_more_memory_than_there_is_costs_the_others_nothing(tmp_path: Path, capsys) -> None:
    ran = []

    def measure(size: int) -> None:
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96 GiB\nmore")
        ran.append(size)

    tasks = [Task("copy", {"n": n}, lambda n=n: measure(n)) for n in (1, 2, 1)]
    suite = SimpleNamespace(SUITE="gpu-ceilings", tasks=lambda session: tasks)
    assert gpu_run.run_suite(Session(CPU), suite) == 1
    assert ran == [1, 1]
    assert "out of memory: CUDA out of memory. Tried to allocate 96 GiB\n" in capsys.readouterr().err


def test_the_small_run_agrees_with_its_references() -> None:
    pytest.importorskip("triton")

    assert gpu_small.run(CPU) == ["residual_uem", "join_skip", "settle_rows", "solver_step", "DeviceSet"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_graphs_that_launch_themselves_compile(tmp_path: Path) -> None:
    assert gpu_tail_launch.compile_library(tmp_path, "sm_90").stat().st_size > 0


def test_why_there_are_no_tail_launches_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tail_launch.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="there is no nvcc"):
        gpu_tail_launch.compile_library(tmp_path)
