"""The noise integers are Philox's, the values a fixed function of them, and both belong to the sample."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adadiff_kernels import extension
from adadiff_kernels.philox import philox4x32, philox_normal, reference

# Random123, tests/kat_vectors, "philox4x32 10"
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011 with Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def normal_in_numpy(seed: int, step: int, stream: int, count: int) -> np.ndarray:
    values = []
    for block in range(math.ceil(count / 4)):
        w = philox_in_python([block, step, stream, 0], [seed % 2**32, seed // 2**32])
        for w_radius, w_angle in ((w[0], w[1]), (w[2], w[3])):
            radius = np.sqrt(-2 * np.log(np.float64(w_radius + 1) / 2**32))
            angle = 2 * np.pi * (np.float64(w_angle) / 2**32)
            values += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.array(values[:count], np.float64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    result = philox4x32(torch.tensor(words(counter)), torch.tensor(words(key)))
    assert result.tolist() == words(expected)


def test_published_vectors_in_one_batch_and_by_broadcasting() -> None:
    counter, key, expected = (torch.tensor([words(row[i]) for row in KNOWN_ANSWERS]) for i in range(3))
    assert torch.equal(philox4x32(counter, key), expected)
    grid = philox4x32(counter[:, None], key)  # every counter with every key
    assert grid.shape == (3, 3, 4)
    assert torch.equal(grid[range(3), range(3)], expected)
    assert len({tuple(word) for word in grid.flatten(0, 1).tolist()}) == 9


word = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(word, min_size=4, max_size=4), st.lists(word, min_size=2, max_size=2))
def test_integers_equal_unbounded_integers(counter: list[int], key: list[int]) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == philox_in_python(counter, key)


@pytest.mark.usefixtures("core")
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1)), max_size=5),
    st.integers(0, 2**32 - 1),
    st.integers(0, 23),
)
def test_values_are_box_muller_of_the_integers(samples: list[tuple[int, int]], stream: int, count: int) -> None:
    seeds, step = torch.tensor(samples, dtype=torch.int64).reshape(-1, 2).unbind(1)
    values = philox_normal(seeds, step, stream, count)
    assert values.dtype == torch.float32
    assert values.shape == (len(samples), count)
    for value, (seed, at) in zip(values, samples, strict=True):
        expected = normal_in_numpy(seed, at, stream, count)
        # half a unit in the last place of float32, plus that of float64's functions
        np.testing.assert_allclose(value.double().numpy(), expected, rtol=2.0**-24 * 1.0001, atol=1e-15)


@pytest.mark.usefixtures("core")
def test_a_sample_keeps_its_values_in_any_batch_order_and_count() -> None:
    seeds, step = torch.tensor([7, 0, 2**63 - 1, 7, 2**32]), torch.tensor([3, 0, 19, 4, 3])
    together = philox_normal(seeds, step, 1, 75)
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(philox_normal(seeds[order], step[order], 1, 75), together[order])
    for i in range(5):
        for count in (0, 1, 2, 3, 4, 5, 74, 75):
            alone = philox_normal(seeds[i : i + 1], step[i : i + 1], 1, count)
            assert torch.equal(alone, together[i : i + 1, :count])


@pytest.mark.usefixtures("core")
def test_seed_step_stream_and_element_all_matter() -> None:
    def draw(seed: int, step: int, stream: int) -> Tensor:
        return philox_normal(torch.tensor([seed]), torch.tensor([step]), stream, 8)[0]

    # 2^32 differs from 0 in the high word of the key only
    rows = torch.stack([draw(0, 0, 0), draw(1, 0, 0), draw(2**32, 0, 0), draw(0, 1, 0), draw(0, 0, 1)])
    assert rows.unique().numel() == rows.numel()


def test_the_extreme_integers_give_finite_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def extremes(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([[w]]) for w in (0, 0, 2**32 - 1, 2**32 - 1))

    monkeypatch.setattr(extension, "core", None)
    monkeypatch.setattr(reference, "_rounds", extremes)
    zero = torch.zeros(1, dtype=torch.int64)
    largest, none, *last = philox_normal(zero, zero, 0, 4)[0].tolist()
    assert largest == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-7)  # u1 = 2^-32, the smallest
    assert none == 0
    assert [abs(value) for value in last] == [0, 0]  # u1 = 1


def test_the_core_makes_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    seeds, step = torch.tensor([0, 2**63 - 1, 2**32, 77])[::2], torch.tensor([2**32 - 1, 5])
    compiled = philox_normal(seeds, step, 2**32 - 1, 1023)
    monkeypatch.setattr(extension, "core", None)
    assert torch.equal(philox_normal(seeds, step, 2**32 - 1, 1023), compiled)


def test_bad_input() -> None:
    good = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"seeds must lie in \[0, 2\^63\), got -1 to 2"):
        philox_normal(torch.tensor([-1, 2]), good, 0, 4)
    with pytest.raises(ValueError, match="step must lie"):
        philox_normal(good, torch.tensor([0, -3]), 0, 4)
    with pytest.raises(ValueError, match="step must lie"):
        philox_normal(good, torch.tensor([0, 2**32]), 0, 4)
    with pytest.raises(ValueError, match="seeds must be int64"):
        philox_normal(good.int(), good, 0, 4)
    with pytest.raises(ValueError, match="seeds must be int64"):
        philox_normal(torch.tensor(1), good, 0, 4)
    with pytest.raises(ValueError, match="one length, got 2 and 1"):
        philox_normal(good, good[:1], 0, 4)
    with pytest.raises(ValueError, match="stream"):
        philox_normal(good, good, -1, 4)
    with pytest.raises(ValueError, match="count"):
        philox_normal(good, good, 0, -1)
    with pytest.raises(ValueError, match="counter and key must be int64"):
        philox4x32(torch.zeros(4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"got \(3,\) and"):
        philox4x32(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
