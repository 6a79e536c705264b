"""Files of cascades, how they are spelled, and what is refused before any work starts."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adadiff
from adadiff.checkpoint import write_tensors
from adadiff.model import Model
from adadiff.policies.cascade import Cascade
from adadiff.policies.exits import Threshold
from adadiff.policies.spelling import parts_from, policy_from
from adadiff.sampling import cascade_file
from adadiff.sampling.cascade_file import CascadeSettings, read_cascade, write_cascade
from adadiff.sampling.oracle import Oracle, OracleConfig
from adadiff.sampling.sample_batch import SampleBatch
from sampler.cascading import oracle, settings, student, written
from sampler.tiny import SERVED, scramble, served

CPU = torch.device("cpu")


def read(path: Path | str, dtype: torch.dtype = torch.float32) -> cascade_file.CascadeFile:
    return read_cascade(Path(path), CPU, dtype)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cascade:a.safetensors", Cascade("a.safetensors")),
        ("cascade:a,share=0.3,mode=refine,sigma=0.5", Cascade("a", 0.3, "refine", 0.5)),
        ("cascade:b,c/d=e,share=1", Cascade("b,c/d=e", 1.0)),  # a name may hold commas and =
        ("cascade:a,mode=regenerate", Cascade("a", mode="regenerate")),
    ],
)
def test_spelling(text: str, wanted: Cascade) -> None:
    parts = parts_from(text)
    assert parts.cascade == wanted
    assert parts_from(str(parts)) == parts
    both = parts_from(f"{text}+exit:0.3")
    assert (both.cascade, both.exit) == (wanted, Threshold(0.3))
    with pytest.raises(ValueError, match="only exit policies can be"):
        policy_from(text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("cascade:", "of a file"),
        ("cascade:,share=0.5", "of a file"),
        ("cascade:a,share=0.005", "0, 1, or from 0.01 to 0.99, got 0.005"),
        ("cascade:a,share=-1", "got -1"),
        ("cascade:a,share=nan", "got nan"),
        ("cascade:a,share=half", "share must be a number, got 'half'"),
        ("cascade:a,sigma=1", "between 0 and 1, got 1"),
        ("cascade:a,sigma=0", "between 0 and 1, got 0"),
        ("cascade:a,mode=again", "refine or regenerate, got 'again'"),
        ("cascade:a,share=0.1,share=0.2", "share is given twice"),
        ("cascade:a,mode=regenerate,sigma=0.5", "takes none"),
        ("cascade:a+cascade:b", "one cascade policy"),
    ],
)
def test_refused_spellings(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as refused:
        parts_from(text)
    assert "\n" not in str(refused.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = read(written(tmp_path))
    for name, module in (("student", student()), ("oracle", oracle())):
        own = getattr(found, name).state_dict()
        assert all(torch.equal(own[key], value) for key, value in module.state_dict().items())
    assert found.settings == settings()
    assert found.student.config == student().config
    half = read(written(tmp_path), torch.bfloat16)
    assert {value.dtype for value in half.student.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in half.oracle.parameters()} == {torch.float32}


def test_a_file_is_read_again_when_it_has_changed_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = written(tmp_path), []
    whole = cascade_file.read_tensors
    monkeypatch.setattr(cascade_file, "read_tensors", lambda path: reads.append(path) or whole(path))
    given = {"steps": 2, "class_labels": 0, "policy": f"cascade:{path}"}
    first = [SampleBatch.of(served(), 1, **given).draft for _ in range(3)]
    assert len(reads) == 1
    assert first[0].file is first[2].file  # so that samples of all requests share a pass
    before = os.stat(path)
    written(tmp_path, share=0.9)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert SampleBatch.of(served(), 1, **given).draft.threshold == settings().threshold(0.9)
    assert len(reads) == 2


def rewritten(change: Callable[[dict, dict], None]) -> Callable[[Path], str]:
    """Makes a file of which tensors, or what describes them, have been changed."""

    def make(folder: Path) -> str:
        path = folder / "changed.safetensors"
        tensors = load_file(written(folder))
        cascade = {"student": student().config.to_dict(), "oracle": oracle().config.to_dict()}
        cascade |= json.loads(json.dumps(dataclasses.asdict(settings())))
        change(tensors, cascade)
        write_tensors(path, tensors, {"cascade": cascade})
        return str(path)

    return make


def other_samples(folder: Path) -> str:
    """A student of another noise schedule."""
    made = Model(dataclasses.replace(student().config, schedule="cosine"))
    scramble(made.backbone, 0.3)
    write_cascade(folder / "other.safetensors", made, oracle(), settings())
    return str(folder / "other.safetensors")


def deeper(folder: Path) -> str:
    network = dataclasses.replace(SERVED.network, depth=6)
    made = Model(dataclasses.replace(student().config, network=network))
    write_cascade(folder / "deep.safetensors", made, oracle(), settings())
    return str(folder / "deep.safetensors")


def a_model(folder: Path) -> str:
    adadiff.save(student(), folder / "model.safetensors")
    return str(folder / "model.safetensors")


def truncated(folder: Path) -> str:
    path = folder / "short.safetensors"
    path.write_bytes(Path(written(folder)).read_bytes()[:-7])
    return str(path)


BAD = {
    "missing": (lambda folder: str(folder / "none"), "no model|no such file|neither"),
    "truncated": (truncated, "not a readable safetensors file"),
    "a model": (a_model, "holds no cascade"),
    "other samples": (other_samples, "student must draw the same samples .* schedule cosine instead of linear"),
    "deeper than its teacher": (deeper, "the student has 7 blocks, its teacher 5"),
    "nan": (rewritten(lambda t, c: t["oracle.hidden.weight"].fill_(torch.nan)), "NaN or infinity"),
    "integers": (rewritten(lambda t, c: t.update({"oracle.score.bias": torch.zeros(1).int()})), "floating point"),
    "a tensor missing": (rewritten(lambda t, c: t.pop("oracle.score.bias")), "missing score.bias"),
    "a tensor too many": (rewritten(lambda t, c: t.update({"critic.x": torch.zeros(1)})), "unexpected critic.x"),
    "no oracle": (rewritten(lambda t, c: c.pop("oracle")), "it lacks oracle"),
    "another oracle": (rewritten(lambda t, c: c["oracle"].update(image_size=8)), "is for other image shapes"),
    "an unknown key": (rewritten(lambda t, c: c.update(height=3)), "unknown key height"),
    "steps": (rewritten(lambda t, c: c.update(steps=0)), "integer from 1 to 1000, got 0"),
    "a noisy solver": (rewritten(lambda t, c: c.update(solver="ddim:1")), "adds noise"),
    "an unknown solver": (rewritten(lambda t, c: c.update(solver="euler")), "no solver 'euler'"),
    "few quantiles": (rewritten(lambda t, c: c["quantiles"].pop()), "99 quantiles"),
    "quantiles that fall": (rewritten(lambda t, c: c["quantiles"].reverse()), "ascend"),
    "quantiles of text": (rewritten(lambda t, c: c.update(quantiles=["a"] * 99)), "are numbers"),
    "a mode": (rewritten(lambda t, c: c.update(mode="repeat")), "refine or regenerate"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_files(tmp_path: Path, name: str) -> None:
    make, match = BAD[name]
    policy = f"cascade:{make(tmp_path)}"
    with pytest.raises(ValueError, match=match) as refused:
        adadiff.sample(served(), 2, steps=2, class_labels=[0, 1], policy=policy)
    assert "\n" not in str(refused.value)
    with (
        adadiff.Engine(served(), capacity=2) as engine,
        pytest.raises(ValueError, match=match),
    ):
        engine.submit(seed=0, class_labels=0, steps=2, policy=policy)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"init_image": torch.zeros(1, 4, 4)}, "leave init_image out"),
        ({"solver": "ddim:spacing=trailing-diffusers"}, "do not land on its timesteps"),
        ({"options": ",mode=refine,sigma=0.9999999"}, "no noise level of sigma = 1"),
        ({"options": ",sigma=0.4", "file_mode": "regenerate"}, "give mode=refine"),
        ({"options": ",share=1,sigma=0.5+reuse:every=2,dense_early=8", "steps": 12}, r"reuse in \d steps"),
    ],
)
def test_requests_that_a_cascade_cannot_follow(tmp_path: Path, given: dict, match: str) -> None:
    path = written(tmp_path, mode=given.pop("file_mode", "refine"))
    policy = f"cascade:{path}{given.pop('options', '')}"
    with pytest.raises(ValueError, match=match):
        adadiff.sample(served(), 1, **{"steps": 4, "class_labels": 0, "policy": policy, **given})


def test_what_cannot_be_settings() -> None:
    for change in ({"share": 2.0}, {"sigma": 0.0}, {"steps": 1001}, {"solver": 3}, {"quantiles": ()}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}|quantiles"):
            CascadeSettings(**{**dataclasses.asdict(settings()), **change})
    for change in ({"channels": 0}, {"classes": -1}, {"width": 1.5}):
        with pytest.raises(ValueError, match="of an oracle must be an integer"):
            OracleConfig(**{"channels": 1, "image_size": 4, "classes": 3, **change})


def test_a_file_cannot_name_a_class_as_its_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else opening it would import the module."""
    monkeypatch.setattr("adadiff.spelling.importlib", None)
    for solver in ("os:system", "sampler.own_rules:Own:steps=3"):
        with pytest.raises(ValueError, match="no solver"):
            dataclasses.replace(settings(), solver=solver)


def test_an_oracle_of_no_classes_needs_no_label(tmp_path: Path) -> None:
    """Of a student with classes, too."""
    blind = Oracle(OracleConfig(channels=1, image_size=4, classes=0, width=2)).requires_grad_(False)
    scramble(blind, 0.5)
    write_cascade(tmp_path / "blind.safetensors", student(), blind, settings())
    given = {"steps": 4, "policy": f"cascade:{tmp_path / 'blind.safetensors'},share=0"}
    images, report = adadiff.sample(served(), 3, class_labels=[0, 1, 2], **given)
    torch.testing.assert_close(report.oracle_scores, blind(images, None))
    unlabelled, report = adadiff.sample(served(), 2, **{**given, "policy": f"cascade:{written(tmp_path)},share=0"})
    torch.testing.assert_close(report.oracle_scores, oracle()(unlabelled, torch.tensor([3, 3])))


def test_a_cascade_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a cascade, not a model; draw .* with the policy 'cascade:"):
        adadiff.load(written(tmp_path))
