"""Canvases: what a label asks for spelled out in Python, scans that never cross the split, a judge that is right."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adadiff.data.canvases import BLANK, CLASSES, DIGITS, Canvases, follows
from adadiff.data.digits import digits
from adadiff.data.sources import SOURCES, load
from adadiff.metrics.canvases import canvas_features, follow_rules, read
from adadiff.metrics.features import digits_network

EACH = torch.arange(CLASSES)


def wanted(label: int, cells: int) -> list[int]:
    if label < 10:
        return [label] + [BLANK] * (cells - 1)
    return [int(str(label - 10 + i)[-1]) for i in range(cells)]


def tiles(image: torch.Tensor) -> list[torch.Tensor]:
    side = image.shape[-1] // 8
    return [image[0, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] for r in range(side) for c in range(side)]


@pytest.mark.parametrize("side", [2, 3])
def test_contents_are_what_the_label_says(side: int) -> None:
    assert Canvases(side).contents(EACH).tolist() == [wanted(label, side**2) for label in range(CLASSES)]


@given(st.lists(st.integers(BLANK, 9), min_size=4, max_size=4), st.integers(0, CLASSES - 1))
def test_the_rule_is_judged_as_it_is_stated(cells: list[int], label: int) -> None:
    """Any cells, and those of the label with one of them changed."""
    right = wanted(label, 4)
    one_wrong = [*right[:2], cells[2], right[3]]
    for contents in (cells, right, one_wrong):
        assert bool(follows(torch.tensor([contents]), torch.tensor([label]))) == (contents == right)


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cells_are_scans_of_their_own_split(side: int, split: str) -> None:
    canvases = Canvases(side)
    images, labels = canvases.draw(60, split, seed=5)
    assert images.shape == (60, 1, 8 * side, 8 * side)
    assert images.dtype == torch.float32
    scans, classes = digits(split)
    known = {scan.numpy().tobytes(): int(label) for scan, label in zip(scans[:, 0], classes, strict=True)}
    assert len(known) > 0.99 * len(scans)
    found = []
    for image in images:
        own = [tile.contiguous() for tile in tiles(image)]
        found.append([BLANK if bool((tile == -1).all()) else known[tile.numpy().tobytes()] for tile in own])
    assert found == [wanted(label, side**2) for label in labels.tolist()]


def test_every_scan_of_a_class_is_used() -> None:
    images, _ = Canvases(3).draw(4000, labels=10 + torch.arange(4000) % 10)
    used = {tile.contiguous().numpy().tobytes() for image in images for tile in tiles(image)}
    assert used == {scan.numpy().tobytes() for scan in digits("train")[0][:, 0]}


def test_a_canvas_is_a_function_of_its_arguments() -> None:
    first, labels = Canvases().draw(20, seed=2)
    again, same = Canvases().draw(20, seed=2)
    assert torch.equal(first, again)
    assert torch.equal(labels, same)
    assert not torch.equal(first, Canvases().draw(20, seed=3)[0])
    assert not torch.equal(labels, Canvases().draw(20, "test", seed=2)[1])
    own = torch.tensor([13, 4, 10])
    images, given_labels = Canvases().draw(3, labels=own)
    assert torch.equal(given_labels, own)
    assert torch.equal(images, Canvases().draw(3, labels=own)[0])


@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
def test_hard_is_the_share_that_counts(hard: float) -> None:
    labels = Canvases(hard=hard).labels(6000, torch.Generator().manual_seed(0))
    counts = labels >= DIGITS
    assert abs(float(counts.float().mean()) - hard) < 0.02
    for group in (labels[~counts], labels[counts] - DIGITS):
        if len(group):
            shares = torch.bincount(group, minlength=DIGITS).float() / len(group)
            assert float((shares - 1 / DIGITS).abs().max()) < 0.03


def test_the_judge_reads_scans_it_has_never_seen() -> None:
    """The ceiling of rule accuracy: all cells of a canvas must be read right. Easy ones have one, the others four."""
    images, labels = Canvases().draw(1500, "test")
    right = follow_rules(images, labels)
    assert float(right[labels < DIGITS].float().mean()) > 0.95
    assert float(right[labels >= DIGITS].float().mean()) > 0.85
    assert float(follow_rules(images, labels.roll(1)).float().mean()) < 0.25
    noise = torch.randn(200, 1, 16, 16)
    assert float(follow_rules(noise, labels[:200]).float().mean()) < 0.1
    assert bool((read(torch.full((2, 1, 24, 24), -1.0)) == BLANK).all())


def test_reading_and_features_are_by_cell() -> None:
    images, _ = Canvases(3).draw(7, "test")
    cells = torch.stack([torch.stack(tiles(image))[:, None] for image in images])  # [7, 9, 1, 8, 8]
    network = digits_network()
    features = torch.cat([network.features(own).flatten()[None] for own in cells])
    torch.testing.assert_close(canvas_features(images), features, rtol=1e-5, atol=1e-6)
    digit = torch.stack([network(own).argmax(1) for own in cells])
    dark = cells.flatten(2).mean(2) < -0.999
    assert torch.equal(read(images), digit.masked_fill(dark, BLANK))
    assert torch.equal(read(images * 3), read((images * 3).clamp(-1, 1)))


def test_no_scan_is_mistaken_for_an_empty_cell() -> None:
    assert float(digits("all")[0].flatten(1).mean(1).min()) > -0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Canvases(4), "side must be 2 or 3 cells, got 4"),
        (lambda: Canvases(hard=1.5), "hard must be a number in"),
        (lambda: Canvases().draw(-1), "n and seed must be integers >= 0, got -1"),
        (lambda: Canvases().draw(2, "dev"), "split must be"),
        (lambda: Canvases().draw(2, labels=torch.tensor([1])), r"labels must be int64 \[2\]"),
        (lambda: Canvases().draw(1, labels=torch.tensor([20])), r"labels must be in 0..19, got \[20\]"),
        (lambda: read(torch.zeros(1, 1, 12, 12)), "H a multiple of 8"),
        (lambda: read(torch.zeros(1, 3, 16, 16)), "H a multiple of 8"),
        (lambda: SOURCES.read("canvases:hard=2,hard=1"), "hard is given twice"),
        (lambda: SOURCES.read("canvases:colour=2"), r"canvases takes no 'colour=2'. There are canvases\[:side=N,"),
        (lambda: SOURCES.read("canvases:side=two"), "side must be a whole number, got 'two'"),
        (lambda: SOURCES.read("digits:n=3"), "digits takes no 'n=3'"),
        (lambda: SOURCES.read("canvas"), "no training data 'canvas'; there are digits, canvases"),
        (lambda: load("canvases:n=0"), "n of canvases must be at least 1"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_sources_by_name() -> None:
    data = load("canvases:side=3,hard=1,n=40,seed=7", "test")
    wanted, labels = Canvases(3, 1.0).draw(40, "test", 7)
    assert torch.equal(data.images, wanted)
    assert torch.equal(data.labels, labels)
    scans, classes = digits("train")
    assert torch.equal(load("digits").images, scans)
    assert torch.equal(load("digits").labels, classes)
    assert len(load("canvases")) == 20000
