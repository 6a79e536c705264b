"""steps="auto": what a sample gets is what it gets with the chosen number given, in any company; refusals; files."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adadiff
from adadiff import checkpoint
from adadiff.calibration.calibrating import Calibrating
from adadiff.config import ModelConfig
from adadiff.forward.options import ExecutionOptions
from adadiff.model import Model
from adadiff.models.uvit import UViTConfig
from adadiff.policies.step_selector import LabelScores, SelectorConfig, StepSelector, TextScores
from adadiff.sampling.sample_batch import SampleBatch
from sampler.tiny import scramble, served

EXACT = ExecutionOptions(batch_invariant=True)
TEXT = ModelConfig(UViTConfig(4, 1, 2, 16, 2, 2, context_tokens=3, context_dim=5), "stable_diffusion")
CONFIG = SelectorConfig((2, 3, 5, 7), "ddim", 1.0, 3, 0, bar=0.05, penalty=1.0, n=8, seed=0)
CHOSEN = [5, 2, 7]  # of the three labels


def selecting(**changes: object) -> Model:
    """`served`, and a selector that gives its labels CHOSEN steps."""
    scores = LabelScores(3, 4)
    with torch.no_grad():
        for label, steps in enumerate(CHOSEN):
            scores.table[label, CONFIG.candidates.index(steps)] = 1.0
    made = adadiff.Model(served().config).requires_grad_(False).eval()
    made.load_state_dict(served().state_dict())
    made.step_selector = StepSelector(dataclasses.replace(CONFIG, **changes), scores)
    return made


def reading() -> Model:
    """A model that takes text, and a selector with random weights that reads it."""
    made, scores = Model(TEXT).requires_grad_(False).eval(), TextScores(5, 4)
    scramble(made, 0.3, seed=2)
    scramble(scores, 1.0, seed=4)
    made.step_selector = StepSelector(dataclasses.replace(CONFIG, num_classes=0, context_dim=5), scores)
    return made


def texts(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("policy", ["full", "exit:0.55,min_layer=2"])
def test_auto_is_the_chosen_number_bit_for_bit(policy: str) -> None:
    model, labels = selecting(), [2, 0, 1, 0, 1]
    settings = {"class_labels": labels, "seed": 3, "policy": policy}
    images, report = adadiff.sample(model, 5, steps="auto", **settings)
    given, other = adadiff.sample(model, 5, steps=[CHOSEN[label] for label in labels], **settings)
    assert torch.equal(images, given)
    assert torch.equal(report.exit_layer, other.exit_layer)
    assert report.steps.tolist() == [7, 5, 2, 5, 2]


@pytest.mark.parametrize("kind", ["labels", "text"])
def test_each_is_as_alone_whoever_comes_along(kind: str) -> None:
    if kind == "labels":
        model, conditions = selecting(), [{"class_labels": label} for label in (2, 0, 1, 0, 1)]
        together = {"class_labels": [2, 0, 1, 0, 1]}
    else:
        model, text = reading(), texts(5)
        conditions, together = [{"text_embeds": one} for one in text], {"text_embeds": text}
    images, report = adadiff.sample(model, 5, steps="auto", seed=11, batch=3, execution=EXACT, **together)
    assert len(set(report.steps.tolist())) > 1
    for i, own in enumerate(conditions):
        alone, one = adadiff.sample(model, 1, steps="auto", seed=11 + i, execution=EXACT, **own)
        assert torch.equal(alone[0], images[i])
        assert one.steps.tolist() == [report.steps[i]]


def test_the_choice_goes_by_the_sample_alone() -> None:
    """Two scores that are equal but for rounding: products of other sizes round otherwise, and would flip them."""
    model, text = reading(), texts(257)
    selector = model.step_selector
    with torch.no_grad():
        hidden, head = selector.scores.hidden, selector.scores.head
        one, two = torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(2, 32)
        hidden.weight[two], hidden.bias[two] = hidden.weight[one], hidden.bias[one]
        head.weight[1, one], head.weight[1, two] = head.weight[0, two], head.weight[0, one]
        head.bias[:] = torch.tensor([0.0, 0.0, -1e3, -1e3])
    together = selector.choose(text)
    assert len(set(together.tolist())) > 1
    assert together.tolist() == [int(selector.choose(text[i : i + 1])) for i in range(257)]


def test_scores_stay_on_the_cpu_in_float64() -> None:
    model = reading()
    before = model.step_selector.choose(texts(9))
    model.to(torch.bfloat16)
    assert {value.dtype for value in model.step_selector.scores.state_dict().values()} == {torch.float64}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.step_selector.choose(texts(9)), before)
    assert not [name for name in model.state_dict() if "selector" in name]


def test_text_is_read_as_the_formula_says() -> None:
    """Attention with one query, value by value in plain loops."""
    selector, text = reading().step_selector, texts(4)
    w = {name: value.tolist() for name, value in selector.scores.state_dict().items()}

    def linear(name: str, x: list[float]) -> list[float]:
        rows = zip(w[f"{name}.weight"], w[f"{name}.bias"], strict=True)
        return [sum(a * b for a, b in zip(row, x, strict=True)) + bias for row, bias in rows]

    found = selector.scores(text.double())
    for own, scores in zip(text.double().tolist(), found, strict=True):
        tokens = []
        for token in own:
            mean = sum(token) / 5
            spread = (sum((v - mean) ** 2 for v in token) / 5 + 1e-5) ** 0.5
            scaled = zip(token, w["norm.weight"], w["norm.bias"], strict=True)
            tokens.append([(v - mean) / spread * g + b for v, g, b in scaled])
        said = [sum(k * q for k, q in zip(linear("key", token), w["query"], strict=True)) / 8 for token in tokens]
        weight = torch.tensor(said, dtype=torch.float64).softmax(0).tolist()
        values = [linear("value", token) for token in tokens]
        pooled = [sum(a * v[c] for a, v in zip(weight, values, strict=True)) for c in range(64)]
        hidden = torch.nn.functional.gelu(torch.tensor(linear("hidden", pooled), dtype=torch.float64)).tolist()
        torch.testing.assert_close(scores, torch.tensor(linear("head", hidden), dtype=torch.float64))


def test_an_engine_s_requests_choose_for_themselves() -> None:
    model = selecting()
    engine = adadiff.Engine(model, capacity=4, threaded=False, execution=EXACT)
    handles = [engine.submit(seed=20 + i, steps="auto", class_labels=label) for i, label in enumerate((1, 2, 0, 1))]
    other = engine.submit(seed=9, steps=4, class_labels=1)
    assert [handle.progress for handle in handles] == [(0, 2), (0, 7), (0, 5), (0, 2)]
    engine.close()
    for i, handle in enumerate(handles):
        own, label = CHOSEN[(1, 2, 0, 1)[i]], (1, 2, 0, 1)[i]
        alone, _ = adadiff.sample(model, 1, seed=20 + i, steps=own, class_labels=label, execution=EXACT)
        assert torch.equal(handle.result(), alone[0])
        assert handle.report.steps.tolist() == [own]
    assert other.report.steps.tolist() == [4]


def test_none_are_chosen_for_no_samples() -> None:
    images, report = adadiff.sample(selecting(), 0, steps="auto", class_labels=[])
    assert images.shape == (0, 1, 4, 4)
    assert report.steps.tolist() == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"steps": "many"}, "steps must be a number, one for each sample or 'auto', got 'many'"),
        ({"init_image": torch.zeros(1, 4, 4)}, "steps='auto' is learnt for samples from noise; with init_image give"),
        ({"solver": "dpm++2m"}, r"trained for solver 'ddim', got DPMSolverPP2M"),
        ({"solver": "ddim:spacing=leading"}, r"trained for solver 'ddim', got DDIM\(eta=0.0, spacing='leading'\)"),
        ({"guidance_scale": [1.0, 1.5]}, r"trained for guidance_scale 1, got \[1.0, 1.5\]"),
        ({"guidance_interval": (100, 800)}, "trained without guidance_interval; leave it out"),
        ({"class_labels": None}, "steps='auto' chooses steps by class; give class_labels"),
        ({"class_labels": 3}, r"class_labels must be in 0..2"),
    ],
)
def test_refused(settings: dict, why: str) -> None:
    own = {"steps": "auto", "class_labels": 1, "seed": 0, **settings}
    with pytest.raises(ValueError, match=why):
        SampleBatch.of(selecting(), 2, **own)
    if "guidance_scale" not in settings:  # a list is for several samples
        with adadiff.Engine(selecting(), threaded=False) as engine, pytest.raises(ValueError, match=why):
            engine.submit(**own)


def test_refused_without_a_selector() -> None:
    with pytest.raises(ValueError, match=r"steps='auto' needs a model with a step selector; `adadiff train-steps`"):
        SampleBatch.of(served(), 1, steps="auto", class_labels=1)


def test_guidance_it_was_trained_for_is_taken() -> None:
    model, settings = selecting(guidance_scale=2.3), {"class_labels": [0, 2], "guidance_scale": 2.3}
    images, _ = adadiff.sample(model, 2, steps="auto", **settings)
    assert torch.equal(images, adadiff.sample(model, 2, steps=[5, 7], **settings)[0])


@pytest.mark.parametrize("make", [selecting, reading])
def test_a_file_keeps_it(make, tmp_path: Path) -> None:
    model, file = make(), tmp_path / "m.safetensors"
    adadiff.save(model, file)
    found, by_half = adadiff.load(file), adadiff.load(file, dtype="bfloat16")
    assert found.step_selector.config == model.step_selector.config
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    context = torch.arange(3) if make is selecting else texts(33)
    for other in (found, by_half):
        for name, value in model.step_selector.scores.state_dict().items():
            assert torch.equal(value, other.step_selector.scores.state_dict()[name])
        assert torch.equal(other.step_selector.choose(context), model.step_selector.choose(context))
    assert by_half.backbone.pos_embed.dtype == torch.bfloat16
    adadiff.save(by_half, tmp_path / "half.safetensors")
    assert adadiff.load(tmp_path / "half.safetensors").backbone.pos_embed.dtype == torch.bfloat16


def test_files_without_one_load_and_stay_as_they_are(tmp_path: Path) -> None:
    adadiff.save(served(), tmp_path / "old.safetensors")
    assert adadiff.load(tmp_path / "old.safetensors").step_selector is None
    tensors, metadata = checkpoint.read_tensors(tmp_path / "old.safetensors")
    assert "step_selector" not in metadata
    assert not [name for name in tensors if name.startswith("step_selector")]
    adadiff.save(selecting(), tmp_path / "new.safetensors")
    new = load_file(tmp_path / "new.safetensors")
    assert set(new) - set(tensors) == {"step_selector.table"}
    assert all(torch.equal(value, new[name]) for name, value in tensors.items())


def test_a_calibration_keeps_it() -> None:
    model = selecting()
    calibrating = Calibrating(model, [0.6], n=8, steps=3, refit=True)
    assert calibrating.run() is calibrating.model.calibration
    assert calibrating.model.step_selector is not None
    assert calibrating.model.step_selector.steps_of_classes == CHOSEN


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"candidates": [2, 3, 5]}, "step_selector.table is"),
        ({"candidates": [3, 2, 5, 7]}, "candidates are 2 to 64 numbers of steps in 1..1000, rising"),
        ({"candidates": [2, 3, 5, True]}, "candidates are"),
        ({"candidates": None}, "this is no step selector"),
        ({"num_classes": 4}, r"its step selector reads \(classes, channels of text\) \(4, 0\), its network \(3, 0\)"),
        ({"num_classes": 0}, "reads labels or text"),
        ({"solver": "dimm"}, "no solver 'dimm'"),
        ({"solver": 3}, "solver is text"),
        ({"bar": "0.05"}, "bar is a finite number"),
        ({"bar": float("nan")}, "bar is a finite number"),
        ({"seed": -1}, "seed is a whole number"),
        ({"measured": {}}, "this is no step selector"),
        ({"more": 1}, "this is no step selector"),
    ],
)
def test_damaged_files(change: dict, why: str, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    adadiff.save(selecting(), file)
    tensors, metadata = checkpoint.read_tensors(file)
    own = {**metadata["step_selector"], **change}
    checkpoint.write_tensors(file, tensors, {**metadata, "step_selector": own})
    with pytest.raises(ValueError, match=why) as refusal:
        adadiff.load(file)
    assert str(file) in str(refusal.value)


def test_tensors_without_its_description_are_unexpected(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    adadiff.save(selecting(), file)
    tensors, metadata = checkpoint.read_tensors(file)
    del metadata["step_selector"]
    checkpoint.write_tensors(file, tensors, metadata)
    with pytest.raises(ValueError, match=r"unexpected step_selector\.table"):
        adadiff.load(file)


def test_a_file_cannot_name_a_class_as_its_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else opening it would import the module."""
    monkeypatch.setattr("adadiff.spelling.importlib", None)
    with pytest.raises(ValueError, match="no solver 'os:system'"):
        SelectorConfig.from_dict({**CONFIG.to_dict(), "solver": "os:system"})


def test_descriptions_survive_json() -> None:
    assert SelectorConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
