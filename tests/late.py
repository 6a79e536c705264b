"""Counts that the host sees late, as it does while a device is busy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from adadiff.forward import forward as engine
from adadiff_kernels import DeviceSet


class LateWord:
    """In place of `PinnedCount`: what is posted shows `delay()` posts later, never before what was posted earlier."""

    def __init__(self, delay: Callable[[], float]):
        self._delay, self._now = delay, 0
        self._posted: list[tuple[float, int]] = [(0, 0)]

    def post(self, word: Tensor) -> None:
        self._now += 1
        shows = max(self._posted[-1][0], self._now + self._delay())
        self._posted.append((shows, int(word)))

    def read(self) -> int:
        return [word for shows, word in self._posted if shows <= self._now][-1]


def use_sets(monkeypatch: pytest.MonkeyPatch, make: Callable[[int, torch.device], DeviceSet]) -> None:
    """Forward passes on a device run on what `make` makes."""

    @contextmanager
    def device_set(B: int, device: torch.device) -> Iterator[DeviceSet]:
        active = make(B, device)
        active.start()
        yield active

    monkeypatch.setattr(engine, "device_set", device_set)


def late(monkeypatch: pytest.MonkeyPatch, delay: Callable[[], float]) -> None:
    use_sets(monkeypatch, lambda B, device: DeviceSet(B, device, word=LateWord(delay)))
