"""`adadiff diff`: one sample in two ways; what it says is what `adadiff.trace` and `adadiff.sample` find."""

import re

import numpy as np
import pytest
import torch

import adadiff
from adadiff.config import ModelConfig
from adadiff.diffusion.noise import initial_noise
from adadiff.models.uvit import UViT, UViTConfig
from sampler import shell
from sampler.shell import config, error_line, grid_cells, interrupt_call, pixels, read, run, saved

ctrl_c, tiny = shell.ctrl_c, shell.tiny

SETTINGS = {"seed": 1, "class_labels": [7], "steps": 6}
OPTIONS = "--seed 1 --class-label 7 --steps 6"
EXITS = "exit:0.3"  # this sample exits early at some of its steps, not at the first


def table(printed: str) -> list[dict[str, str]]:
    """The printed table: by row, what stands below each head."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("step "))
    last = lines.index("", first)
    starts = [match.start() for match in re.finditer(r"(?<!\S)\S+(?: \S+)*", lines[first])]
    heads = [lines[first][a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
    rows = []
    for line in lines[first + 1 : last]:
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        cells[-1], *differ = cells[-1].split(maxsplit=1)
        rows.append({**dict(zip(heads, cells, strict=True)), "": " ".join(differ)})
    return rows


@pytest.mark.parametrize("policy", ["full", EXITS])
@pytest.mark.parametrize("other", ["seed=1", "batch_invariant=false runner=eager"])
def test_a_way_and_itself_are_the_same_bits(policy: str, other: str, tiny, capsys) -> None:
    assert run(f"diff {tiny} {OPTIONS} --policy {policy} --other {other}") == 0
    printed = capsys.readouterr().out
    assert "the same bits at every step" in printed
    assert "differ" not in printed
    rows = table(printed)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [row["apart"] for row in rows] == ["0"] * 6
    assert [row["exit layer"] for row in rows] == [row["exit layer, other"] for row in rows]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_it_says_where_exits_differ(guidance: float, tiny, capsys) -> None:
    assert run(f"diff {tiny} {OPTIONS} --guidance-scale {guidance} --other policy={EXITS}") == 0
    printed = capsys.readouterr().out
    model, settings = adadiff.load(tiny), {**SETTINGS, "guidance_scale": guidance}
    one, two = (adadiff.trace(model, policy=policy, **settings) for policy in ("full", EXITS))
    images, report = adadiff.sample(model, 1, policy=EXITS, **settings)
    assert torch.equal(two.exit_layer, report.exit_layer[:, 0])
    assert torch.equal(two.x[-1], images[0])
    lanes = 2 if guidance > 1 else 1
    differing = []
    for i, row in enumerate(table(printed)):
        assert (row["step"], row["t"]) == (str(i + 1), f"{one.t[i]:.0f}")
        found = [int(layer) for layer in row["exit layer, other"].split(", ")]
        assert found == report.exit_layer[i, 0, :lanes].tolist()
        assert row["exit layer"] == ", ".join(["3"] * lanes)
        assert "u there" not in row, "the full network scores nothing"
        early = found[0] < 3
        assert row["u there, other"] == (f"{two.scores[i, 0, found[0] - 1]:.4f}" if early else "")
        gap = np.sqrt(np.mean((one.x[i] - two.x[i]).double().numpy() ** 2))
        assert float(row["apart"]) == pytest.approx(gap, rel=0.06)
        assert row[""] == ("exits differ" if found != [3] * lanes else "")
        differing += [i + 1] if found != [3] * lanes else []
    assert 0 < len(differing) < 6
    assert f"exits differ at {len(differing)} of 6 steps, first at step {differing[0]}\n" in printed
    moved = [i + 1 for i in range(6) if not torch.equal(one.x[i], two.x[i])]
    assert f"the first bits differ after step {moved[0]};" in printed
    if guidance == 1:
        assert moved[0] == differing[0] > 1, "until somebody exits, the bits are those of the full network"


def test_both_ways_may_exit(tiny, capsys) -> None:
    assert run(f"diff {tiny} {OPTIONS} --policy {EXITS} --other policy=exit:0.45") == 0
    model = adadiff.load(tiny)
    runs = [adadiff.trace(model, policy=policy, **SETTINGS) for policy in (EXITS, "exit:0.45")]
    rows = table(capsys.readouterr().out)
    for name, own in zip(("", ", other"), runs, strict=True):
        assert [row[f"exit layer{name}"] for row in rows] == [str(layer) for layer in own.exit_layer[:, 0].tolist()]
        scores = own.scores[torch.arange(6), 0, own.exit_layer[:, 0].long() - 1]
        assert [row[f"u there{name}"] for row in rows] == [f"{u:.4f}" if u == u else "" for u in scores.tolist()]


def test_what_differs_is_shown(tiny, tmp_path, capsys) -> None:
    """Settings of the sample, the model and its dtype, each from the first step on."""
    other = saved(tmp_path / "3", config(dim=48))  # a name that would be a number
    model = adadiff.load(tiny)
    for change, two in (
        ("seed=2", adadiff.trace(model, **{**SETTINGS, "seed": 2})),
        ("class_label=4", adadiff.trace(model, **{**SETTINGS, "class_labels": 4})),
        ("dtype=bfloat16", adadiff.trace(adadiff.load(tiny, dtype="bfloat16"), **SETTINGS)),
        (f"model={other}", adadiff.trace(adadiff.load(other), **SETTINGS)),
    ):
        assert run(f"diff {tiny} {OPTIONS} --other {change}") == 0
        printed = capsys.readouterr().out
        name, _, value = change.partition("=")
        assert re.search(rf"^other\.{name} +{re.escape(value)}$", printed, re.MULTILINE)
        assert len(re.findall(r"^other\.", printed, re.MULTILINE)) == 1
        assert "the first bits differ after step 1;" in printed
        assert "exits differ" not in printed
        apart = (adadiff.trace(model, **SETTINGS).x[-1] - two.x[-1]).square().mean().sqrt()
        assert float(table(printed)[-1]["apart"]) == pytest.approx(float(apart), rel=0.06)


def test_a_model_named_like_a_number(tiny, tmp_path, monkeypatch, capsys) -> None:
    saved(tmp_path / "3", config())
    monkeypatch.chdir(tmp_path)
    assert run(f"diff {tiny} {OPTIONS} --other model=3") == 0
    assert "the same bits at every step" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "at"), [(4, (0, 1, 2, 3)), (13, (0, 1, 3, 4, 5, 7, 8, 9, 11, 12))])
def test_a_picture_of_what_both_see_coming(steps: int, at: tuple[int, ...], tiny, tmp_path, capsys) -> None:
    """In three rows, of ten steps at most: the first way, the other, and how far they are apart, black for not."""
    file, settings = tmp_path / "diff.png", {**SETTINGS, "steps": steps}
    line = f"diff {tiny} --seed 1 --class-label 7 --steps {steps} --other policy={EXITS}"
    assert run(f"{line} --picture {file}") == 0
    model = adadiff.load(tiny)
    one, two = (adadiff.trace(model, policy=policy, **settings).x0 for policy in ("full", EXITS))
    cells = grid_cells(read(file), 3, len(at))
    images = [run[i] for run in (one, two, 2 * (one - two).abs() - 1) for i in at]
    for cell, image in zip(cells, images, strict=True):
        np.testing.assert_array_equal(cell, np.kron(pixels(image), np.ones((8, 8), np.uint8)))
    assert (cells[2 * len(at)] == 0).all(), "the first step is the full network's"
    assert any(cell.any() for cell in cells[2 * len(at) :])
    printed = capsys.readouterr().out
    shown = ", ".join(str(i + 1) for i in at)
    assert f"wrote {file}: images predicted at steps {shown}; the first way's, the other's, difference\n" in printed


@pytest.mark.parametrize("policy", ["full", EXITS])
def test_the_image_that_is_coming_is_that_of_the_formula(policy: str, tiny) -> None:
    """(x - sqrt(1 - a) eps) / sqrt(a), eps by a forward pass of what the sample was before the step."""
    model = adadiff.load(tiny)
    found = adadiff.trace(model, policy=policy, **SETTINGS)
    before = [initial_noise(torch.tensor([1]), (1, 8, 8), torch.device("cpu"))[0], *found.x]
    for x, t, x0 in zip(before, found.t, found.x0, strict=False):
        eps = adadiff.forward(model, x[None], t[None], torch.tensor([7]), policy=policy).prediction[0]
        a = model.schedule.log_alpha_bar(t.double()).exp().float()
        torch.testing.assert_close(x0, (x - (1 - a).sqrt() * eps) / a.sqrt(), rtol=1e-4, atol=1e-4)


def test_a_trace_is_a_run_of_the_sampler() -> None:
    model = adadiff.Model(config()).requires_grad_(False).eval()
    shell.scramble(model, 0.15, seed=3)
    settings = {**SETTINGS, "policy": "exit:0.4", "guidance_scale": 2.5}
    images, report = adadiff.sample(model, 1, record_scores=True, **settings)
    found = adadiff.trace(model, **settings)
    assert found.t.tolist() == sorted(found.t.tolist(), reverse=True)
    assert torch.equal(found.x[-1], images[0])
    assert torch.equal(found.exit_layer, report.exit_layer[:, 0])
    torch.testing.assert_close(found.scores, report.scores[:, 0], rtol=0, atol=0, equal_nan=True)


def test_what_cannot_be_compared_is_refused_before_work(tiny, tmp_path, monkeypatch, capsys) -> None:
    latents = saved(tmp_path / "latents.safetensors", config(channels=4))
    text = ModelConfig(UViTConfig(8, 1, 4, 16, 2, 2, context_tokens=11, context_dim=12), "stable_diffusion")
    text = saved(tmp_path / "text.safetensors", text)
    monkeypatch.setattr(UViT, "embed", lambda *_, **__: pytest.fail("the network was called"))
    for line, words in (
        (f"{tiny} --other colour=3", "--other takes no colour; its keys are model, device, dtype, policy"),
        (f"{tiny} --other steps=3 seed=2 tied=true", "--other takes no steps, tied; its keys are"),
        (f"{tiny} --other policy=sometimes", "no policy 'sometimes'"),
        (f"{tiny} --other policy=3", "a policy is an ExitPolicy, another part"),
        (f"{tiny} --other runner=fast", "runner must be one of"),
        (f"{tiny} --other batch_invariant=1", "batch_invariant must be True or False, got 1"),
        (f"{tiny} --other dtype=float8", "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (f"{tiny} --other device=toaster", "cannot use device 'toaster'"),
        (f"{tiny} --other model=4", "no model '4'"),
        (f"{tiny} --other seed=-1", "seed must be at least 0, got -1"),
        (f"{tiny} --other class_label=10", "class_labels must be in 0..9, got [10]"),
        (f"{tiny} --other guidance_scale=much", "guidance_scale must be a number"),
        (f"{tiny} --other solver=euler", "no solver 'euler'"),
        (f"{tiny} --class-label 10 --other seed=1", "class_labels must be in 0..9, got [10]"),
        (f"{tiny} --steps 0 --other seed=1", "steps must be at least 1"),
        (f"{tiny} --other model={latents}", "must draw samples of one shape, got (1, 8, 8) and (4, 8, 8)"),
        (
            f"{latents} --other seed=1 --picture {tmp_path}/x.png",
            "the models draw latents, not images; leave --picture out",
        ),
        (f"{tiny} --other seed=1 --picture {tmp_path}", f"cannot write {tmp_path}"),
        (f"{tiny} --other seed=1 --picture {tmp_path}/none/x.png", f"cannot write {tmp_path}/none/x.png"),
        (f"{text} --other seed=1", "this model takes text"),
    ):
        assert run(f"diff {line}") == 2, line
        captured = capsys.readouterr()
        assert words in error_line(captured.err), line
        assert captured.out == "", line
    for line in (f"diff {tiny}", f"diff {tiny} --other", f"diff {tiny} --other seed", f"diff {tiny} --other =3"):
        with pytest.raises(SystemExit) as end:
            run(line)
        assert end.value.code == 2
        assert "--other" in capsys.readouterr().err


def test_steps_at_other_times_are_not_compared(tiny, capsys) -> None:
    assert run(f"diff {tiny} --steps 5 --other solver=dpm-fast") == 2
    assert "do not take the same timesteps" in error_line(capsys.readouterr().err)


def test_ctrl_c(tiny, monkeypatch, capsys) -> None:
    interrupt_call(monkeypatch, adadiff.sampling.batch.Batch, "tick", 3)
    assert run(f"diff {tiny} --steps 5 --other seed=1") == 130
    assert error_line(capsys.readouterr().err) == "adadiff: interrupted; no results are on disk"
