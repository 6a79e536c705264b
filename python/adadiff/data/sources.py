"""Training data by name: "digits", "digits_prototypes", "canvases:side=3,hard=0.75,n=50000,seed=1", "letters:FILE"
(what `adadiff data letters` wrote), or a published data set and the folder that holds it (datasets.py says in which
layout): "cifar10:PATH"."""

from . import datasets
from .canvases import Canvases
from .datasets import Dataset
from .digits import digits
from .image_sets import Images
from .letters import load_letters
from .prototypes import digits_prototypes

CANVASES = 20000  # where no n is given
MOST_CANVASES = 200_000  # all are in memory, in a few copies while they are drawn: 2 GB

SETTINGS = {
    "digits": {},
    "canvases": {"side": int, "hard": float, "n": int, "seed": int},
    "digits_prototypes": {},
}
LETTERS = "letters"
NAMES = (*SETTINGS, LETTERS, *datasets.NAMES)


def parse(text: str) -> tuple[str, dict[str, int | float | str]]:
    """A name and its settings, that of a published data set being its path. Raises ValueError for an unknown name or
    setting, one that is no number, and a data set without a path."""
    name, colon, rest = text.partition(":")
    if name == LETTERS:
        if not rest:
            raise ValueError("letters lie in a file that `adadiff data letters` writes; say which, as in letters:FILE")
        return name, {"path": rest}
    if name in datasets.NAMES:
        if not rest:
            raise ValueError(f"{name} lies in a folder of yours; say which, as in {name}:PATH")
        return name, {"path": rest}
    if name not in SETTINGS:
        raise ValueError(f"no training data {text!r}; there are {', '.join(NAMES)}")
    known, settings = SETTINGS[name], {}
    for part in rest.split(",") if colon else ():
        key, _, value = part.partition("=")
        if key not in known or key in settings:
            takes = f"takes {', '.join(f'{k}=NUMBER' for k in known)}, each once" if known else "takes no settings"
            raise ValueError(f"{name} {takes}; got {part!r}")
        try:
            settings[key] = known[key](value)
        except ValueError:
            raise ValueError(f"{key} of {name} is a number of type {known[key].__name__}, got {value!r}") from None
    return name, settings


def load(text: str, split: str = "train") -> Dataset:
    """One split, "train" or "test".

    Raises ValueError for a text that `parse` refuses, settings that cannot be, and a folder that does not hold what is
    expected there.
    """
    name, settings = parse(text)
    if name in datasets.NAMES:
        return datasets.load(name, split=split, **settings)
    if name == LETTERS:
        return load_letters(settings["path"], split)
    if name == "digits":
        return Images(*digits(split))
    if name == "digits_prototypes":
        return Images(*digits_prototypes(split))
    n, seed = int(settings.pop("n", CANVASES)), settings.pop("seed", 0)
    if not 1 <= n <= MOST_CANVASES:
        raise ValueError(f"n of canvases must be at least 1 and at most {MOST_CANVASES}, got {n}")
    return Images(*Canvases(**settings).draw(n, split, seed))
