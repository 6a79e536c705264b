"""Training: its inputs by hand, its resumption bit for bit, and what it does when something goes wrong."""

import dataclasses
import json
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import adadiff
from adadiff.checkpoint import load, read_tensors, write_tensors
from adadiff.data.image_sets import Images
from adadiff.output.pictures import make_grid, to_pixels
from adadiff.training.config import TrainConfig, load_config
from adadiff.training.run_folder import CONFIG, LOG, MODEL, SAMPLES, STATE, TENSORBOARD, RunFolder
from adadiff.training.trainer import Trainer
from sampler.test_writing import NEVER_REPLACED, state

TINY = {"dim": 16, "depth": 2, "heads": 2}
SHORT = TrainConfig(steps=5, batch=3, warmup=2, save_every=2, seed=4, network=TINY)
DIGITS = dataclasses.replace(SHORT, network={})  # fits the checkpoints in the package


def tensors(folder: Path) -> dict[str, Tensor]:
    state, metadata = read_tensors(folder / STATE)
    assert metadata["step"] == SHORT.steps
    return state | {f"file.{key}": value for key, value in read_tensors(folder / MODEL)[0].items()}


def raising(at: int, error: BaseException, before: bool = True):
    """A wrapper of a function: its call number `at`, from 0, raises."""

    def wrap(function):
        calls = 0

        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if before and calls == at + 1:
                raise error
            result = function(*arguments, **options)
            if calls == at + 1:
                raise error
            return result

        return wrapped

    return wrap


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert Trainer(SHORT, folder).run(progress=False) == folder / MODEL
    return tensors(folder)


@pytest.mark.parametrize(
    ("place", "saved"),
    [
        ("before the loss", 3),
        ("before the weights change", 3),
        ("after the weights change", 2),  # half an update is no state to resume from; the last checkpoint stands
        ("between two updates", 3),
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(uninterrupted, tmp_path: Path, place: str, saved: int) -> None:
    trainer = Trainer(SHORT, tmp_path)
    stop = KeyboardInterrupt()
    if place == "before the loss":
        trainer.inputs = raising(3, stop)(trainer.inputs)
    elif place == "between two updates":
        trainer.update = raising(2, stop, before=False)(trainer.update)
    elif place == "before the weights change":
        trainer.optimizer.zero_grad = raising(3, stop)(trainer.optimizer.zero_grad)
    else:
        trainer.optimizer.step = raising(3, stop, before=False)(trainer.optimizer.step)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)
    assert read_tensors(tmp_path / STATE)[1]["step"] == saved
    torch.manual_seed(99)  # what the process did before is no part of the state
    resumed = Trainer(SHORT, tmp_path)
    assert resumed.step == saved
    resumed.run(progress=False)
    own = tensors(tmp_path)
    assert own.keys() == uninterrupted.keys()
    assert [key for key in own if not torch.equal(own[key], uninterrupted[key])] == []


def test_the_file_holds_the_average_and_how_it_was_made(uninterrupted, tmp_path: Path) -> None:
    average = {k.removeprefix("average."): v for k, v in uninterrupted.items() if k.startswith("average.")}
    written = {k.removeprefix("file."): v for k, v in uninterrupted.items() if k.startswith("file.")}
    assert written.keys() == average.keys()
    assert all(torch.equal(written[key], average[key]) for key in average)
    assert any(not torch.equal(value, uninterrupted[f"model.{key}"]) for key, value in average.items())
    plain = dataclasses.replace(SHORT, exits=False, steps=1)
    file = Trainer(plain, tmp_path).run(progress=False)
    model = load(file)
    assert model.exits is None
    assert read_tensors(file)[1]["notes"]["train"] == dataclasses.asdict(plain)


def test_a_loss_that_is_nan_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(SHORT, tmp_path)
    inputs = trainer.inputs

    def broken(step: int, *which: int) -> tuple[Tensor, ...]:
        x, *others = inputs(step, *which)
        return x * (math.nan if step == 3 else 1), *others

    trainer.inputs = broken
    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step 3"):
        trainer.run(progress=False)
    state, metadata = read_tensors(tmp_path / STATE)
    assert metadata["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())
    assert Trainer(SHORT, tmp_path).step == 2


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Trainer(SHORT, tmp_path).save()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {CONFIG, STATE, MODEL}
    with pytest.raises(ValueError, match=r"another batch, lr; choose another folder, or give --force to begin anew$"):
        Trainer(dataclasses.replace(SHORT, batch=4, lr=1.0), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Trainer(SHORT, tmp_path, force=True).step == 0, "that of a run that can go on"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kept", [{STATE, MODEL}, {MODEL}, {STATE}])
def test_force_begins_anew(tmp_path: Path, kept: set[str]) -> None:
    Trainer(dataclasses.replace(SHORT, log_every=1), tmp_path).run(progress=False)
    for name in {STATE, MODEL} - kept:
        (tmp_path / name).unlink()
    other = dataclasses.replace(SHORT, batch=4, log_every=1)
    trainer = Trainer(other, tmp_path, force=True)
    assert trainer.step == 0
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]
    trainer.run(progress=False)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert load_config(tmp_path / CONFIG, {}) == other


def test_a_run_without_a_checkpoint_leaves_its_folder_to_others(tmp_path: Path) -> None:
    """As after a failed start: there is nothing to lose but the rows of its log."""
    trainer = Trainer(dataclasses.replace(SHORT, log_every=1), tmp_path)
    trainer.update = raising(1, MemoryError(), before=False)(trainer.update)
    with pytest.raises(MemoryError):
        trainer.run(progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, LOG}
    other = dataclasses.replace(SHORT, batch=4, log_every=1)
    Trainer(other, tmp_path).run(progress=False)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert load_config(tmp_path / CONFIG, {}) == other


@pytest.mark.parametrize("name", [STATE, MODEL, LOG, f"{SAMPLES}/00000002.png"])
def test_files_that_no_run_wrote_are_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / SAMPLES).mkdir()
    (tmp_path / name).write_bytes(b"of the user")
    with pytest.raises(ValueError, match=rf"holds {name} but no {CONFIG}; choose another folder, or give --force"):
        Trainer(SHORT, tmp_path)
    assert (tmp_path / name).read_bytes() == b"of the user"
    assert not (tmp_path / CONFIG).exists()


def test_a_finished_model_without_its_state_is_kept(tmp_path: Path) -> None:
    """Training would begin anew and replace it."""
    Trainer(SHORT, tmp_path).save()
    (tmp_path / STATE).unlink()
    before = (tmp_path / MODEL).read_bytes()
    with pytest.raises(ValueError, match=f"holds {MODEL} but no {STATE}; choose another folder, or give --force"):
        Trainer(SHORT, tmp_path)
    assert (tmp_path / MODEL).read_bytes() == before


@pytest.mark.parametrize("kind", [*NEVER_REPLACED])
@pytest.mark.parametrize("name", [STATE, MODEL, LOG, CONFIG])
def test_links_and_pipes_in_a_run_are_refused(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any is read, which might never end, or written through."""
    monkeypatch.chdir(tmp_path)
    RunFolder(tmp_path, SHORT)
    (tmp_path / name).unlink(missing_ok=True)
    NEVER_REPLACED[kind](tmp_path / name)
    before = state(tmp_path)
    for force in (False, True):
        with pytest.raises(ValueError, match=rf"cannot write .*{name}: it is a"):
            RunFolder(tmp_path, SHORT, force=force)
    assert state(tmp_path) == before


def test_a_run_does_not_replace_what_it_begins_with(tmp_path: Path) -> None:
    Trainer(SHORT, tmp_path).save()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / MODEL)
    before = (tmp_path / MODEL).read_bytes()
    for name in (MODEL, "link.safetensors"):
        config = dataclasses.replace(SHORT, init=str(tmp_path / name))
        with pytest.raises(ValueError, match="this run begins with it; choose another folder"):
            Trainer(config, tmp_path, force=True)
    assert (tmp_path / MODEL).read_bytes() == before


@pytest.mark.parametrize("name", [SAMPLES, TENSORBOARD])
def test_a_file_in_the_place_of_a_folder_is_seen_at_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("of the user")
    with pytest.raises(ValueError, match=f"{name}: it is no folder"):
        Trainer(SHORT, tmp_path)


def test_a_folder_tells_its_configuration_to_other_runs(tmp_path: Path) -> None:
    Trainer(SHORT, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values == {"format_version": 2, **dataclasses.asdict(SHORT)}
    assert load_config(tmp_path / CONFIG, {}) == SHORT
    assert load_config(tmp_path / CONFIG, {"steps": 9}) == dataclasses.replace(SHORT, steps=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\x80", "is not JSON"),
        ('{"format_version": 2, "stepz": 3}', "unknown key stepz"),
        ("[]", "a table of values"),
        ("{}", r"config\.json has format_version None, this release reads 2; .* write \"format_version\": 2$"),
        ('{"format_version": 3}', r"config\.json has format_version 3, this release reads 2$"),
    ],
)
def test_a_folder_with_a_damaged_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        Trainer(SHORT, tmp_path)
    assert (tmp_path / CONFIG).read_text(encoding="latin-1") == text


def test_a_truncated_state_is_refused(tmp_path: Path) -> None:
    Trainer(SHORT, tmp_path).save()
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"state\.safetensors is not a readable"):
        Trainer(SHORT, tmp_path)


def numbers(**changes: object) -> Callable[[dict, dict], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
        metadata.update(changes)

    return change


def other_bit(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    tensors["average.backbone.pos_embed"].view(torch.uint8)[0, 0, 5] ^= 16


DAMAGES = {
    "a bit": (other_bit, "checksum"),
    "no step": (lambda tensors, metadata: metadata.pop("step"), r"step must be in 0\.\.5, got None"),
    "no seconds": (lambda tensors, metadata: metadata.pop("seconds"), "seconds must be a number"),
    "a step as text": (numbers(step="2"), "step must be"),
    "a step as a truth": (numbers(step=True), "step must be"),
    "a step below 0": (numbers(step=-1), "step must be"),
    "a step after the last": (numbers(step=6), r"step must be in 0\.\.5, got 6"),
    "seconds without end": (numbers(seconds=math.inf), "seconds must be"),
    "another checksum": (numbers(crc32="7"), "checksum"),
    "no average": (
        lambda tensors, metadata: [tensors.pop(key) for key in [*tensors] if key.startswith("average.")],
        "checksum",
    ),
}


@pytest.mark.parametrize("kind", [*DAMAGES])
def test_a_damaged_state_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    trainer = Trainer(SHORT, tmp_path)
    trainer.update()
    trainer.save()
    change, words = DAMAGES[kind]
    found, metadata = read_tensors(tmp_path / STATE)
    change(found, metadata)
    write_tensors(tmp_path / STATE, found, metadata)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(ValueError, match=rf"state\.safetensors is damaged: .*{words}") as error:
        Trainer(SHORT, tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / STATE).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.pop("optimizer.3.exp_avg"), r"missing 3\.exp_avg"),
        (
            lambda found: [found.pop(key) for key in [*found] if "optimizer" in key],
            "the optimizer's moments are missing",
        ),
        (lambda found: found.pop("model.backbone.pos_embed"), r"missing backbone\.pos_embed"),
        (lambda found: found.update({"optimizer.x.y": torch.ones(1)}), r"unexpected x\.y"),
        (lambda found: found.update({"optimizer.99.step": torch.ones(())}), r"unexpected 99\.step"),
        (lambda found: found.update({"optimizer.0.exp_avg": torch.ones(1)}), r"0\.exp_avg is \(1,\), expected"),
        (lambda found: found.update({"nobody": torch.ones(1)}), "unexpected nobody"),
        (lambda found: found.update({"nobody.knows": torch.ones(1)}), r"unexpected nobody\.knows"),
    ],
)
def test_a_state_of_earlier_releases_is_checked_by_name(tmp_path: Path, change: Callable, words: str) -> None:
    """They wrote no checksum."""
    trainer = Trainer(SHORT, tmp_path)
    trainer.update()
    trainer.save()
    found, metadata = read_tensors(tmp_path / STATE)
    del metadata["crc32"]
    write_tensors(tmp_path / STATE, found, metadata)
    assert Trainer(SHORT, tmp_path).step == 1
    change(found)
    write_tensors(tmp_path / STATE, found, metadata)
    with pytest.raises(ValueError, match=words):
        Trainer(SHORT, tmp_path)


def test_an_unwritable_folder_is_refused_before_any_step(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(Trainer, "update", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(OSError, match="taken"):
        Trainer(SHORT, tmp_path / "taken").run(progress=False)


@pytest.mark.parametrize("exits", [True, False])
def test_the_loss_falls_on_a_few_images(tmp_path: Path, exits: bool) -> None:
    config = TrainConfig(steps=25, batch=16, warmup=5, lr=1e-2, exits=exits, network={**TINY, "dim": 32})
    trainer = Trainer(config, tmp_path)
    trainer.data = Images(*trainer.data.batch(torch.arange(4)))
    simple = [float(trainer.update()["simple"]) for _ in range(25)]
    assert sum(simple[-5:]) < 0.8 * sum(simple[:5])


def test_inputs_are_noised_by_the_schedule(tmp_path: Path) -> None:
    """With every image the constant 0.5 the noise can be read off x, and must be the one that the loss is given."""
    trainer = Trainer(dataclasses.replace(SHORT, batch=400, label_drop=0.25), tmp_path)
    trainer.data = Images(torch.full((50, 1, 8, 8), 0.5), torch.arange(50) % 10)
    x, time, labels, given = trainer.inputs(0)
    t = time.long()
    assert torch.equal(t.float(), time)
    first, beta = {
        "linear": (0, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
        "stable_diffusion": (1, torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2),
    }[trainer.config.model.schedule]
    assert first <= int(t.min()) < first + 20
    assert first + 980 <= int(t.max()) < first + 1000
    alpha_bar = torch.cumprod(1 - beta, 0)[t - first, None, None, None]
    noise = (x.double() - alpha_bar.sqrt() * 0.5) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(noise, given.double(), rtol=0, atol=1e-4)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    dropped = (labels == 10).float().mean()
    assert 0.18 < float(dropped) < 0.32
    assert set(labels.tolist()) == set(range(11))
    again, other = trainer.inputs(0), trainer.inputs(1)  # a function of the seed and the step
    assert all(torch.equal(a, b) for a, b in zip(again, (x, time, labels, given), strict=True))
    assert not torch.equal(other[0], x)


@pytest.mark.parametrize(
    ("loss", "weights"), [("paper", (0.25, 3.0)), ("official", (1.0, 1.0)), ("supervised", (2.0, 0.5))]
)
def test_the_loss_is_the_one_asked_for(tmp_path: Path, loss: str, weights: tuple[float, float]) -> None:
    """What is minimised is L_simple and the two weighted sums of what is logged per layer."""
    config = dataclasses.replace(SHORT, loss=loss, uem_weight=weights[0], ual_weight=weights[1])
    trainer = Trainer(config, tmp_path)
    loss_value, terms = trainer.objective(*trainer.inputs(0))
    assert {name: len(terms[name]) for name in ("uem", "ual", "errors", "relative")} == dict.fromkeys(
        ("uem", "ual", "errors", "relative"), 3
    )
    total = terms["simple"] + weights[0] * terms["uem"].sum() + weights[1] * terms["ual"].sum()
    torch.testing.assert_close(loss_value.detach(), total)
    assert terms["errors"][-1] == terms["simple"]
    assert terms["relative"][-1] == 0
    assert (terms["uem"][-1] == 0) == (loss == "supervised")


def test_a_linear_start_is_one(tmp_path: Path) -> None:
    """Before any update a block adds nothing to its rows, whatever the others hold, and a join passes them on; the
    first updates reach every weight."""
    config = dataclasses.replace(SHORT, start="linear", network={**TINY, "depth": 4})
    trainer = Trainer(config, tmp_path)
    network = trainer.model.backbone
    x, t, labels, _ = trainer.inputs(0)
    rows = network.embed(x, t, labels)[0].detach()
    for block in network.blocks[:3]:
        assert torch.equal(block(rows), rows)
    joined = network.blocks[4].join(rows, torch.zeros_like(rows)).detach()
    rms = rows.square().mean().sqrt()
    assert float((joined - rows).square().mean().sqrt()) < 0.15 * float(rms)  # the published start: 0.99
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    for _ in range(3):
        trainer.update()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(before)


@pytest.mark.parametrize("head", ["linear", "block"])
def test_a_frozen_run_resumes_bit_for_bit(tmp_path: Path, head: str) -> None:
    config = dataclasses.replace(
        DIGITS,
        recipe="frozen",
        init="digits_plain",
        loss="relative",
        exit_options={"head": head},
        steps=3,
        save_every=1,
    )
    file = Trainer(config, tmp_path / "whole").run(progress=False)
    trainer = Trainer(config, tmp_path / "parts")
    trainer.inputs = raising(2, KeyboardInterrupt())(trainer.inputs)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)
    again = Trainer(config, tmp_path / "parts")
    assert again.step == 2
    own, whole = (load(path).state_dict() for path in (again.run(progress=False), file))
    assert all(torch.equal(own[key], value) for key, value in whole.items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = Trainer(SHORT, tmp_path)
    trainer.update()
    trainer.save()
    before = [(tmp_path / name).read_bytes() for name in (STATE, MODEL)]
    with torch.no_grad():
        trainer.model.backbone.pos_embed[0, 0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"model\.backbone\.pos_embed hold NaN or infinity at step 1"):
        trainer.save()
    assert [(tmp_path / name).read_bytes() for name in (STATE, MODEL)] == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "canvases:n=5"}, "'canvases:n=5' is 1x16x16 .* draws 1x8x8 in 10"),
        ({"network": {**TINY, "num_classes": 6}, "preset": "cifar10_uvit_small", "label_drop": 0.0}, "draws 3x32x32"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_the_folder_is_touched(
    tmp_path: Path, change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(dataclasses.replace(SHORT, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_average_follows_quickly_at_first(tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(SHORT, ema=0.25), tmp_path)
    mean = trainer.average.backbone.pos_embed.double()
    for step, decay in enumerate((2 / 11, 0.25, 0.25), start=1):  # min(ema, (1 + step) / (10 + step))
        trainer.update()
        mean = decay * mean + (1 - decay) * trainer.model.backbone.pos_embed.detach().double()
        torch.testing.assert_close(trainer.average.backbone.pos_embed.double(), mean, rtol=1e-5, atol=1e-7)
        assert trainer.step == step


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_the_log_goes_on_where_the_weights_do(tmp_path: Path) -> None:
    """Rows of updates that a kill undid are dropped, and so is a row it cut short."""
    config = dataclasses.replace(SHORT, steps=6, log_every=1, save_every=3)
    Trainer(config, tmp_path / "whole").run(progress=False)
    trainer = Trainer(config, tmp_path / "killed")
    trainer.update = raising(5, MemoryError(), before=False)(trainer.update)  # as a kill: nothing is saved any more
    with pytest.raises(MemoryError):
        trainer.run(progress=False)
    assert [row["step"] for row in rows(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    with open(tmp_path / "killed" / LOG, "a") as file:
        file.write('{"step": 6, "sec')
    again = Trainer(config, tmp_path / "killed")
    assert again.step == 3
    again.run(progress=False)
    whole, killed = rows(tmp_path / "whole"), rows(tmp_path / "killed")
    for row in (*whole, *killed):
        row.pop("seconds")
    assert killed == whole
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    assert {len(whole[0][name]) for name in ("uem", "ual", "errors", "relative")} == {3}


BAD_ROWS = [
    b"",
    b"{",
    b"\0\0\0\0",
    b"\xff\xfe{}",
    b"3",
    b"null",
    b"[1]",
    b"{}",
    b'{"seconds": 1}',
    b'{"step": "2"}',
    b'{"step": null}',
    b'{"step": 2.5}',
    b'{"step": true}',
    b'{"step": NaN}',
    b"[" * 100_000,
    b'{"step": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("bad", BAD_ROWS, ids=lambda row: repr(row[:20]))
def test_a_damaged_row_of_the_log_is_dropped_with_a_warning(tmp_path: Path, bad: bytes) -> None:
    folder = RunFolder(tmp_path, SHORT)
    for step in (1, 2, 3, 4):
        folder.log(step, {"loss": 0.5})
    first, *others = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(b"".join([first, bad + b"\n", *others]))
    with pytest.warns(UserWarning, match=r"log\.jsonl: dropped 1 damaged row, line 2$"):
        folder.start_logs(3)
    assert rows(tmp_path) == [{"step": step, "loss": 0.5} for step in (1, 2, 3)]
    (tmp_path / LOG).write_bytes(b"".join([bad + b"\n", first, bad + b"\n"]))
    with pytest.warns(UserWarning, match=r"log\.jsonl: dropped 2 damaged rows, the first in line 1$"):
        folder.start_logs(3)
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_a_log_on_a_full_disk_keeps_its_rows(tmp_path: Path) -> None:
    """It is written anew when a run goes on; here a file may have 9 bytes."""
    config = dataclasses.replace(SHORT, log_every=1)
    Trainer(config, tmp_path).run(progress=False)
    before = (tmp_path / LOG).read_bytes()
    folder = Trainer(config, tmp_path).folder
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*log\.jsonl"):
            folder.start_logs(5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / LOG).read_bytes() == before


@pytest.mark.parametrize("name", ["steps", "batch", "accumulate", "save_every", "log_every", "warmup", "seed"])
def test_counts_have_limits(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at most 1,000,000(,000)?, got 1,000,000,000,000"):
        TrainConfig(**{name: 10**12})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.toml", b"a = " + b"[" * 100_000, "is not TOML"),
        ("c.toml", b"\xff", "is not TOML"),
        ("c.json", b"[" * 100_000, "is not JSON"),
        ("c.json", b"\xff", "is not JSON"),
        ("c.json", b"3", "must be a table of values"),
        ("c.json", b'{"format_version": 2, "network": {"depth": 1e400}}', "depth must be"),
        ("c.json", b'{"format_version": 2, "network": 3}', "network must be of type dict"),
        ("c.json", b'{"format_version": 2, "lr": 1' + b"0" * 400 + b"}", "lr must be"),
        ("c.json", b'{"format_version": 2, "steps": 1' + b"0" * 5000 + b"}", "is not JSON"),
    ],
)
def test_damaged_configurations_are_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load_config(tmp_path / name, {})
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", [*NEVER_REPLACED])
def test_a_configuration_is_a_regular_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.json"
    NEVER_REPLACED[kind](path)
    with pytest.raises(ValueError, match="not JSON" if kind == "a link" else "no configuration"):
        load_config(path, {})


def test_a_network_beyond_all_memory_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """32 blocks of 65,536 channels hold 1.6 trillion weights."""
    with pytest.raises(ValueError, match=r"has 1,\d\d\d\.\d billion weights; .* GB of memory"):
        Trainer(dataclasses.replace(SHORT, network={"dim": 2**16, "depth": 32}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_are_drawn_along_the_way(tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, steps=4, sample_every=2)
    Trainer(config, tmp_path).run(progress=False)
    assert sorted(path.name for path in (tmp_path / SAMPLES).iterdir()) == ["00000002.png", "00000004.png"]
    shown = np.asarray(Image.open(tmp_path / SAMPLES / "00000004.png"))
    model = load(tmp_path / MODEL)
    images, _ = adadiff.sample(model, 36, steps=20, class_labels=[i % 10 for i in range(36)])
    wanted = make_grid([to_pixels(image) for image in images])
    assert np.array_equal(shown, wanted)
    assert shown.std() > 0


def test_tensorboard_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = Trainer(dataclasses.replace(SHORT, tensorboard=True), tmp_path)
    with pytest.raises(ImportError, match=r"adadiff_kernels\[tensorboard\]"):
        trainer.run(progress=False)
    assert trainer.step == 0
