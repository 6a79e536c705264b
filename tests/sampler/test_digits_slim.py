"""What DDSM promises, measured on the slimmable model of the package and on the schedule that was found for it."""

import dataclasses
from functools import cache
from itertools import pairwise

import pytest
import torch

import adadiff
from adadiff.checkpoint import read_tensors
from adadiff.data.digits import digits
from adadiff.diffusion.solvers import DDIM
from adadiff.forward.narrow import narrow
from adadiff.metrics.features import digits_network
from adadiff.metrics.frechet import FeatureStatistics, frechet_distance
from adadiff.metrics.quality import as_reference
from adadiff.metrics.references import extract
from adadiff.model import Model
from adadiff.policies.width import Width
from adadiff.policies.width_file import width_from
from adadiff.reading import read_json
from adadiff.training.config import TrainConfig, load_config

WIDTHS = (0.25, 0.5, 0.75, 1.0)
STEPS, N = 10, 400
UNSEEN = 7 * 10**6  # the first seed, far from those that the search drew


@cache
def model() -> Model:
    return adadiff.load("digits_slim")


@cache
def distance(width: Width, seed: int = UNSEEN) -> tuple[float, float]:
    """Fréchet distance of N digits to the held-out scans, and the share of the multiply-adds."""
    given = {"seed": list(range(seed, seed + N)), "class_labels": [i % 10 for i in range(N)]}
    images, report = adadiff.sample(model(), N, steps=STEPS, batch=200, policy=width, **given)
    features = digits_network().features
    statistics = as_reference(None, features, torch.device("cpu")).statistics
    found = FeatureStatistics.of(extract(features, [images.clamp(-1, 1)]))
    return frechet_distance(found, statistics), report.macs / report.macs_full


def halves(early: float, late: float) -> Width:
    """One width for the noisier half of the steps, one for the others."""
    t = sorted(DDIM().table(model().schedule, STEPS).t.tolist())
    return Width(((t[STEPS // 2 - 1] + t[STEPS // 2]) / 2,), (late, early))


def test_it_is_what_its_recipe_makes() -> None:
    config = load_config("digits_slim", {})
    assert config.model == model().config
    notes = read_tensors(adadiff.checkpoint.find("digits_slim"))[1]["notes"]
    assert TrainConfig(**notes["train"]) == config
    assert notes["step"] == config.steps


def test_its_card_shows_what_the_search_measured() -> None:
    folder = adadiff.checkpoint.find("digits_slim").parent
    found = read_json(folder / "digits_slim.json")
    quality = found["quality"]
    known = [(f"width:{one['width']:g}", one["share"], one["measured"]) for one in quality["uniform"]]
    known.append(("width:digits_slim", found["share"], quality["measured"]))
    card = (folder / "digits.md").read_text()
    assert "\n".join(f"| `{name}` | {share:.1%} | {value:.3f} |" for name, share, value in known) in card


@torch.no_grad()
def test_the_loss_is_ordered_by_width_in_every_stretch_of_time() -> None:
    """On held-out scans, the same noise for all widths."""
    images, labels = digits("test")
    draw = torch.Generator().manual_seed(0)
    for k in range(10):
        u = (k + torch.rand(len(images), generator=draw, dtype=torch.float64)) / 10
        t, alpha_bar = model().schedule.training_times(u)
        noise, a = torch.randn(images.shape, generator=draw), alpha_bar.float()[:, None, None, None]
        given = a.sqrt() * images + (1 - a).sqrt() * noise, t.float(), labels
        losses = [float((narrow(model(), width).backbone(*given) - noise).square().mean()) for width in WIDTHS]
        assert losses == sorted(losses, reverse=True), k
        assert len(set(losses)) == len(WIDTHS)


@pytest.mark.slow
def test_narrow_at_noise_beats_narrow_at_data() -> None:
    for seed in (UNSEEN, 2 * UNSEEN, 3 * UNSEEN):
        noise, data = distance(halves(0.25, 1.0), seed), distance(halves(1.0, 0.25), seed)
        assert noise[1] == data[1] < 0.7
        assert noise[0] < 0.9 * data[0]


@pytest.mark.slow
def test_the_search_beats_one_width_of_the_same_work() -> None:
    """Widths of all times, interpolated to the multiply-adds of the schedule, from the same noises."""
    found, share = distance(dataclasses.replace(width_from("digits_slim"), source=None))
    uniform = sorted(distance(Width((), (width,)))[::-1] for width in WIDTHS)
    (low, above), (high, below) = next(pair for pair in pairwise(uniform) if pair[1][0] >= share)
    assert low <= share <= high
    assert found < above + (below - above) * (share - low) / (high - low)
