"""The suite of caches in transformers of diffusers, at tiny sizes: what its calls run, its rows, tables and page."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")

from adadiff.pipelines.enable import enabled
from benchmarks import __main__ as run
from benchmarks import rows
from benchmarks.baselines import lane_caches
from benchmarks.baselines.lane_caches import BATCH_FULL, BATCH_REUSED, PLAIN, SHARES, Step, at_best, by_sample
from benchmarks.gpu import diffusers as gpu
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu import verdict
from benchmarks.gpu.session import Session
from benchmarks.report import pipelines_section, pipelines_tables, tables
from benchmarks.report.summary import summary
from benchmarks.suites import pipelines
from pretend import DEVICE, PretendDevice

CPU = torch.device("cpu")


class DrySession(Session):
    """On any device."""

    dry = True

    def __post_init__(self) -> None:
        pass


TINY = list(gpu.TINY.values())


@pytest.fixture(scope="module", params=[4, 5], ids=lambda B: f"batch {B}")
def batch(request: pytest.FixtureRequest) -> int:
    return request.param  # 5: no share of it is a whole number of samples


@pytest.fixture(scope="module", params=TINY, ids=lambda shape: shape.name)
def step(request: pytest.FixtureRequest, batch: int) -> Step:
    return Step(request.param, batch, CPU, torch.float32)


def blocks_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    lists = [blocks for name in lane_caches.LISTS if (blocks := getattr(module, name, None)) is not None]
    return [block for blocks in lists for block in blocks]


class RowsSeen:
    """Notes how many rows blocks are called with."""

    def __init__(self, blocks: list[torch.nn.Module]):
        self.seen: list[int] = []
        self._handles = [block.register_forward_pre_hook(self._note, with_kwargs=True) for block in blocks]

    def _note(self, _: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.seen.append(len([*args, *kwargs.values()][0]))

    def __enter__(self) -> list[int]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize(("B", "share", "lanes"), [(4, 0.25, [3]), (8, 0.5, [1, 3, 5, 7]), (5, 0.5, [1, 3])])
def test_who_reuses_is_spread(B: int, share: float, lanes: list[int]) -> None:
    assert lane_caches.who_reuses(B, share).nonzero().flatten().tolist() == lanes


@pytest.mark.parametrize("B", [4, 8])
@pytest.mark.parametrize("share", SHARES)
def test_the_share_is_exact_at_the_measured_batches(B: int, share: float) -> None:
    assert lane_caches.who_reuses(B, share).sum() == share * B


def test_what_is_timed_is_checked(step: Step) -> None:
    step.check(1e-3)
    with pytest.raises(RuntimeError, match="not measured"):
        step.check(0.0)


def test_each_way_runs_the_rows_that_it_says(step: Step) -> None:
    later = [block for blocks, _ in step._later for block in blocks]
    assert len(later) == step.shape.blocks - 1
    with torch.inference_mode():
        with RowsSeen(blocks_of(step.plain)) as seen:
            plain = step.calls[PLAIN]()
        assert seen == [step.B] * step.shape.blocks
        for share in SHARES:
            running = step.B - int(lane_caches.who_reuses(step.B, share).sum())
            expected = [step.B] + ([running] * len(later) if running else [])
            with RowsSeen(blocks_of(step._reused)) as seen:
                step.calls[by_sample(share)]()
            assert seen == expected
            assert sum(seen) == step.blocks(share)
            if share:
                stubs = blocks_of(step._stub)
                with RowsSeen([stubs[0], *later]) as seen:
                    result = step.calls[at_best(share)]()
                assert seen == expected
                assert result.shape == plain.shape


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_work_is_that_of_the_parts(step: Step) -> None:
    """Products and attention: ours and the parts at best do the same work; so does diffusers' cache at its two ends."""
    same = {by_sample(share): at_best(share) for share in SHARES}
    if step.shape.batch_cache:
        same |= {BATCH_FULL: PLAIN, BATCH_REUSED: at_best(1.0)}
    with torch.no_grad():
        work = {name: (call(), flops(call))[1] for name, call in step.calls.items()}
    assert {name: work[name] for name in same} == {name: work[other] for name, other in same.items()}
    assert work[at_best(0.0)] == work[PLAIN] > work[at_best(0.5)] > work[at_best(1.0)] > 0


def test_the_ways_share_their_weights(step: Step) -> None:
    own = {id(value) for value in step.plain.parameters()}
    assert {id(value) for value in step._reused.parameters()} == own
    assert enabled(step.plain) is None
    assert enabled(step._reused) is not None


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> rows.Rows:
    file = rows.Rows(tmp_path_factory.mktemp("rows"))
    pipelines.run(file, pipelines.Sizes(tuple(TINY), {4: 1.0, 5: 1.0}, 3))
    return file


def test_rows_of_all_ways(measured: rows.Rows) -> None:
    for shape in TINY:
        for B in (4, 5):
            own = [
                r for r in measured.rows if r["parameters"]["network"] == shape.name and r["parameters"]["batch"] == B
            ]
            batch = [BATCH_FULL, BATCH_REUSED] if shape.batch_cache else []
            assert [row["variant"] for row in own] == [PLAIN, *map(by_sample, SHARES), *batch]
            for row in own:
                assert row["suite"] == pipelines.SUITE
                assert row["threads"] == 1
                assert row["blocks_full"] == B * shape.blocks >= row["blocks"]
                assert row["seconds"]["n"] == 3
            full, nobody = own[0], own[1]
            assert nobody["blocks"] == full["blocks"] == full["blocks_full"]
            assert nobody["best_seconds"] == full["seconds"]["median"]
            assert nobody["over_best"] == nobody["plain_steps"]
            assert own[5]["blocks"] == B


def test_tables_and_summary_show_them(measured: rows.Rows, tmp_path: Path) -> None:
    found = pipelines_tables.tables(measured.rows)
    assert tables.all_tables(measured.rows) == found
    assert len(found) == len(TINY) * 2
    for table in found:
        assert all(len(line) == len(table.header) for line in table.body)
        assert "over the least" in tables.plain(table)
    quiet = [{**row, "usable": True, "aa_ratio": 1.0} for row in measured.rows]
    lines = summary(quiet, tmp_path)
    assert any(line.startswith("tiny FLUX, batch 5") for line in lines)
    ours = [row for row in quiet if "over_best" in row]
    within = sum(row["over_best"] <= (1.01 if row["reuse"] == 0 else 1.04) for row in ours)
    assert f"Within 1 % if no sample reuses, 4 % otherwise: {within} of {len(ours)} undisturbed." in lines
    busy = pipelines_section.section([{**row, "usable": False} for row in measured.rows])
    assert "Nothing was measured undisturbed." in busy.lines
    assert pipelines_section.section([]) is None


def test_the_command_knows_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(pipelines, "run", lambda rows, sizes: measured.append(sizes))
    for words, sizes in (([], pipelines.FULL), (["--quick"], pipelines.QUICK)):
        chosen = run.arguments(["--suite", "diffusers", "--out", str(tmp_path), *words])
        run.measure(rows.Rows(tmp_path), None, chosen)
        assert measured.pop() is sizes
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run.arguments(["--suite", "diffusers"])


def test_the_suite_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.session.gpu_state", dict)
    session = Session(CPU)
    assert session.dry
    object.__setattr__(session, "rows", rows.Rows(tmp_path, {"gpu": "a GPU"}, "a commit"))
    assert gpu_run.run_suite(session, gpu_run.SUITES["diffusers"]) == 0
    written = session.rows.rows
    assert {row["suite"] for row in written} == {gpu.SUITE}
    assert {row["dtype"] for row in written} == {"bfloat16"}
    assert sum(row["last"] for row in written) == len(TINY)
    found = gpu_tables.all_tables(written)
    assert [table.header[0] for table in found] == ["tiny FLUX, 4 blocks", "tiny PixArt, 3 blocks"]
    assert tables.all_tables(written) == found


@pytest.mark.slow
def test_the_suite_of_the_gpu_mixes_no_devices() -> None:
    """On a pretended device what would raise on a GPU raises."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # its tensors cannot change in place
    try:
        with PretendDevice():
            for shape, batch, repeats in gpu.DRY:
                gpu.measure(DrySession(DEVICE), {}, shape, batch, repeats)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_without_diffusers_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert list(gpu.tasks(Session(CPU))) == []
    assert "diffusers is not installed here" in capsys.readouterr().err
    assert verdict.MISSING["diffusers"]() == ["diffusers"]
    part = verdict.chosen_parts("diffusers")[0]
    assert part.second, "it is measured where it is asked for"


def test_real_sizes_are_those_of_the_published_networks() -> None:
    """By their numbers of parameters, made without memory for them: FLUX.1-dev 11.9 billion, PixArt-XL/2 0.61."""
    import diffusers

    billions = {}
    for shape in dict.fromkeys(setting[0].kind for setting in gpu.SETTINGS):
        config = next(setting[0] for setting in gpu.SETTINGS if setting[0].kind == shape).config
        with torch.device("meta"):
            billions[shape] = sum(p.numel() for p in getattr(diffusers, shape)(**config).parameters()) / 1e9
    assert billions == pytest.approx({"FluxTransformer2DModel": 11.90, "PixArtTransformer2DModel": 0.61}, rel=0.01)
    assert {dataclasses.replace(s, name="").side for s, *_ in gpu.SETTINGS} == {64, 32}
