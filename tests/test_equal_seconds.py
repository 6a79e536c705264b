"""The comparison at equal seconds: who judges, what is compared, and the whole suite on tiny networks."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import adadiff
from adadiff.calibration.calibrating import work_of
from adadiff.checkpoint import read_tensors
from adadiff.config import ModelConfig
from adadiff.data.canvases import Canvases
from adadiff.forward.forward import run_forward
from adadiff.metrics import judges
from adadiff.metrics.canvases import follow_rules
from adadiff.metrics.quality import evaluate_samples
from adadiff.models.uvit import UViTConfig
from adadiff.policies.exits import Replay
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.uem import PAPER
from benchmarks import __main__ as run
from benchmarks import rows
from benchmarks.baselines import alternatives, sweeps
from benchmarks.report import front_plots, fronts, mates_table, plots, tables
from benchmarks.suites import drawing, equal_seconds, judging, mates, screening
from sampler.tiny import scramble

SWEEP = dataclasses.replace(
    sweeps.QUICK,
    steps=(3,),
    between=(),
    aims=("faithful",),
    budgets=(0.8,),
    calibrated_on=8,
    first=(1,),
    reference_steps=5,
    estimated=(("ddim", 4),),
    limit=1.0,
)
RUN = {"samples": 40, "runs": 1, "processes": 1}


def model(depth: int = 4, exits: bool = True, **changes: object) -> adadiff.Model:
    network = UViTConfig(8, 1, 4, 8, depth, 2, num_classes=11)
    made = adadiff.Model(ModelConfig(network, "linear", 10, PAPER if exits else None, **changes)).eval()
    scramble(made, 0.3, seed=depth)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> sweeps.Networks:
    folder = tmp_path_factory.mktemp("networks")
    for name, made in {"full": model(), "plain": model(exits=False), "shallow": model(2, exits=False)}.items():
        adadiff.save(made, folder / f"{name}.safetensors")
    return sweeps.Networks(*(str(folder / f"{name}.safetensors") for name in ("full", "plain", "shallow")))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "RESAMPLES", 5)
    monkeypatch.setattr(judges, "HELD_OUT", 700)
    monkeypatch.setattr(alternatives, "RECORDED", 20)
    monkeypatch.setattr(alternatives, "RECORDED_STEPS", 6)


# Judges


def test_the_digits_judge_says_what_evaluation_says() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(60, 1, 8, 8).clamp(-1.5, 1.5), torch.arange(60) % 10
    reference = images + 0.1 * torch.randn_like(images)
    found = judging.judging_of("digits", (1, 8, 8), 10).measure(images, labels, reference)
    wanted = evaluate_samples(images, labels, paired=reference, resamples=5)
    for name in ("frechet", "frechet_low", "frechet_high", "accuracy", "psnr_median"):
        assert found[name] == pytest.approx(getattr(wanted, name), rel=1e-6)
    error = ((images.clamp(-1, 1) - reference.clamp(-1, 1)) ** 2).mean()
    assert found["error"] == pytest.approx(float(error), rel=1e-5)
    assert found["error_low"] <= found["error"] <= found["error_high"]
    assert len(found["frechet_draws"]) == len(found["error_draws"]) == 5
    json.dumps(found, allow_nan=False)


def test_the_canvases_judge_goes_by_their_rules() -> None:
    judge = judging.judging_of("canvases", (1, 16, 16), 20)
    labels = torch.arange(60) % 20
    images, _ = Canvases(2).draw(60, "test", seed=5, labels=labels)
    found = judge.measure(images, labels, images)
    wrong = judge.measure(images, labels.roll(1), images)
    assert found["accuracy"] == pytest.approx(float(follow_rules(images, labels).double().mean()))
    assert found["accuracy"] > 0.8
    assert wrong["accuracy"] < 0.2
    assert (found["error"], found["psnr_median"]) == (0.0, "inf")
    assert judge.measure(-images, labels, images)["frechet"] > 3 * found["frechet"]


def test_data_that_nobody_can_judge() -> None:
    with pytest.raises(ValueError, match="there are digits, canvases, letters"):
        judging.judging_of("faces", (1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"the model draws \(1, 8, 8\) in 20"):
        judging.judging_of("canvases", (1, 8, 8), 20)


# Methods


def test_single_thresholds_meet_the_share_along_the_full_way(networks: sweeps.Networks) -> None:
    """Counted again in a loop, over what the UEMs say when the full network is run."""
    shares = (0.45, 0.8)
    own = model()
    scores = []

    def watched(*given: object, **options: object) -> adadiff.ForwardOutput:
        result = run_forward(*given, **{**options, "record_scores": True})
        scores.append(result.scores)
        return result

    batch = Batch(own, 20, forward=watched)
    given = {"steps": 6, "seed": alternatives.CALIBRATION_SEED, "class_labels": [i % 10 for i in range(20)]}
    given |= {"policy": Replay(), "thresholds": [5.0] * 20}  # nobody exits, everybody is scored
    batch.admit(SampleBatch.of(own, 20, **given), np.arange(20))
    while batch.count:
        batch.take(batch.tick().done)
    for first, by_mean in ((1, False), (2, False), (1, True)):
        found = alternatives.single_thresholds(networks.full, shares, first, by_mean)
        values = torch.stack(scores)[:, :-1].mean(2) if by_mean else torch.stack(scores)[:, :-1]
        tried = [share_spent(own, scores, float(theta), first, by_mean) for theta in values.flatten()[::7]]
        for theta, share in zip(found, shares[::-1], strict=True):
            off = abs(share_spent(own, scores, theta, first, by_mean) - share)
            assert off <= min(abs(other - share) for other in tried) + 0.02


def share_spent(own: adadiff.Model, scores: list[torch.Tensor], theta: float, first: int, by_mean: bool) -> float:
    """scores: [L, lanes] at each forward pass."""
    work, spent = work_of(own), []
    for u in scores:
        seen = u[:-1].mean(1, keepdim=True).expand(-1, u.shape[1]) if by_mean else u[:-1]
        for lane in seen.T.tolist():
            left = next((k for k in range(first - 1, 4) if lane[k] < theta), 4)
            asked = min(left, 3) - first + 2
            spent.append((float(work.exiting[left]) + work.score * asked) / work.full)
    return float(np.mean(spent))


def test_further_solvers_are_for_plain_networks_only(networks: sweeps.Networks, tmp_path: Path) -> None:
    sweep = dataclasses.replace(SWEEP, further_solvers=("dpm++2m",), estimated=())
    found = alternatives.methods(networks, sweep, tmp_path)
    assert {m.name for m in found if m.solver == "dpm++2m"} == set(screening.LOOPS)
    assert {m.name for m in found if m.solver == "ddim"} > {*screening.LOOPS, "ours, faithful", "static table"}


def test_reuse_needs_no_exits_and_runs_the_plain_network_too(networks: sweeps.Networks, tmp_path: Path) -> None:
    """With the same settings as the full network, and estimates of its own."""
    with drawing.Artist.of(1) as artist:
        alternatives.calibrate(networks, SWEEP, tmp_path, artist)
    found = alternatives.methods(networks, SWEEP, tmp_path)
    kinds = ("reuse", "static reuse", "ours, cache", "cache, whole batch", "ours, estimated errors")
    own = {model: [m for m in found if m.name in kinds and m.model == model] for model in networks.names}
    assert {m.name for m in own[networks.plain]} == {m.name for m in own[networks.full]} >= set(kinds[:4])
    assert [m.setting for m in own[networks.plain] if "estimated" not in f"{m.name} {m.setting}"] == [
        f"{m.setting}, plain" for m in own[networks.full] if "estimated" not in f"{m.name} {m.setting}"
    ]
    assert not own[networks.shallow]
    estimated = {m.policy.split(",share")[0] for m in found if m.policy.startswith("estimate:")}
    assert len(estimated) == len(list(tmp_path.glob("*-reuse-*.json"))) == 2


def test_large_networks_have_a_sweep_of_their_own(tmp_path: Path) -> None:
    for data, sweep in {"letters": sweeps.LARGE, "canvases": sweeps.COARSE}.items():
        chosen = run.arguments(["--suite", "quality", "--data", data])
        assert run.compared(rows.Rows(tmp_path), chosen).sweep == sweep


def test_every_method_draws_what_the_sampler_draws(networks: sweeps.Networks) -> None:
    seeds, labels = drawing.seeds_and_labels(1, 6)
    given = {"steps": 4, "solver": "dpm++2m", "seed": seeds, "class_labels": labels}
    full, shallow = drawing.load(networks.full), drawing.load(networks.shallow)
    common = {"steps": 4, "solver": "dpm++2m", "batch": 4}
    wanted, report = adadiff.sample(full, 6, shallow_model=shallow, t_switch=500.0, **given)
    duo = drawing.Method("DuoDiff", networks.full, shallow_model=networks.shallow, t_switch=500.0, **common)
    drawn = drawing.draw(duo, seeds, labels)
    torch.testing.assert_close(drawn.images, wanted, rtol=1e-4, atol=1e-4)
    assert drawn.macs == (report.macs, report.macs_full)
    torch.testing.assert_close(drawing.in_plain_loop(duo, seeds, labels, 4), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawing.in_plain_loop(duo, seeds, labels, 4, True), wanted, rtol=1e-4, atol=1e-4)
    plain = drawing.Method("fewer steps", networks.full, **common)
    torch.testing.assert_close(
        drawing.draw(plain, seeds, labels).images, adadiff.sample(full, 6, **given)[0], rtol=1e-4, atol=1e-4
    )
    guided = dataclasses.replace(plain, guidance_scale=2.5)
    wanted, _ = adadiff.sample(full, 6, guidance_scale=2.5, **given)
    torch.testing.assert_close(drawing.draw(guided, seeds, labels).images, wanted, rtol=1e-4, atol=1e-4)
    in_engine = drawing.in_engine(guided, seeds, labels, 4).images
    torch.testing.assert_close(in_engine, wanted, rtol=1e-4, atol=1e-4)
    assert float((wanted - drawing.draw(plain, seeds, labels).images).abs().max()) > 1e-3
    loop = drawing.draw(dataclasses.replace(plain, reuse=2), seeds, labels).images
    assert float((loop - drawing.draw(plain, seeds, labels).images).abs().max()) > 1e-3


def test_networks_that_cannot_be_compared(networks: sweeps.Networks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no exits; it can only be the plain network"):
        dataclasses.replace(networks, full=networks.plain).check()
    other = tmp_path / "other.safetensors"
    adadiff.save(model(2, exits=False, latent_scale=0.5), other)
    with pytest.raises(ValueError, match="do not draw the same"):
        dataclasses.replace(networks, shallow=str(other)).check()
    with pytest.raises(ValueError, match="canvases are"):
        equal_seconds.Comparison(rows.Rows(tmp_path), "canvases", networks, SWEEP)
    with pytest.raises(ValueError, match="fewer than the 5"):
        dataclasses.replace(SWEEP, steps=(3, 5))


def test_the_networks_that_are_taken_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweeps.default_networks("digits") == sweeps.Networks(
        *("digits", "digits_plain", None, "digits_slim"), widths="digits_slim", cascade="digits_cascade"
    )
    shipped = sweeps.default_networks("canvases")
    assert shipped == sweeps.Networks("canvases", "canvases_plain", "canvases_shallow")
    shipped.check()
    monkeypatch.setattr(sweeps, "find", lambda name: adadiff.load("nobody"))
    with pytest.raises(ValueError, match="adadiff train canvases"):
        sweeps.default_networks("canvases")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "runs" / "digits_shallow" / "model.safetensors"
    adadiff.save(model(2, exits=False), file)
    assert sweeps.default_networks("digits").shallow == "runs/digits_shallow/model.safetensors"


@pytest.mark.parametrize("argument", ["deep=x", "full", "--steps 6,x", "--budgets a"])
def test_arguments_that_do_not_fit(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = argument.split() if argument.startswith("--") else ["--models", argument]
    with pytest.raises(SystemExit):
        run.arguments(["--suite", "quality", *option])
    assert "error" in capsys.readouterr().err


def test_rounds_that_are_asked_for_are_all_measured(networks: sweeps.Networks, tmp_path: Path) -> None:
    models = [f"{role}={name}" for role, name in dataclasses.asdict(networks).items()]
    chosen = run.arguments(["--suite", "quality", "--rounds", "12", "--models", *models])
    sweep = run.compared(rows.Rows(tmp_path), chosen).sweep
    assert (sweep.repeats, sweep.limit) == (12, float("inf"))


# The suite


@pytest.mark.parametrize("kind", ["calibrations", "estimates"])
def test_an_interrupted_calibration_goes_on(
    kind: str, networks: sweeps.Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its last step, it makes nothing again, and the file is that of a calibration in one go."""

    def calibrate(file: Path) -> None:
        if kind == "estimates":
            alternatives._estimate((networks.full, "ddim", 4, 32, str(file)))
        else:
            alternatives._calibrate((networks.full, "faithful", "ddim", 3, (0.8,), 8, str(file)))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    suffix = ".json" if kind == "estimates" else ".safetensors"
    at_once, file = (tmp_path / folder / f"known{suffix}" for folder in ("at-once", "halted"))
    for one in (at_once, file):
        one.parent.mkdir()
    calibrate(at_once)
    with monkeypatch.context() as halted:
        halted.setattr(alternatives, "estimates_json" if kind == "estimates" else "reliability_picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(file)
    assert not file.exists()
    with monkeypatch.context() as watched:
        watched.setattr(Batch, "tick", lambda *_: pytest.fail("drew what was kept"))
        calibrate(file)
    if kind == "estimates":
        assert file.read_bytes() == at_once.read_bytes()
    else:  # the header of such a file has no fixed order
        (tensors, notes), (wanted, wanted_notes) = map(read_tensors, (file, at_once))
        assert notes == wanted_notes
        assert all(torch.equal(tensors[name], value) for name, value in wanted.items())
    assert not list(tmp_path.glob("*/*.runs"))


@pytest.mark.slow
def test_the_whole_suite_and_its_resumption(
    networks: sweeps.Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(timing: bool = True) -> list[rows.Row]:
        file = rows.Rows(tmp_path)
        equal_seconds.Comparison(file, "digits", networks, SWEEP).run(**RUN, timing=timing)
        return [row for row in file.rows if row["kind"] != "mates"]

    monkeypatch.setattr(mates, "BATCHES", ())
    monkeypatch.setattr(screening, "TIMED", dict.fromkeys(screening.MEASURES, math.inf))
    drawn = compare(timing=False)
    assert {row["kind"] for row in drawn} == {"quality"}
    assert (tmp_path / "reliability-digits.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in plots.draw(drawn, tmp_path)] == ["equal-seconds-digits.png"]
    monkeypatch.setattr(equal_seconds, "draw", lambda *_: pytest.fail("drew what the file has"))
    monkeypatch.setattr(alternatives, "_calibrate", lambda *_: pytest.fail("calibrated what the file has"))
    measured = compare()
    assert measured[: len(drawn)] == drawn
    names = {row["variant"] for row in drawn}
    assert names == set(front_plots.COLOURS) - {"ours, distribution", "ours, width", "ours, cascade"}
    by_key = {(row["kind"], fronts.setting_of(row)): row for row in measured}
    assert len(by_key) == len(measured) == 2 * len(drawn)
    check_rows({row["variant"]: row for row in drawn}, networks)
    check_speed([row for row in measured if row["kind"] == "speed"])
    check_pages(measured, tmp_path)

    monkeypatch.undo()
    monkeypatch.setattr(mates, "BATCHES", ())
    monkeypatch.setattr(screening, "TIMED", dict.fromkeys(screening.MEASURES, math.inf))
    monkeypatch.setattr(judging, "RESAMPLES", 5)  # the thresholds are remembered
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:2] + lines[3:-1]))
    again = compare()
    assert [row["variant"] for row in again[-2:]] == [measured[2]["variant"], measured[-1]["variant"]]
    assert again[-2]["frechet"] == measured[2]["frechet"]
    assert not list((tmp_path / "cache").glob("rounds-*"))  # the rows have them


@pytest.mark.slow
def test_few_samples_screen_what_many_others_judge(
    networks: sweeps.Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full network's settings stay; what is judged is near a front of what was screened, by other seeds."""
    monkeypatch.setattr(mates, "BATCHES", ())
    monkeypatch.setattr(screening, "JUDGED", (dict.fromkeys(screening.MEASURES, 1.0),))
    file = rows.Rows(tmp_path)
    sweep = dataclasses.replace(SWEEP, steps=(2, 3))
    equal_seconds.Comparison(file, "digits", networks, sweep).run(**RUN, timing=False, screen=20)
    screened, judged = (fronts.select(file.rows, "quality", kind) for kind in ("screening", "quality"))
    assert {(r["parameters"]["samples"], r["parameters"]["run"]) for r in screened} == {(20, screening.RUN)}
    assert {(r["parameters"]["samples"], r["parameters"]["run"]) for r in judged} == {(40, 0)}
    known = {fronts.setting_of(row) for row in screened}
    kept = {fronts.setting_of(row) for row in judged}
    assert kept < known
    assert {row["variant"] for row in judged} >= {"fewer steps", "ours, faithful", "static table"}
    assert not any("screening" in table.title for table in tables.all_tables(file.rows))


def test_those_nearest_to_a_front_are_judged_first(
    networks: sweeps.Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order in which they are tried, and each of them once."""
    far, near, nearest = (drawing.Method(name, networks.full) for name in ("far", "near", "nearest"))
    within = {1.0: [nearest], 1.1: [near, nearest], 1.2: [far, near, nearest]}
    monkeypatch.setattr(screening, "JUDGED", [{"error": factor} for factor in within])
    monkeypatch.setattr(equal_seconds.Comparison, "quality", lambda *_, **__: None)
    monkeypatch.setattr(equal_seconds.Comparison, "near", lambda _, chosen, kind, by: within[by["error"]])
    comparison = equal_seconds.Comparison(rows.Rows(tmp_path), "digits", networks, SWEEP)
    assert comparison.screened(drawing.Artist(None), [far, near, nearest], 20) == [nearest, near, far]


def test_batch_mates_change_what_one_decision_for_all_draws(
    networks: sweeps.Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By sample, nothing changes; rows that are there are not measured again."""
    monkeypatch.setattr(mates, "SAMPLES", 24)
    monkeypatch.setattr(mates, "BATCHES", (2,))
    monkeypatch.setattr(mates, "STEPS", 12)
    sweep = dataclasses.replace(SWEEP, changes=(0.05, 0.3))
    file = rows.Rows(tmp_path)
    mates.measure(file, "digits", networks, sweep, 10)
    changed = {row["variant"]: row["changed"] for row in file.rows}
    assert {name: share for name, share in changed.items() if "by sample" in name} == {
        f"cache, by sample, {change}": 0.0 for change in (0.05, 0.3)
    }
    assert max(share for name, share in changed.items() if "whole batch" in name) > 0
    (table,) = mates_table.tables(file.rows, "digits")
    assert [line[0] for line in table.body] == list(changed)
    monkeypatch.setattr(mates, "draw", lambda *_: pytest.fail("drew what the file has"))
    mates.measure(file, "digits", networks, sweep, 10)
    assert len(file.rows) == 4


def test_without_a_compiler_there_is_one_way_less(
    networks: sweeps.Networks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", fails)
    plain = drawing.Method("plain network", networks.full, steps=1)
    assert not equal_seconds.can_compile([plain], *drawing.seeds_and_labels(0, 2))
    assert "left out: no compiler" in capsys.readouterr().err
    assert equal_seconds.ways(plain, False) == ("loop", "engine")
    assert equal_seconds.ways(dataclasses.replace(plain, policy="exit:depth=2"), False) == ("engine",)


def test_a_policy_that_looks_at_the_batch_is_timed_in_the_batches_it_was_judged_in(
    networks: sweeps.Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equal_seconds, "in_engine", lambda method, seeds, labels, batch, runner: (batch, runner))
    given = drawing.seeds_and_labels(0, 200)
    for name, batch in (("batch mean", 64), ("ours, faithful", 200), ("fewer steps", 200)):
        for way, runner in (("engine", "eager"), ("compiled engine", "compiled")):
            assert equal_seconds.timed(drawing.Method(name, networks.full), way, *given)() == (batch, runner)


def test_plain_loops_are_timed_in_the_batches_their_ways_say(
    networks: sweeps.Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equal_seconds, "in_plain_loop", lambda *given, compiled: (given[-1], compiled))
    method, given = drawing.Method("plain network", networks.full), drawing.seeds_and_labels(0, 200)
    ways = [way for way in equal_seconds.ways(method, True) if "loop" in way]
    found = {way: equal_seconds.timed(method, way, *given)() for way in ways}
    batches = {"loop": (64, False), "compiled loop": (64, True), "compiled loop, batches of 128": (128, True)}
    assert found == batches


def check_rows(by_name: dict[str, rows.Row], networks: sweeps.Networks) -> None:
    full, shallow = drawing.load(networks.full), drawing.load(networks.shallow)
    cost = {name: int(work_of_whole(made)) for name, made in (("full", full), ("shallow", shallow))}
    assert by_name["fewer steps"]["macs"] == 3 * cost["full"]
    assert by_name["shallow network"]["macs"] == 3 * cost["shallow"]
    assert (by_name["shallow network"]["mean_exit_layer"], by_name["plain network"]["mean_exit_layer"]) == (3.0, 5.0)
    assert by_name["DuoDiff"]["macs"] == 2 * cost["shallow"] + cost["full"]  # at 999, 666 and 333, switched at 600
    assert by_name["fixed depth"]["mean_exit_layer"] == 3.0
    for name in ("static table", "ours, faithful"):
        assert 0.35 * 3 * cost["full"] < by_name[name]["macs"] < 0.85 * 3 * cost["full"]
    histogram = torch.tensor(by_name["ours, faithful"]["exit_histogram"])
    assert histogram.sum(1).tolist() == [40] * 3
    mean = float((histogram.double() @ torch.arange(1.0, 6.0, dtype=torch.float64)).sum() / 120)
    assert by_name["ours, faithful"]["mean_exit_layer"] == pytest.approx(mean)
    assert len(by_name["ours, faithful"]["times"]) == 3
    assert "exit_histogram" not in by_name["static table"]
    seeds, labels = drawing.seeds_and_labels(0, 40)
    reference, _ = adadiff.sample(full, 40, steps=5, seed=seeds, class_labels=labels)
    images, _ = adadiff.sample(full, 40, steps=3, seed=seeds, class_labels=labels)
    error = float((images.clamp(-1, 1) - reference.clamp(-1, 1)).square().mean())
    assert by_name["fewer steps"]["error"] == pytest.approx(error, rel=1e-3)


def work_of_whole(made: adadiff.Model) -> int:
    network = made.backbone
    return sum(block.macs(network.tokens) for block in network.blocks) + sum(network.stem_and_head_macs())


def check_speed(speed: list[rows.Row]) -> None:
    for row in speed:
        assert row["threads"] == 1
        assert row["seconds_per_image"] == pytest.approx(row["seconds"]["median"] / row["at_once"])
        assert len(row["rounds"]) == row["seconds"]["n"] >= 3
        plain = row["variant"] in ("fewer steps", "plain network", "shallow network", "DuoDiff")
        compiled_loops = ["compiled loop", "compiled loop, batches of 128"]
        ways = ["loop", "engine", *compiled_loops] if plain else ["engine", "compiled engine"]
        assert list(row["ways"]) == (["loop"] if row["variant"] == "reuse" else ways)
        assert row["seconds"]["median"] == row["ways"][row["way"]] == min(row["ways"].values())


def check_pages(measured: list[rows.Row], folder: Path) -> None:
    found = {table.header[0]: table for table in tables.all_tables(measured)}
    ours, composed = "digits, ours by budget", "digits, composed policies by budget"
    assert set(found) == {ours, composed, "digits, best for their seconds", "digits, at the same"}
    untimed = [row for row in measured if row["kind"] == "quality"]
    for title in (ours, composed):
        shown = [table for table in tables.all_tables(measured) if table.header[0] == title]
        assert [table.header[3] for table in shown] == ["ms/image", "million MACs"] * 2
        assert [table.header[5] for table in shown] == [*["Fréchet distance"] * 2, *["squared error"] * 2]
        by_macs = [table for table in tables.all_tables(untimed) if table.header[0] == title]
        assert [table.header[3] for table in by_macs] == ["million MACs"] * 2
    assert [line[0] for line in found[ours].body] == ["0.8", "cache", "one threshold"]
    assert [line[0] for line in found[composed].body] == ["0.8"]
    words = {"below", "above", "on it", "undecided", "no other so fast"}  # reuse draws what reuse in lock step draws
    assert {line[-1] for line in found["digits, ours by budget"].body} <= words
    shown = front_plots.picture(measured, "digits")
    curves = [axis for part in shown.subfigs for axis in part.axes if axis.get_xscale() == "log"]
    assert len(curves) == 6
    labels = list(itertools.chain.from_iterable(axis.get_legend_handles_labels()[1] for axis in curves))
    assert all(labels.count(name) == 6 for name in {row["variant"] for row in measured})
    assert [p.name for p in plots.draw(measured, folder)] == ["equal-seconds-digits.png"]


class Numbered:
    """Draws images that all hold the number of the drawing."""

    drawings = 0

    def draw(self, method: drawing.Method, seeds: torch.Tensor, labels: torch.Tensor) -> drawing.Drawn:
        self.drawings += 1
        return drawing.Drawn(torch.full((len(seeds), 1, 2, 2), float(self.drawings)))


def test_kept_images_are_read_only_by_what_draws_the_same(tmp_path: Path) -> None:
    """A method that differs in steps, solver or guidance never gets the images of another."""
    first = drawing.Method("reference", "digits", steps=4)
    others = ({"steps": 5}, {"solver": "dpm++2m"}, {"guidance_scale": 2.0})
    methods, artist = [first, *(dataclasses.replace(first, **other) for other in others)], Numbered()
    for _ in range(2):
        for number, method in enumerate(methods, 1):
            images = drawing.kept_images(tmp_path, artist, method, torch.arange(3), torch.zeros(3), run=0)
            assert float(images.unique()) == number
    assert artist.drawings == len(methods)
