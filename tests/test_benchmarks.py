"""The harness: its arithmetic by hand-made numbers, its clocks by a fake one. No real second is asserted."""

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff.config import ModelConfig
from adadiff.metrics.quality import evaluate_samples, frechet_ratio
from adadiff.models.uvit import UViTConfig
from adadiff.uem import PAPER
from benchmarks import __main__ as run
from benchmarks import harness, rows
from benchmarks.baselines import attainable
from benchmarks.report import plots, tables
from benchmarks.suites import digits, drawing, network, quality

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """Time passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def variant(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes each of `seconds` in turn, over and over."""
        turns = itertools.cycle(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += next(turns)

        return call


def tiny(classes: int = 11, exits: bool = True) -> adadiff.Model:
    """13 blocks, as the patterns need; otherwise as small as it gets."""
    torch.manual_seed(0)
    network_config = UViTConfig(8, 1, 4, 8, 12, 2, num_classes=classes)
    return adadiff.Model(
        ModelConfig(network_config, "linear", 10 if classes else None, PAPER if exits else None)
    ).eval()


def test_times_are_summed_up_by_quantiles() -> None:
    row = harness.Times((5.0, 1.0, 4.0, 2.0, 3.0)).row()
    assert row == {
        "median": 3.0,
        "p20": pytest.approx(1.8),
        "p80": pytest.approx(4.2),
        "min": 1.0,
        "n": 5,
    }


@pytest.mark.parametrize("samples", [(), (1.0, math.nan), (math.inf,), (-1.0,)])
def test_times_that_are_none(samples: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="finite"):
        harness.Times(samples)


def test_every_round_runs_every_variant_and_the_baseline_twice() -> None:
    clock = Clock()
    variants = {name: clock.variant(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    measured = harness.interleave(variants, repeats=5, warmup=2, clock=clock)
    rounds = [clock.calls[i : i + 4] for i in range(0, 28, 4)]
    assert len(clock.calls) == 28
    assert all(sorted(calls) == ["a", "a", "b", "c"] for calls in rounds)
    assert len({tuple(calls) for calls in rounds}) > 3  # neither the first nor the neighbours are always the same
    assert {name: times.samples for name, times in measured.times.items()} == {
        "a": (1.0,) * 5,
        "b": (2.0,) * 5,
        "c": (4.0,) * 5,
    }
    assert measured.aa_ratio == 1.0
    assert measured.usable


@pytest.mark.parametrize(("again", "usable"), [(1.0, True), (1.029, True), (0.971, True), (1.04, False), (0.96, False)])
def test_a_row_is_unusable_where_the_same_call_differs(again: float, usable: bool) -> None:
    measured = harness.Comparison(
        {"plain": harness.Times((1.0, 2.0, 9.0)), "other": harness.Times((3.0,))},
        harness.Times((again, 2 * again, 1.0)),  # round by round; the machine was at half its speed in the second
    )
    assert measured.row("other") == {
        "seconds": harness.Times((3.0,)).row(),
        "aa_ratio": again,
        "usable": usable,
    }


def test_a_short_call_fills_its_turn_and_its_mean_counts() -> None:
    clock = Clock()
    measured = harness.interleave(
        {"long": clock.variant("long", 1.0), "short": clock.variant("short", 0.1, 0.3)},
        repeats=2,
        warmup=0,
        turn=0.75,
        clock=clock,
    )
    assert clock.calls.count("short") == 8  # 0.1 + 0.3 + 0.1 + 0.3 is the first sum of 0.75 or more
    assert measured.times["short"].samples == pytest.approx((0.2, 0.2))
    assert measured.times["long"].samples == (1.0, 1.0)


@pytest.mark.parametrize(("limit", "rounds"), [(1.0, harness.MIN_ROUNDS), (100.0, 5), (1e9, 9)])
def test_no_round_starts_that_would_end_after_the_limit(limit: float, rounds: int) -> None:
    clock = Clock()
    measured = harness.interleave({"a": clock.variant("a", 10.0)}, 9, 0, limit=limit, clock=clock)
    assert measured.times["a"].n == rounds  # a round is 20 seconds: the baseline twice


def test_pairs_run_right_after_one_another_and_are_compared_round_by_round() -> None:
    clock = Clock()
    variants = {name: clock.variant(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    measured = harness.interleave(variants, 4, 0, pairs={"b": "c"}, clock=clock)
    for start in range(0, 16, 4):  # the baseline twice and both of the pair
        turn = clock.calls[start : start + 4]
        assert sorted(turn) == ["a", "a", "b", "c"]
        assert turn.index("c") - turn.index("b") == (-1 if start // 4 % 2 else 1)
    assert measured.ratio("c", "b").samples == (2.0,) * 4
    with pytest.raises(ValueError, match="one pair"):
        harness.interleave(variants, 4, 0, pairs={"a": "b", "b": "c"}, clock=clock)


def test_an_interrupted_comparison_goes_on_with_its_next_round(tmp_path: Path) -> None:
    def variants(clock: Clock) -> dict[str, Callable[[], None]]:
        return {name: clock.variant(name, *seconds) for name, seconds in (("a", (1.0,)), ("b", range(1, 99)))}

    whole, before, after = Clock(), Clock(), Clock()
    wanted = harness.interleave(variants(whole), 6, 1, clock=whole)

    def interrupted() -> None:
        if len(before.calls) >= 9:  # in the third round after one of warming up
            raise KeyboardInterrupt
        calls["b"]()

    calls = variants(before)
    kept = tmp_path / "rounds.json"
    with pytest.raises(KeyboardInterrupt):
        harness.interleave({"a": calls["a"], "b": interrupted}, 6, 1, kept=kept, clock=before)
    measured = harness.interleave(variants(after), 6, 1, kept=kept, clock=after)
    assert measured.times["b"].samples == (*wanted.times["b"].samples[:2], 2.0, 3.0, 4.0, 5.0)
    assert len(after.calls) == 3 * (1 + 4)  # warmed up again, then what was missing
    assert after.calls[3:] == whole.calls[9:]  # each round in its own order
    again = harness.interleave(variants(after), 6, 0, kept=kept, limit=0.0, clock=after)
    assert again == measured


@pytest.mark.parametrize("arguments", [({}, 1, 0), ({"a": int}, 0, 0), ({"a": int}, 1, -1)])
def test_comparisons_that_are_none(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="comparison"):
        harness.interleave(*arguments)


@pytest.mark.parametrize(
    ("batch", "cost", "best"),
    [
        (48, lambda m: 1.0 + m, 48),  # a fixed price of each call: the larger the better
        (48, lambda m: 1.0 + m + (m > 10) * m, 8),  # beyond 10 lanes the cache is too small
        (1, lambda m: 1.0, 1),
    ],
)
def test_best_micro_batch(batch: int, cost: Callable[[int], float], best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("benchmarks.harness.time.perf_counter", clock)

    def call(size: int) -> None:
        assert 1 <= size <= batch
        clock.now += cost(size)

    assert harness.best_micro_batch(call, batch) == best


def test_attainable_by_hand() -> None:
    seconds = {"in": {4: 1.0, 2: 0.6}, "out": {2: 0.8, 4: 1.5}}
    kinds = ["in", "in", "out", "out"]
    # 0.5 at the ends; 4 and 3 (between 2 and 4) rows of in-blocks; 2 and no rows of out-blocks
    assert attainable.attainable_seconds([4, 3, 2, 0], kinds, seconds, 0.5) == pytest.approx(0.5 + 1.0 + 0.8 + 0.8)
    # below the smallest measured number, on the line to nothing
    assert attainable.attainable_seconds([1, 0, 0, 0], kinds, seconds, 0.0) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="measured up to 4"):
        attainable.attainable_seconds([5, 0, 0, 0], kinds, seconds, 0.5)


def test_rows_per_layer_counts_those_that_ran_it() -> None:
    assert attainable.rows_per_layer(torch.tensor([1, 4, 2, 4, 0]), 4) == [4, 3, 2, 2]


def test_share_of_flop_ideal_by_hand() -> None:
    # half of the multiply-adds allow twice the speed; 1.5 times is three quarters of that
    assert attainable.share_of_flop_ideal(1.5, 50, 100) == 0.75


@torch.inference_mode()
def test_plain_pieces_run_every_row_once_and_take_the_fastest_way() -> None:
    model = tiny()
    ran: dict[int, list[int]] = {}
    for number, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(
            lambda _, inputs, __, number=number: ran.setdefault(number, []).append(len(inputs[0]))
        )
    inputs = torch.randn(7, 1, 8, 8), torch.zeros(7), torch.zeros(7, dtype=torch.int64)
    pieces = attainable.PlainPieces(model.backbone, inputs, {"in": [5, 5, 0], "out": [7]}, sizes={3, 6})
    calls = pieces.variants()
    assert list(calls) == [
        "stem",
        "head",
        "in 5 whole",
        "in 5 by 3",
        "out 7 whole",
        "out 7 by 3",
        "out 7 by 6",
    ]
    for name, parts in (
        ("in 5 whole", [5]),
        ("in 5 by 3", [3, 2]),
        ("out 7 by 3", [3, 2, 2]),
        ("out 7 by 6", [4, 3]),
    ):
        ran.clear()
        calls[name]()
        calls[name]()
        first = 0 if name.startswith("in") else 7
        assert ran == {first: parts, first + 1: parts}  # the next block each time
    seconds = {name: harness.Times((1.0 + number,)) for number, name in enumerate(calls)}
    measured = harness.Comparison(seconds, harness.Times((1.0,)))
    assert pieces.block_seconds(measured) == {"in": {5: 3.0}, "out": {7: 5.0}}
    # stem 1, head 2, seven in-blocks on 5 rows (one of them the middle), an out-block on 7
    counts = [5] * 7 + [7] + [0] * 5
    assert pieces.seconds(measured, counts) == pytest.approx(1 + 2 + 7 * 3 + 5)
    ran.clear()
    pieces.replay(measured, counts)()
    assert ran == {**{number: [5] for number in range(7)}, 7: [7]}


def test_rows_are_complete_in_themselves(tmp_path: Path) -> None:
    file = rows.Rows(tmp_path / "new")
    file.write("suite", "kind", "variant", {"batch": 8}, dtype="float32", usable=True)
    file.write("suite", "kind", "variant", {"batch": 16}, dtype="float32", usable=False)
    first, second = map(json.loads, (tmp_path / "new" / "rows.jsonl").read_text().splitlines())
    assert (first["parameters"], second["parameters"], second["usable"]) == (
        {"batch": 8},
        {"batch": 16},
        False,
    )
    assert set(first["machine"]) == {"cpu", "cores", "ram_gib", "capability", "bfloat16", "system"}
    assert first["versions"]["torch"] == torch.__version__
    assert first["threads"] == torch.get_num_threads()
    assert {"commit", "date"} <= set(first)
    again = rows.Rows(tmp_path / "new")
    assert again.find("suite", "kind", "variant", {"batch": 16}) == second
    assert again.find("suite", "kind", "variant", {"batch": 32}) is None


def test_an_unfinished_line_is_dropped_and_any_other_bad_one_named(tmp_path: Path) -> None:
    file = rows.Rows(tmp_path)
    file.write("suite", "kind", "variant", {}, dtype="float32")
    whole = file.path.read_text()
    file.path.write_text(whole + whole[:20])
    again = rows.Rows(tmp_path)
    assert file.path.read_text() == whole
    again.write("suite", "kind", "other", {}, dtype="float32")
    assert [row["variant"] for row in rows.read(file.path)] == ["variant", "other"]
    file.path.write_text(whole + whole[:20] + "\n")
    with pytest.raises(ValueError, match="line 2"):
        rows.Rows(tmp_path)


def test_an_unwritable_folder_stops_the_run_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out"):
        rows.Rows(tmp_path / "file" / "below")
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "file" / "below")])
    monkeypatch.setattr(run, "measure_digits", lambda *_: pytest.fail("started to work"))
    with pytest.raises(SystemExit, match="--out"):
        run.main()


@pytest.mark.parametrize(
    "argv",
    [["--samples", "0"], ["--seeds", "1.5"], ["--processes", "-1"], ["--suite", "network", "--quality-only"]],
    ids=" ".join,
)
def test_arguments_that_do_not_fit(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.arguments(argv)
    assert "error" in capsys.readouterr().err


def test_patterns_are_the_stated_ones() -> None:
    patterns = network.patterns(22, 13)
    assert patterns["nobody leaves"].tolist() == [13.0] * 22
    assert patterns["same"].tolist() == [7.0] * 22
    assert set(patterns["spread"].tolist()) == set(range(3, 14))
    assert patterns["spread"].mean() == 8
    assert patterns["spread"].tolist() != sorted(patterns["spread"].tolist())
    assert patterns["two-phase"].tolist() == [2.0, 13.0] * 11
    assert patterns["two-phase, ordered"].tolist() == [13.0] * 11 + [2.0] * 11


def test_a_network_comparison_writes_what_the_engine_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suites.network.adadiff.build", lambda name, exits: tiny(classes=0))
    file = rows.Rows(tmp_path)
    network.run(file, [network.Setting(6, torch.float32, threads=1, repeats=1)])
    written = {row["variant"]: row for row in file.rows if row["kind"] == "pattern"}
    blocks = {
        "engine, no exits": 78,
        "nobody leaves": 78,
        "same": 42,
        "two-phase": 45,
        "two-phase, ordered": 45,
    }
    assert {name: written[name]["blocks"] for name in blocks} == blocks
    assert all(row["blocks_full"] == 78 and row["threads"] == 1 for row in written.values())
    # rows 0, 2 and 4 exit: 3 and 5 move to where 0 and 2 were, below the new count of 3
    assert (written["two-phase"]["rows_moved"], written["two-phase, ordered"]["rows_moved"]) == (4, 0)
    assert written["engine, no exits"]["macs"] == written["same"]["macs_full"] > 1.8 * written["same"]["macs"]
    fastest = min((row for row in file.rows if row["kind"] == "baseline"), key=lambda row: row["seconds"]["median"])
    for row in written.values():
        assert row["fastest_plain"] == fastest["variant"]
        speedup = fastest["seconds"]["median"] / row["seconds"]["median"]
        assert row["speedup"] == pytest.approx(speedup)
        assert row["share_of_flop_ideal"] == pytest.approx(speedup * row["macs"] / row["macs_full"])
        assert row["share_of_attainable"] > 0
    assert [path.name for path in plots.draw(file.rows, tmp_path)] == ["network.png"]


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[str, str]:
    names = str(tmp_path / "joint.safetensors"), str(tmp_path / "plain.safetensors")
    adadiff.save(tiny(), names[0])
    adadiff.save(tiny(exits=False), names[1])
    return names


@torch.inference_mode()
def test_the_lockstep_loop_is_the_sampler_without_exits(checkpoints: tuple[str, str]) -> None:
    model = drawing.load(checkpoints[0])
    seeds, labels = drawing.seeds_and_labels(2, 7)
    assert seeds.tolist() == [2_000_000 + i for i in range(7)]
    ours = drawing.lockstep(model.backbone, model.schedule, seeds, labels, steps=3, batch=4)
    theirs, _ = adadiff.sample(model, 7, steps=3, seed=seeds, class_labels=labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_quality_rows_are_drawn_once_and_the_missing_ones_again(
    tmp_path: Path, checkpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "evaluate_samples", functools.partial(evaluate_samples, resamples=3))
    monkeypatch.setattr(quality, "frechet_ratio", functools.partial(frechet_ratio, resamples=3))
    monkeypatch.setattr(drawing, "CHUNK", 16)  # 40 samples are two whole chunks and a half
    out = tmp_path / "out"

    def measure() -> list[rows.Row]:
        file = rows.Rows(out)
        quality.measure(
            file, *checkpoints, thresholds=["0.5001,first=3"], fewer=[1], samples=40, runs=2, processes=1, steps=2
        )
        return file.rows

    first = measure()
    names = ["full", "plain, equal budget", "fewer steps", "early exit", "fixed depth"]
    assert [(row["variant"], row["parameters"]["run"]) for row in first] == [(n, r) for r in (0, 1) for n in names]
    early, fixed = first[3], first[4]
    # fresh UEMs say 0.5 everywhere, below the threshold: everybody exits after the first block that asks
    assert early["exit_histogram"] == [[0, 0, 40] + [0] * 10] * 2
    assert early["mean_exit_layer"] == fixed["mean_exit_layer"] == 3
    assert fixed["frechet"] == early["frechet"]
    assert first[0]["mean_exit_layer"] == 13
    assert "frechet_over_full" not in first[0]
    assert first[0]["frechet_over_plain"]["value"] == pytest.approx(first[0]["frechet"] / first[1]["frechet"])

    monkeypatch.setattr(drawing, "draw", lambda *_: pytest.fail("drew what the file has"))
    assert measure() == first
    monkeypatch.undo()
    monkeypatch.setattr(drawing, "CHUNK", 16)
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:3] + lines[4:]))
    again = measure()
    assert len(again) == len(first)
    assert again[-1]["variant"] == "early exit"
    assert again[-1]["frechet"] == early["frechet"]
    pictures = [path.name for path in plots.draw(again, out)]
    assert pictures == ["images.png", "exit-layers.png"]


@torch.inference_mode()
def test_digits_speed_writes_every_method(tmp_path: Path, checkpoints: tuple[str, str]) -> None:
    file = rows.Rows(tmp_path)
    with harness.threads(1):
        digits.speed(
            file,
            ["0.5001"],
            [1],
            model=checkpoints[0],
            plain_model=checkpoints[1],
            samples=6,
            steps=2,
            repeats=1,
        )
    written = {tables.title(row): row for row in file.rows}
    assert {"full", "fewer steps, 1", "plain, equal budget"} < set(written)
    early, fixed = written["early exit, θ = 0.5001"], written["fixed depth, as θ = 0.5001"]
    assert (early["blocks"], early["blocks_full"], early["mean_exit_layer"]) == (12, 156, 1)
    assert fixed["blocks"] == 12
    assert written["engine, nobody leaves"]["blocks"] == 156
    assert all(row["images_per_second"] == pytest.approx(6 / row["seconds"]["median"]) for row in file.rows)
    assert all(row["share_of_attainable"] > 0 for row in file.rows if "blocks" in row)


def quality_row(variant: str, run_number: int, frechet: float, setting: str | None = None) -> rows.Row:
    return {
        "suite": "digits",
        "kind": "quality",
        "variant": variant,
        "parameters": {"setting": setting, "samples": 100, "run": run_number, "checkpoints": ["a", "b"]},
        "dtype": "float32",
        "threads": 1,
        "frechet": frechet,
        "frechet_low": frechet - 1,
        "frechet_high": frechet + 1,
        "mean_exit_layer": 6.5,
        "blocks_share": 0.5,
        "macs_share": 0.5,
        "accuracy": 0.9,
        "psnr_median": 30.0,
        "machine": {"cpu": "CPU", "bfloat16": False},
        "versions": {"torch": "2"},
    }


def speed_row(variant: str, images: float, usable: bool, setting: str | None = None) -> rows.Row:
    return {
        **quality_row(variant, 0, 0.0, setting),
        "kind": "speed",
        "seconds": {"median": 1.0},
        "aa_ratio": 1.0 if usable else 1.25,
        "usable": usable,
        "images_per_second": images,
        "speedup": 1.5,
    }


def test_tables_join_speed_and_quality_and_show_what_is_unusable() -> None:
    given = [
        speed_row("full", 1.0, usable=True),  # measured again below: the last one counts
        speed_row("full", 100.0, usable=True),
        speed_row("early exit", 150.0, usable=False, setting="0.07"),
        *(quality_row("full", i, value) for i, value in enumerate((1.0, 2.0, 3.0))),
        quality_row("early exit", 0, 5.0, setting="0.07"),
    ]
    (table,) = tables.all_tables(given)
    by_name = {line[0]: dict(zip(table.header, line, strict=True)) for line in table.body}
    assert by_name["full"]["images/s"] == "100.0"
    assert by_name["early exit, θ = 0.07"]["images/s"] == "150.0 (!)"
    assert "25%" in table.note
    # three runs: 2 ± 4.302653 · 1 / √3
    assert (by_name["full"]["Fréchet"], by_name["full"]["95 % interval"]) == ("2.000", "-0.484 to 4.484")
    # one run: its bootstrap interval
    assert by_name["early exit, θ = 0.07"]["95 % interval"] == "4.000 to 6.000"
    text = tables.plain(table).splitlines()
    assert text[1].index("images/s") + len("images/s") == text[2].index("100.0") + len("100.0")  # flush right
    assert tables.markdown(table).splitlines()[4].startswith("| full | 100.0 | 1.50 |")
