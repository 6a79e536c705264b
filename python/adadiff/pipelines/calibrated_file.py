"""Files of calibrated caches, and checks that one fits a pipeline."""

from pathlib import Path
from typing import Any

from torch import nn

from ..policies.calibrated_cache import CalibratedCache
from ..reading import read_text
from ..writing import replace_file

ENDING = ".json"


def save_cache(cache: CalibratedCache, path: Path, force: bool = False) -> None:
    """Writes the file atomically. Raises FileExistsError if it exists, unless `force`."""
    replace_file(path, lambda temporary: temporary.write_text(cache.to_json(), encoding="utf-8"), force=force)


def load_cache(path: str | Path) -> CalibratedCache:
    """Reads a file of `save_cache`. Raises ValueError for other files, FileNotFoundError if there is none."""
    try:
        return CalibratedCache.from_json(read_text(Path(path)))
    except ValueError as error:
        raise ValueError(f"cannot use policy {path}: {error}") from None


def check_fits(cache: CalibratedCache, pipe: Any, transformer: nn.Module, blocks: int, tied: bool) -> None:
    """Raises ValueError unless the cache was calibrated for such a pipeline. blocks: number of the transformer's."""
    now = {
        "transformer": type(transformer).__name__,
        "blocks": blocks,
        "scheduler": type(getattr(pipe, "scheduler", None)).__name__,
        "tied": tied,
    }
    for name, value in now.items():
        if getattr(cache, name) != value:
            raise ValueError(
                f"'{cache}' was calibrated for {name} {getattr(cache, name)}, here it is {value}; calibrate anew"
            )
