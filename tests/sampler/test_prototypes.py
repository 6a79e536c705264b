"""Digits beside prototypes: which images, and that the prototypes are what they are said to be."""

import pytest
import torch

from adadiff.data import sources
from adadiff.data.digits import digits
from adadiff.data.prototypes import CLASSES, NOISE, class_means, digits_prototypes


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_scan_has_a_prototype_of_its_digit(split: str) -> None:
    images, labels = digits_prototypes(split)
    scans, own = digits(split)
    n = len(scans)
    assert torch.equal(images[:n], scans)
    assert torch.equal(labels[:n], own)
    assert torch.equal(labels[n:], own + 10)
    assert images.dtype == torch.float32
    assert -1 <= float(images.min()) <= float(images.max()) <= 1
    train, of_train = digits("train")
    for digit in range(10):
        mean = train[of_train == digit].double().mean(0)
        torch.testing.assert_close(class_means()[digit].double(), mean, rtol=0, atol=1e-6)
        prototypes = images[n:][own == digit].double()
        inside = (mean > -0.8) & (mean < 0.8)  # elsewhere pixels end at -1 or 1
        residual = (prototypes - mean)[:, inside]
        assert float(residual.std()) == pytest.approx(NOISE, rel=0.06)
        assert float(residual.mean().abs()) < 4 * NOISE / residual.numel() ** 0.5


def test_noise_is_that_of_the_split() -> None:
    train, test = (digits_prototypes(split)[0] for split in ("train", "test"))
    assert torch.equal(digits_prototypes("test")[0], test)
    count = len(test) // 2
    assert not torch.equal(train[-count:], test[-count:])


def test_training_takes_them_by_name() -> None:
    data = sources.load("digits_prototypes", "test")
    assert (data.shape, data.classes, len(data)) == ((1, 8, 8), CLASSES, 710)
    with pytest.raises(ValueError, match="digits_prototypes takes no 'n=3'"):
        sources.load("digits_prototypes:n=3")
    with pytest.raises(ValueError, match="split must be 'train' or 'test'"):
        digits_prototypes("all")
