"""Training data by name: "digits", or "canvases:side=3,hard=0.75,n=50000,seed=1"."""

from torch import Tensor

from .canvases import Canvases
from .digits import digits

CANVASES = 20000  # where no n is given

SETTINGS = {"digits": {}, "canvases": {"side": int, "hard": float, "n": int, "seed": int}}


def parse(text: str) -> tuple[str, dict[str, int | float]]:
    """A name and its settings. Raises ValueError for an unknown name or setting, or one that is no number."""
    name, colon, rest = text.partition(":")
    if name not in SETTINGS:
        raise ValueError(f"no training data {text!r}; there are {', '.join(SETTINGS)}")
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


def load(text: str, split: str = "train") -> tuple[Tensor, Tensor]:
    """Images float32 [N, C, H, W] in [-1, 1] and labels int64 [N] of one split, "train" or "test".

    Raises ValueError for a text that `parse` refuses or settings that cannot be.
    """
    name, settings = parse(text)
    if name == "digits":
        return digits(split)
    n, seed = settings.pop("n", CANVASES), settings.pop("seed", 0)
    if n < 1:
        raise ValueError(f"n of canvases must be at least 1, got {n}")
    return Canvases(**settings).draw(n, split, seed)
