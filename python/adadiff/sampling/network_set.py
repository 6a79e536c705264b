"""The networks that samples in flight may run, and the network that each sample runs now."""

from collections.abc import Sequence

import numpy as np

from ..forward.narrow import WidthChoice
from ..forward.networks import Network, NetworkChoice
from ..model import Model


class NetworkSet:
    """networks[0] is the batch's own model. Choices have numbers; 0: none, the model at all times.

    keys: int64 [networks], a unique, permanent number of each network (indices change when networks are dropped).
    """

    def __init__(self, model: Model) -> None:
        self.networks = [Network(model, asks=True)]
        self.keys, self._next_key = np.zeros(1, dtype=np.int64), 1
        self._choices: list[tuple[NetworkChoice, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._choices)

    def add(self, choice: NetworkChoice | None) -> int:
        """Adds a choice if it is new. Returns its number."""
        if choice is None:
            return 0
        for number, (known, _) in enumerate(self._choices, start=1):
            if known is choice:
                return number
        index = np.array([0, *map(self.place, choice.networks)])
        self._choices.append((choice, index))
        return len(self._choices)

    def place(self, network: Network) -> int:
        """The index of `network` in `networks`, which it is added to if new."""
        for place, known in enumerate(self.networks):
            if known.model is network.model and known.asks == network.asks:
                return place
        self.networks.append(network)
        self.keys, self._next_key = np.append(self.keys, self._next_key), self._next_key + 1
        return len(self.networks) - 1

    def now(self, choice: np.ndarray, t: np.ndarray) -> np.ndarray | None:
        """The index of the network that each sample runs, int64 [k]; None if all run the model. choice: int64 [k],
        numbers of choices; t: float32 [k], the network's times."""
        present = set(choice.tolist()) - {0}
        if not present:
            return None
        found = np.zeros(len(t), dtype=np.int64)
        for number in present:
            chooser, index = self._choices[number - 1]
            chosen = choice == number
            found[chosen] = index[chooser.choose(t[chosen])]
        return found if found.any() else None

    def narrowing(self, choice: np.ndarray, t: np.ndarray) -> np.ndarray | None:
        """bool [2, k]: samples with a width policy, and samples that run at a width below 1; None if no sample has such
        a policy. Arguments as for `now`."""
        found = np.zeros((2, len(t)), dtype=bool)
        for number in set(choice.tolist()) - {0}:
            chooser, _ = self._choices[number - 1]
            if isinstance(chooser, WidthChoice):
                chosen = choice == number
                found[0, chosen], found[1, chosen] = True, chooser.policy.widths_at(t[chosen]) < 1
        return found if found[0].any() else None

    def keep(self, used: np.ndarray) -> np.ndarray:
        """Drops all choices but those in used: int64 [n], numbers. Returns their new numbers, int64 [n]."""
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
