"""Training data by name: "digits", "digits_prototypes", "canvases:side=3,hard=0.75,n=50000,seed=1", "letters:FILE"
(which `adadiff data letters` writes), a published data set and its folder, as in "cifar10:FOLDER" (see datasets.py), or
a `Source` of your own as "module:Class"."""

from collections.abc import Callable
from dataclasses import dataclass

from ..spelling import Entry, Registry
from . import datasets
from .canvases import Canvases
from .datasets import Dataset
from .digits import digits
from .image_sets import Images
from .letters import load_letters
from .prototypes import digits_prototypes

MOST_CANVASES = 200_000  # all are in memory, in a few copies while they are drawn: 2 GB


class Source:
    """Base class of sources of data. It is constructed from text and checked before anything is read."""

    def load(self, split: str) -> Dataset:
        """One split, "train" or "test". Raises ValueError if the source does not have it."""
        raise NotImplementedError


@dataclass(frozen=True)
class DigitsSource(Source):
    def load(self, split: str) -> Dataset:
        return Images(*digits(split))


@dataclass(frozen=True)
class PrototypesSource(Source):
    def load(self, split: str) -> Dataset:
        return Images(*digits_prototypes(split))


@dataclass(frozen=True)
class CanvasesSource(Source):
    """n canvases, drawn with `seed`; side and hard as in `Canvases`."""

    side: int = 2
    hard: float = 0.5
    n: int = 20_000
    seed: int = 0

    @property
    def canvases(self) -> Canvases:
        return Canvases(self.side, self.hard)

    def load(self, split: str) -> Dataset:
        if not 1 <= self.n <= MOST_CANVASES:
            raise ValueError(f"n of canvases must be at least 1 and at most {MOST_CANVASES}, got {self.n}")
        return Images(*self.canvases.draw(self.n, split, self.seed))


@dataclass(frozen=True)
class LettersSource(Source):
    path: str

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("letters need a file, as in letters:FILE; `adadiff data letters` writes it")

    def load(self, split: str) -> Dataset:
        return load_letters(self.path, split)


@dataclass(frozen=True)
class PublishedSource(Source):
    """name: of datasets.NAMES."""

    path: str
    name: str

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f"{self.name} needs the folder that holds it, as in {self.name}:FOLDER")

    def load(self, split: str) -> Dataset:
        return datasets.load(self.name, self.path, split)


def _published(name: str) -> Callable[[str], PublishedSource]:
    def make(path: str) -> PublishedSource:
        return PublishedSource(path, name)

    return make


SOURCES: Registry[Source] = Registry(
    "training data",
    (
        Entry("digits", DigitsSource),
        Entry("canvases", CanvasesSource),
        Entry("digits_prototypes", PrototypesSource),
        Entry("letters", LettersSource, "path", path=True, words={"path": "FILE"}),
        *(Entry(name, _published(name), "path", path=True, words={"path": "FOLDER"}) for name in datasets.NAMES),
    ),
    Source,
)


def load(text: str, split: str = "train") -> Dataset:
    """One split, "train" or "test", of the data that `text` names, see above.

    Raises ValueError for an unknown name, invalid settings, and a file or folder without the expected content.
    """
    return SOURCES.read(text).load(split)
