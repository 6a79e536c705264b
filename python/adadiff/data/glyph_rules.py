"""Named rules that exclude fonts which are no clean Latin typefaces, by what they draw. The first broken rule counts.

images, everywhere: uint8 [62, 32, 32], the characters of `glyphs.CHARACTERS` as `glyphs.draw_font` draws them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .glyphs import CHARACTERS, SIZE

LEAST_INK = 5.0  # pixels of full ink; a thin dotless stroke has about ten
LEAST_CAPITALS = 9.0  # pixels: median height of A to Z
LEAST_DIFFERENCE = 0.003  # mean absolute difference of two characters, ink from 0 to 1
LEAST_CASES = 0.17  # mean difference of capitals and lower case, both scaled to the same box
CASES = "abdeghnqrt"  # lower case letters whose shape differs from the capital's
MOST_BOXES = 0  # characters that look like the font's glyph for missing characters
INK = 24  # grey value from which a pixel belongs to a character's box

CAPITALS, LOWER, DIGITS = slice(0, 26), slice(26, 52), slice(52, 62)


@dataclass(frozen=True)
class Broken:
    """rule: a key of RULES. detail: text for people."""

    rule: str
    detail: str


def missing_glyph(images: np.ndarray, nowhere: np.ndarray) -> str:
    """nowhere: uint8 [32, 32], the font's glyph for missing characters. If it is blank, missing characters are found by
    `blank_glyph`."""
    if not nowhere.any():
        return ""
    found = [c for c, image in zip(CHARACTERS, images, strict=True) if np.array_equal(image, nowhere)]
    return f"{_some(found)} drawn as a missing glyph" if len(found) > MOST_BOXES else ""


def blank_glyph(images: np.ndarray) -> str:
    ink = images.sum((1, 2), dtype=np.float64) / 255
    found = [c for c, amount in zip(CHARACTERS, ink, strict=True) if amount < LEAST_INK]
    return f"{_some(found)} blank or nearly so" if found else ""


def at_the_border(images: np.ndarray) -> str:
    edges = images[:, [0, -1]].any((1, 2)) | images[:, :, [0, -1]].any((1, 2))
    found = [c for c, touches in zip(CHARACTERS, edges, strict=True) if touches]
    return f"{_some(found)} at the border of the image" if found else ""


def too_small(images: np.ndarray) -> str:
    """Swashes and ornaments of a few characters can shrink all others, which share their scale."""
    heights = [bottom - top for top, bottom, _, _ in map(_box, images[CAPITALS])]
    median = float(np.median(heights))
    return f"capitals are {median:g} pixels high, at least {LEAST_CAPITALS:g} wanted" if median < LEAST_CAPITALS else ""


def same_glyph(images: np.ndarray) -> str:
    """No two capitals, two lower case letters or two digits may look alike; I, l and 1, or O and 0, may."""
    ink = images.reshape(len(images), -1).astype(np.float32) / 255
    for part in (CAPITALS, LOWER, DIGITS):
        for i, j in combinations(range(part.start, part.stop), 2):
            if (difference := float(np.abs(ink[i] - ink[j]).mean())) < LEAST_DIFFERENCE:
                return f"{CHARACTERS[i]} and {CHARACTERS[j]} differ by {difference:.4f}"
    return ""


def one_case(images: np.ndarray) -> str:
    """Finds fonts that draw lower case letters as (small) capitals, which would contradict their labels."""
    both = ((CHARACTERS.index(c.upper()), CHARACTERS.index(c)) for c in CASES)
    differences = [np.abs(boxed(images[i]) - boxed(images[j])).mean() for i, j in both]
    mean = float(np.mean(differences))
    return f"capitals and lower case differ by {mean:.3f} on the average" if mean < LEAST_CASES else ""


ON_IMAGES: dict[str, Callable[[np.ndarray], str]] = {
    "blank glyph": blank_glyph,
    "at the border": at_the_border,
    "too small": too_small,
    "same glyph": same_glyph,
    "one case": one_case,
}
RULES = {  # in the order in which they are applied
    "unreadable": "fontTools or FreeType refuses the file, or it names no family",
    "missing glyph": "some of the 62 characters look like the font's glyph for missing characters",
    "blank glyph": f"some of the 62 characters have ink for less than {LEAST_INK:g} full pixels",
    "at the border": "some of the 62 characters touch the border of the image",
    "too small": f"the median height of the capitals is below {LEAST_CAPITALS:g} pixels",
    "same glyph": "two capitals, two lower case letters or two digits look alike",
    "one case": "lower case letters are drawn as capitals",
    "duplicate": "it draws the same as a family that was kept before",
    "not read": "classifiers trained on other families read too few of its capitals, lower case letters or digits",
}


def broken_rule(images: np.ndarray, nowhere: np.ndarray) -> Broken | None:
    """The first rule on images that a font breaks. images: uint8 [62, 32, 32]; nowhere: see `missing_glyph`."""
    if detail := missing_glyph(images, nowhere):
        return Broken("missing glyph", detail)
    for rule, check in ON_IMAGES.items():
        if detail := check(images):
            return Broken(rule, detail)
    return None


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Images for finding duplicates: ink averaged over 2x2 pixels, float32 [n, 62, 16, 16] in [0, 1], of fonts
    [n, 62, 32, 32]."""
    return _halved(images) / 255


@dataclass
class Designs:
    """Thumbnails of the fonts kept so far, for nearest-neighbour search; `coarse`: their means over 4x4 pixels."""

    names: list[str]
    fine: np.ndarray
    coarse: np.ndarray

    @classmethod
    def room_for(cls, n: int) -> "Designs":
        side = SIZE // 2
        return cls(
            [],
            np.empty((n, len(CHARACTERS), side, side), np.float32),
            np.empty((n, len(CHARACTERS), side // 4, side // 4), np.float32),
        )

    def add(self, name: str, thumbnail: np.ndarray) -> None:
        self.fine[len(self.names)] = thumbnail
        self.coarse[len(self.names)] = _halved(_halved(thumbnail))
        self.names.append(name)

    def nearest(self, thumbnail: np.ndarray) -> tuple[str, float]:
        """Name and mean absolute difference of the nearest design; ("", infinity) if there is none.

        The difference of the coarse images is a lower bound of that of the fine ones, which rules out most designs.
        """
        n = len(self.names)
        bounds = np.abs(self.coarse[:n] - _halved(_halved(thumbnail))).mean((1, 2, 3))
        best, name = float("inf"), ""
        for index in bounds.argsort():
            if bounds[index] > best:
                break
            if (difference := float(np.abs(self.fine[index] - thumbnail).mean())) < best:
                best, name = difference, self.names[index]
        return name, best


def _halved(images: np.ndarray) -> np.ndarray:
    """Means over 2x2 pixels, float32."""
    *lead, H, W = images.shape
    return images.reshape(*lead, H // 2, 2, W // 2, 2).mean((-3, -1), dtype=np.float32)


def _box(image: np.ndarray) -> tuple[int, int, int, int]:
    """top, bottom, left, right of the ink, ends excluded; all 0 without ink."""
    rows, columns = (np.flatnonzero((image >= INK).any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0, 0, 0, 0
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def boxed(image: np.ndarray) -> np.ndarray:
    """The ink's bounding box scaled to 16x16 by nearest neighbours, float32 in [0, 1]."""
    top, bottom, left, right = _box(image)
    if bottom == top:
        return np.zeros((16, 16), np.float32)
    rows = top + (np.arange(16) * (bottom - top) + (bottom - top) // 2) // 16
    columns = left + (np.arange(16) * (right - left) + (right - left) // 2) // 16
    rows, columns = rows.clip(max=bottom - 1), columns.clip(max=right - 1)
    return image[np.ix_(rows, columns)].astype(np.float32) / 255


def _some(characters: list[str]) -> str:
    return "".join(characters[:6]) + (f" and {len(characters) - 6} more" if len(characters) > 6 else "")
