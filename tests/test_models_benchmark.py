"""The suite of published networks, on tiny ones: what its rows say, where it goes on, and what is never timed."""

import sys
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff.config import PRESETS, ModelConfig
from adadiff.models.dit import DiTConfig
from adadiff.models.uvit import UViTConfig
from adadiff.sampling.capacity import peak_bytes
from benchmarks import __main__ as run
from benchmarks import harness, rows
from benchmarks.report import tables
from benchmarks.suites import models as presets

TINY = {
    "uvit": ModelConfig(UViTConfig(8, 3, 4, 8, 2, 2, num_classes=5), "vp", null_label=4),
    "dit": ModelConfig(DiTConfig(8, 2, 4, 12, 5, 3, num_classes=5), "linear"),
    "text": ModelConfig(UViTConfig(8, 1, 4, 8, 4, 2, context_tokens=3, context_dim=5), "stable_diffusion"),
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes half a minute; what stands in its place is the network as it is."""
    for name, config in TINY.items():
        monkeypatch.setitem(PRESETS, name, config)
    monkeypatch.setattr(presets, "compile_network", lambda model, *inputs: (model.backbone, None))


def setting(**changes: object) -> presets.Setting:
    return presets.Setting(CPU, **{"presets": tuple(TINY), "repeats": 1, **changes})


def measured(folder: Path, **changes: object) -> rows.Rows:
    file = rows.Rows(folder)
    presets.run(file, setting(**changes))
    return file


def macs_by_hand(config: ModelConfig) -> tuple[int, int, int, int]:
    """Of one lane: everything but blocks, blocks 1 and 2, all blocks, and the scores of all but the last."""
    network = config.network
    D, p, C, N = network.dim, network.patch, network.channels, 4
    if isinstance(network, DiTConfig):
        T, block = N, 12 * D * D * N + 2 * N * N * D
        blocks = [block] * 5
        ends = N * p * p * C * D + (256 + D) * D + 5 * 6 * D * D + N * D * p * p * 2 * C + 2 * D * D
    else:
        T = N + 1 + network.context_tokens + bool(network.num_classes)
        block, skip, half = 12 * D * D * T + 2 * T * T * D, 2 * D * D * T, network.depth // 2
        blocks = [block] * (half + 1) + [block + skip] * half
        ends = 2 * N * p * p * C * D + 9 * C * C * 64 + network.context_tokens * 5 * D
    return ends, sum(blocks[:2]), sum(blocks), N * D


@pytest.mark.slow
def test_rows_say_what_was_run(tmp_path: Path) -> None:
    file = measured(tmp_path)
    assert len(file.rows) == 3 * 2 * 4
    for name, config in TINY.items():
        ends, first, every, score = macs_by_hand(config)
        L = config.network.blocks
        for batch in (1, 8):
            ways = {row["variant"]: row for row in file.rows if row["parameters"] == {"preset": name, "batch": batch}}
            assert list(ways) == ["plain, eager", "plain, compiled", "nobody leaves", "two-phase"]
            exiting = (batch + 1) // 2  # every other, from the first on
            full = batch * (ends + every)
            assert {row["macs_full"] for row in ways.values()} == {full}
            assert ways["plain, eager"]["macs"] == ways["plain, compiled"]["macs"] == full
            assert ways["nobody leaves"]["macs"] == full + batch * (L - 1) * score
            run_blocks = exiting * first + (batch - exiting) * every
            scores = (2 * exiting + (batch - exiting) * (L - 1)) * score
            assert ways["two-phase"]["macs"] == batch * ends + run_blocks + scores
            assert ways["two-phase"]["blocks"] == 2 * exiting + L * (batch - exiting)
            assert ways["nobody leaves"]["blocks"] == L * batch == ways["plain, eager"]["blocks_full"]
            assert ways["plain, compiled"]["peak_bytes"] == ways["plain, eager"]["peak_bytes"] > 0
            fastest = min(list(ways.values())[:2], key=lambda row: row["seconds"]["median"])
            for row in ways.values():
                assert row["fastest_plain"] == fastest["variant"]
                assert row["speedup"] == pytest.approx(fastest["seconds"]["median"] / row["seconds"]["median"])
                assert (row["dtype"], row["device"], row["suite"]) == ("float32", "cpu", "models")
        weights = adadiff.Model(config).state_dict()
        assert ways["two-phase"]["weight_bytes"] == sum(4 * value.numel() for value in weights.values())


def test_bytes_are_those_alive_at_once() -> None:
    def call() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + 1  # both, 8,000 bytes
        del first
        third = second.repeat(3)  # 4,000 and 12,000
        return third[:10].clone()

    assert harness.peak_bytes(call, CPU) == 16_000 + 10 * 4
    model, given = adadiff.load("digits"), torch.randn(3, 1, 8, 8)
    plain = lambda: model.backbone(given, torch.ones(3), torch.arange(3))  # noqa: E731
    assert harness.peak_bytes(plain, CPU) >= peak_bytes(plain)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured(tmp_path, presets=("uvit", "dit")).rows
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]))  # stopped before the last row of dit, batch 8
    again = measured(tmp_path, presets=("uvit", "dit")).rows
    assert [row["parameters"] for row in again[len(first) - 1 :]] == [{"preset": "dit", "batch": 8}] * 4
    monkeypatch.setattr(presets, "made", lambda *_: pytest.fail("measured what is there"))
    assert measured(tmp_path, presets=("uvit", "dit")).rows == again
    monkeypatch.setattr(rows, "commit", lambda: "another")
    with pytest.raises(pytest.fail.Exception):
        measured(tmp_path, presets=("uvit",))


def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = lambda model, *inputs: (lambda *given: model.backbone(*given) * 1.01, None)  # noqa: E731
    monkeypatch.setattr(presets, "compile_network", off)
    with pytest.raises(RuntimeError, match="plain, compiled is off by 1"):
        measured(tmp_path)
    monkeypatch.setattr(presets, "compile_network", lambda model, *inputs: (None, None))
    pass_of = presets.pass_of
    monkeypatch.setattr(presets, "pass_of", lambda model, inputs, exits: pass_of(model, inputs, 0 * exits + 2))
    with pytest.raises(RuntimeError, match=r"nobody leaves is off by|lanes exited after \[2"):
        measured(tmp_path)
    assert rows.Rows(tmp_path).rows == []


def test_without_a_compiler_the_others_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "compile_network", lambda model, *inputs: (None, None))
    file = measured(tmp_path, presets=("text",))
    assert [row["variant"] for row in file.rows] == ["plain, eager", "nobody leaves", "two-phase"] * 2
    one, eight = tables.all_tables(file.rows)
    assert (one.title[:8], eight.title[:8]) == ("batch 1,", "batch 8,")
    line = dict(zip(eight.header, eight.body[0], strict=True))
    assert line["compiled"] == line["MiB, compiled"] == ""


@pytest.mark.slow
def test_a_line_for_each_network(tmp_path: Path) -> None:
    file = measured(tmp_path)
    for table in tables.all_tables(file.rows):
        batch = int(table.title.split(",")[0].removeprefix("batch "))
        costs = {name: sum(macs_by_hand(TINY[name])[i] for i in (0, 2)) for name in TINY}
        assert [line[0].removesuffix(" (!)") for line in table.body] == sorted(TINY, key=costs.__getitem__)
        for line in table.body:
            cells = dict(zip(table.header, line, strict=True))
            own = {"preset": line[0].removesuffix(" (!)"), "batch": batch}
            row = next(row for row in file.rows if row["parameters"] == own and row["variant"] == "two-phase")
            assert cells["two-phase"] == f"{row['seconds']['median'] * 1e3:.1f}"
            assert cells["MACs run"] == f"{row['macs'] / row['macs_full']:.0%}"
            assert cells["speed-up"] == f"{row['speedup']:.2f}"
            assert cells["MiB, two-phase"] == f"{row['peak_bytes'] / 2**20:.1f}"


def test_networks_are_chosen_by_their_work() -> None:
    """GFLOPs of the DiT paper, table 4, which are multiply-adds."""
    published = {"dit_s_8_256": 0.36, "dit_s_4_256": 1.41, "dit_s_2_256": 6.06, "dit_xl_2_256": 118.64}
    for name, giga in published.items():
        assert presets.macs(PRESETS[name]) / 1e9 == pytest.approx(giga, rel=0.015)
    small = presets.Setting(CPU).names
    assert {"digits", "dit_s_2_256", "cifar10_uvit_small"} <= set(small)
    assert not {"dit_xl_2_256", "imagenet256_uvit_large"} & set(small)
    assert [presets.macs(PRESETS[name]) for name in small] == sorted(presets.macs(PRESETS[name]) for name in small)
    assert set(presets.Setting(torch.device("cuda")).names) == set(PRESETS)


@pytest.mark.parametrize(
    "argv",
    [
        ["--suite", "models", "--presets", "dit_s_8_256,dit_s_9_256"],
        ["--presets", "digits"],
        ["--suite", "models", "--quality-only"],
    ],
    ids=" ".join,
)
def test_arguments_that_do_not_fit(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.arguments(argv)
    assert "error" in capsys.readouterr().err


def test_the_command_measures_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run.py", "--suite", "models", "--quick", "--presets", "uvit", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    run.main()
    printed = capsys.readouterr().out
    assert "batch 8, every other lane exits" in printed
    assert "batch 8," in (tmp_path / "tables.txt").read_text()
    measured = rows.read(tmp_path / "rows.jsonl")
    assert len(measured) == 8
    assert {row["parameters"]["preset"] for row in measured} == {"uvit"}
