"""The networks that samples in flight may run, and which of them each runs now."""

from collections.abc import Sequence

import numpy as np

from ..forward.narrow import WidthChoice
from ..forward.networks import Network, NetworkChoice
from ..model import Model


class NetworkSet:
    """networks[0] is the batch's own model. Choices are known by number, 0 for none: the model at all times.

    keys: int64 [networks], numbers of networks that stay when others are forgotten, and are not given twice.
    """

    def __init__(self, model: Model) -> None:
        self.networks = [Network(model, asks=True)]
        self.keys, self._next_key = np.zeros(1, dtype=np.int64), 1
        self._choices: list[tuple[NetworkChoice, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._choices)

    def add(self, choice: NetworkChoice | None) -> int:
        """The number of the choice, the same for the same one."""
        if choice is None:
            return 0
        for number, (known, _) in enumerate(self._choices, start=1):
            if known is choice:
                return number
        index = np.array([0, *map(self.place, choice.networks)])
        self._choices.append((choice, index))
        return len(self._choices)

    def place(self, network: Network) -> int:
        """Its index among `networks`."""
        for place, known in enumerate(self.networks):
            if known.model is network.model and known.asks == network.asks:
                return place
        self.networks.append(network)
        self.keys, self._next_key = np.append(self.keys, self._next_key), self._next_key + 1
        return len(self.networks) - 1

    def now(self, choice: np.ndarray, t: np.ndarray) -> np.ndarray | None:
        """choice: int64 [k], numbers; t: float32 [k], the network's times. Returns int64 [k], indices of networks; None
        where all run the model."""
        present = set(choice.tolist()) - {0}
        if not present:
            return None
        found = np.zeros(len(t), dtype=np.int64)
        for number in present:
            chooser, index = self._choices[number - 1]
            own = choice == number
            found[own] = index[chooser.choose(t[own])]
        return found if found.any() else None

    def narrowing(self, choice: np.ndarray, t: np.ndarray) -> np.ndarray | None:
        """As `now`; returns bool [2, k]: whose choice is a policy of widths, and who runs at one below 1. None where
        nobody's is."""
        found = np.zeros((2, len(t)), dtype=bool)
        for number in set(choice.tolist()) - {0}:
            chooser, _ = self._choices[number - 1]
            if isinstance(chooser, WidthChoice):
                own = choice == number
                found[0, own], found[1, own] = True, chooser.policy.widths_at(t[own]) < 1
        return found if found[0].any() else None

    def keep(self, used: np.ndarray) -> np.ndarray:
        """Forgets choices that are not used: int64 [n], numbers. Returns their new numbers."""
        kept = sorted(set(used.tolist()) - {0})
        choices: Sequence[NetworkChoice] = [self._choices[number - 1][0] for number in kept]
        before = list(zip(self.networks, self.keys.tolist(), strict=True))
        self._choices, self.networks, self.keys = [], self.networks[:1], self.keys[:1]
        for choice in choices:
            self.add(choice)
        for place, network in enumerate(self.networks):
            key = next((key for known, key in before if known.model is network.model and known.asks == network.asks))
            self.keys[place] = key
        return np.searchsorted(np.array([0, *kept]), used)
