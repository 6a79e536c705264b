"""`adadiff evaluate`: of models of every kind, each policy against the full network; of what is drawn already."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import adadiff
from adadiff.config import ModelConfig
from adadiff.data.canvases import CLASSES, DIGITS
from adadiff.metrics import judges
from adadiff.metrics.canvases import canvas_features, follow_rules
from adadiff.metrics.frechet import FeatureStatistics, frechet_distance
from adadiff.metrics.images import open_images
from adadiff.metrics.judges import CanvasesJudge
from adadiff.metrics.quality import Quality, evaluate_samples, frechet_ratio, paired_psnr
from adadiff.models.uvit import UViTConfig
from adadiff.uem import ExitConfig
from sampler import shell
from sampler.shell import config, error_line, run, saved, strict_json
from sampler.test_latents import tiny as autoencoder

ctrl_c, tiny = shell.ctrl_c, shell.tiny
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def canvases(tmp_path_factory: pytest.TempPathFactory) -> str:
    network = UViTConfig(16, 1, 4, 32, 2, 2, num_classes=CLASSES + 1)
    model = ModelConfig(network, "linear", null_label=CLASSES, exits=ExitConfig())
    return saved(tmp_path_factory.mktemp("model") / "canvases.safetensors", model)


def same(result: dict, quality: Quality) -> None:
    for name, value in dataclasses.asdict(quality).items():
        assert result[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


def test_evaluate_measures_both_runs(tiny, tmp_path, capsys):
    file = tmp_path / "q.json"
    line = f"evaluate {tiny} --n 23 --steps 2 --policy exit:depth=2 --seed 4 --batch 8 --resamples 9 --json {file}"
    assert run(line) == 0
    results = strict_json(file.read_text())["results"]
    assert list(results) == ["full", "exit:depth=2"]
    model, labels, full = adadiff.load(tiny), [slot % 10 for slot in range(23)], None
    for policy, depth in (("full", 3), ("exit:depth=2", 2)):
        images, _ = adadiff.sample(model, 23, steps=2, policy=policy, seed=4, class_labels=labels, batch=8)
        quality = evaluate_samples(images, torch.tensor(labels), paired=full, resamples=9)
        full = images
        same(results[policy], quality)
        assert results[policy]["mean_exit_layer"] == depth
        assert results[policy]["images_per_second"] > 0
    assert results["full"]["psnr_median"] is None
    printed = capsys.readouterr().out
    for policy, r in results.items():
        frechet = f"{r['frechet']:.2f} [{r['frechet_low']:.2f}, {r['frechet_high']:.2f}]"
        row = next(row for row in printed.splitlines() if row.startswith(policy) and "[" in row)
        assert frechet in row
        assert f"{r['accuracy']:.1%}" in row
    assert f"{results['exit:depth=2']['psnr_median']:.1f}, {results['exit:depth=2']['psnr_p5']:.1f}" in row


def test_guidance_and_dtype_are_those_asked_for(tiny, tmp_path):
    file = tmp_path / "q.json"
    line = f"evaluate {tiny} --n 11 --steps 2 --policy exit:0.4 --batch-invariant --resamples 3 --json {file}"
    assert run(f"{line} --guidance-scale 2.5 --dtype bfloat16 --device cpu --class-labels 1,2,3") == 0
    content = strict_json(file.read_text())
    labels = [1, 2, 3] * 3 + [1, 2]
    settings = {"steps": 2, "class_labels": labels, "guidance_scale": 2.5}
    settings["execution"] = adadiff.ExecutionOptions(batch_invariant=True)
    model = adadiff.load(tiny, dtype="bfloat16")
    full, _ = adadiff.sample(model, 11, **settings)
    images, report = adadiff.sample(model, 11, policy="exit:0.4", **settings)
    same(content["results"]["full"], evaluate_samples(full, torch.tensor(labels), resamples=3))
    same(content["results"]["exit:0.4"], evaluate_samples(images, torch.tensor(labels), paired=full, resamples=3))
    assert content["results"]["exit:0.4"]["mean_exit_layer"] == pytest.approx(report.mean_exit_layer)
    asked = content["configuration"]
    assert (asked["policy"], asked["guidance_scale"], asked["class_labels"]) == (["exit:0.4"], 2.5, [1, 2, 3])
    assert (asked["device"], asked["dtype"], asked["batch_invariant"]) == ("cpu", "bfloat16", True)


def test_equal_images_have_no_psnr(tiny, tmp_path, capsys):
    file = tmp_path / "q.json"
    assert run(f"evaluate {tiny} --n 11 --steps 1 --policy exit:depth=3 --resamples 3 --json {file}") == 0
    result = strict_json(file.read_text())["results"]["exit:depth=3"]
    assert (result["psnr_median"], result["max_difference"]) == (None, 0)
    assert re.search(r"^exit:depth=3 .* equal ", capsys.readouterr().out, re.MULTILINE)


def test_evaluating_the_full_network_draws_once(tiny, capsys):
    assert run(f"evaluate {tiny} --n 11 --steps 1 --policy full --resamples 3") == 0
    assert len(re.findall(r"^full  ", capsys.readouterr().out, re.MULTILINE)) == 1


def test_every_policy_is_compared_with_full(tiny, tmp_path):
    """The ratio of Fréchet distances is resampled in pairs; PSNR and the largest difference are to the same noise."""
    file = tmp_path / "q.json"
    line = f"evaluate {tiny} --n 12 --steps 2 --policy exit:depth=2 --policy full --policy exit:depth=1 --resamples 5"
    assert run(f"{line} --json {file}") == 0
    results = strict_json(file.read_text())["results"]
    assert list(results) == ["full", "exit:depth=2", "exit:depth=1"]
    model = adadiff.load(tiny)
    drawn = {
        policy: adadiff.sample(model, 12, steps=2, policy=policy, class_labels=[i % 10 for i in range(12)])[0]
        for policy in results
    }
    for policy in ("exit:depth=2", "exit:depth=1"):
        ratio = frechet_ratio(drawn[policy], drawn["full"], resamples=5)
        for name, value in dataclasses.asdict(ratio).items():
            assert results[policy]["frechet_over_full"][name] == pytest.approx(value, rel=1e-6)
        worst = float((drawn[policy] - drawn["full"]).abs().max())
        assert results[policy]["max_difference"] == pytest.approx(worst, rel=1e-6)
    assert results["full"]["frechet_over_full"] is None


def test_canvases_are_judged_by_rule_beside_what_real_ones_reach(canvases, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judges, "HELD_OUT", 280)
    file = tmp_path / "q.json"
    assert run(f"evaluate {canvases} --n 40 --steps 2 --policy exit:depth=2 --resamples 3 --json {file}") == 0
    content = strict_json(file.read_text())
    labels = torch.arange(40) % CLASSES
    images, _ = adadiff.sample(adadiff.load(canvases), 40, steps=2, class_labels=labels)
    real, real_labels = CanvasesJudge(2).held_out()
    assert len(real) == 280
    for values, right, own in (
        (content["results"]["full"], follow_rules(images, labels), labels),
        (content["real"], follow_rules(real, real_labels), real_labels),
    ):
        assert values["accuracy"] == pytest.approx(float(right.double().mean()))
        shares = {"alone": own < DIGITS, "count": own >= DIGITS}
        assert values["shares"].keys() == shares.keys()
        for name, group in shares.items():
            assert values["shares"][name]["value"] == pytest.approx(float(right[group].double().mean()))
    assert content["real"]["accuracy"] > 0.85
    statistics = (FeatureStatistics.of(canvas_features(v.clamp(-1, 1))) for v in (images, real))
    assert content["results"]["full"]["frechet"] == pytest.approx(frechet_distance(*statistics), rel=1e-5)
    printed = capsys.readouterr().out
    assert re.search(r"^40 samples are too few for a covariance of 128 features", printed, re.MULTILINE)
    table = printed[printed.rindex("alone") :]
    assert re.search(rf"^real, held out +{content['real']['shares']['alone']['value']:.1%} ", table, re.MULTILINE)


class Colors(nn.Module):
    """The mean of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.fixture
def colored(tmp_path: Path) -> tuple[str, str, str]:
    """A model, features and real images of three channels and no label."""
    model = ModelConfig(UViTConfig(8, 3, 2, 32, 2, 2), "linear", exits=ExitConfig())
    torch.jit.save(torch.jit.trace(Colors(), torch.zeros(2, 3, 8, 8)), tmp_path / "colors.pt")
    (tmp_path / "real").mkdir()
    for i, array in enumerate(np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)):
        Image.fromarray(array).save(tmp_path / "real" / f"{i}.png")
    return saved(tmp_path / "rgb.safetensors", model), str(tmp_path / "colors.pt"), str(tmp_path / "real")


def test_any_model_with_a_reference(colored, tmp_path, capsys):
    model, features, real = colored
    file = tmp_path / "q.json"
    line = f"evaluate {model} --n 11 --steps 2 --policy exit:depth=2 --resamples 9 --json {file}"
    line += f" --features {features} --reference {real}"
    assert run(line) == 0
    content = strict_json(file.read_text())
    images, _ = adadiff.sample(adadiff.load(model), 11, steps=2)
    pixels = torch.cat(list(open_images(real).pieces()))
    same(content["results"]["full"], evaluate_samples(images, None, pixels, extractor=Colors(), resamples=9))
    assert content["results"]["full"]["accuracy"] is None
    assert "real" not in content
    assert "accuracy" not in capsys.readouterr().out


def test_any_model_without_one_is_compared_with_itself(colored, tmp_path, capsys):
    model, _, real = colored
    file = tmp_path / "q.json"
    assert run(f"evaluate {model} --n 3 --steps 2 --policy exit:depth=1 --json {file}") == 0
    result = strict_json(file.read_text())["results"]["exit:depth=1"]
    full, early = (adadiff.sample(adadiff.load(model), 3, steps=2, policy=p)[0] for p in ("full", "exit:depth=1"))
    assert result["max_difference"] == pytest.approx(float((full - early).abs().max()), rel=1e-6)
    assert result["psnr_median"] == pytest.approx(float(paired_psnr(early, full).median()), rel=1e-6)
    assert result["frechet"] is None
    assert "Fréchet" not in capsys.readouterr().out
    for line, words in (
        (f"evaluate {model} --n 3 --policy full", "nothing to compare it with"),
        (f"evaluate {model} --n 3 --reference {real}", "give --features"),
    ):
        assert run(line) == 2
        assert words in error_line(capsys.readouterr().err)


def test_latents_are_compared_in_their_own_range_or_decoded(tmp_path):
    model = saved(tmp_path / "l.safetensors", dataclasses.replace(config(channels=4), latent_scale=0.2))
    loaded, labels = adadiff.load(model), [i % 10 for i in range(5)]
    own = {"steps": 2, "class_labels": labels}
    full, early = (adadiff.sample(loaded, 5, policy=policy, **own)[0] for policy in ("full", "exit:depth=1"))
    line = f"evaluate {model} --n 5 --steps 2 --policy exit:depth=1 --batch 2 --resamples 3"
    line += f" --json {tmp_path / 'q.json'} --force"

    def results() -> dict:
        return strict_json((tmp_path / "q.json").read_text())["results"]

    assert run(line) == 0
    peak = float(full.abs().max())
    assert peak > 1, "else a range of [-1, 1] would do"
    psnr = paired_psnr(early, full, 2 * peak)
    assert results()["exit:depth=1"]["psnr_median"] == pytest.approx(float(psnr.median()), rel=1e-4)
    assert results()["exit:depth=1"]["max_difference"] == pytest.approx(float((early - full).abs().max()), rel=1e-4)

    vae = autoencoder()
    vae.save_pretrained(tmp_path / "vae")
    torch.jit.save(torch.jit.trace(Colors(), torch.zeros(2, 3, 16, 16)), tmp_path / "colors.pt")
    features = np.random.default_rng(0).normal(size=(40, 3))
    np.savez(tmp_path / "s.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    line += f" --decoder {tmp_path / 'vae'} --features {tmp_path / 'colors.pt'} --reference {tmp_path / 's.npz'}"
    assert run(line) == 0
    images = {name: vae.decode(z / 0.2).sample for name, z in (("full", full), ("early", early))}
    result = results()["exit:depth=1"]
    assert result["max_difference"] == pytest.approx(float((images["early"] - images["full"]).abs().max()), rel=1e-4)
    ours = FeatureStatistics.of(Colors()(images["early"].clamp(-1, 1)))
    theirs = FeatureStatistics.of(torch.from_numpy(features))
    assert result["frechet"] == pytest.approx(frechet_distance(ours, theirs), rel=1e-4)
    assert result["kernel"] is None, "statistics hold no features"


@pytest.mark.parametrize("form", ["png --class-labels 3,1", "npz --class-labels 3,1 --shard 20", "png"])
def test_folders_of_samples_are_scored(form, tiny, tmp_path, capsys):
    out, file = tmp_path / "o", tmp_path / "q.json"
    assert run(f"sample {tiny} --out {out} --n 45 --steps 1 --policy full --format {form}") == 0
    assert run(f"evaluate {out} --features digits --resamples 9 --json {file}") == 0
    images = torch.cat(list(open_images(out).pieces()))
    labels = torch.tensor([3, 1]).repeat(23)[:45] if "labels" in form else None
    result = strict_json(file.read_text())["results"]["images"]
    same(result, evaluate_samples(images, labels, resamples=9))
    assert run(f"evaluate {out} --features digits --resamples 2 --class-labels 0,1,2 --json {file} --force") == 0
    quality = evaluate_samples(images, torch.arange(45) % 3, resamples=2)
    assert strict_json(file.read_text())["results"]["images"]["accuracy"] == quality.accuracy
    capsys.readouterr()
    for line, words in (
        ("", "give --features, digits, canvases"),
        ("--features digits --steps 20", "--steps: only for a model"),
        ("--features digits --policy full --n 3", "--n, --policy: only for a model"),
        ("--features digits --guidance-scale 2", "--guidance-scale: only for a model"),
        ("--features digits --dtype bfloat16 --device cpu", "--device, --dtype: only for a model"),
        ("--features digits --batch-invariant --runner compiled", "--batch-invariant, --runner: only for a model"),
        ("--features digits --class-labels 3,10", "labels must be in 0..9 for digits, got [3, 10]"),
        ("--features digits --resamples 1", "--resamples takes at least 2"),
        (f"--features digits --reference {tmp_path / 'none.npz'}", "no images at"),
    ):
        assert run(f"evaluate {out} {line}") == 2, line
        captured = capsys.readouterr()
        assert words in error_line(captured.err), line
        assert captured.out == "", "before work"


def test_statistics_of_other_features_end_in_one_line_before_work(tiny, tmp_path, capsys):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for line, words in (
        (f"--reference {tmp_path / 's.npz'}", "holds statistics of 2048 features, but digits makes 32"),
        ("--features inception:none.pth", "none.pth"),
        ("--class-labels 3,10", "labels must be in 0..9"),
        ("--class-labels 1,2,3,4,5,6,7,8,9,1", "10 class labels for 9 samples"),
        ("--policy sometimes", "no policy 'sometimes'"),
    ):
        assert run(f"evaluate {tiny} --n 9 {line}") == 2
        captured = capsys.readouterr()
        if "inception" in line and "torch-fidelity" in captured.err:
            continue  # is not there
        assert words in error_line(captured.err), line
        assert captured.out == "", "before work"


def test_measures_do_not_depend_on_autocast():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = evaluate_samples(images, torch.arange(40) % 10, paired=images, resamples=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate_samples(images, torch.arange(40) % 10, paired=images, resamples=3) == plain
