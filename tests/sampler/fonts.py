"""Fonts for tests: DejaVu as matplotlib ships it, and variants of it that break one rule each."""

import io
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from fontTools.ttLib.tables._g_l_y_f import Glyph

SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SANS, SERIF, MONO = (SHIPPED / f"DejaVu{name}.ttf" for name in ("Sans", "Serif", "SansMono"))

Change = Callable[[TTFont], None]


@cache
def reduced(start: Path) -> bytes:
    """The font with letters and digits alone: writing thousands of glyphs takes seconds. Names stay, hinting goes."""
    options = Options(hinting=False, notdef_outline=True, name_IDs=["*"], glyph_names=True)
    with TTFont(start) as font:
        subsetter = Subsetter(options)
        subsetter.populate(text=string.ascii_letters + string.digits)
        subsetter.subset(font)
        font.save(file := io.BytesIO())
    return file.getvalue()


def variant(path: Path, family: str, change: Change | None = None, start: Path = SANS, style: str = "Regular") -> Path:
    """The letters and digits of `start` under another family name."""
    with TTFont(io.BytesIO(reduced(start))) as font:
        if change is not None:
            change(font)
        for number, text in ((1, family), (2, style), (4, f"{family} {style}")):
            font["name"].setName(text, number, 3, 1, 0x409)
        font["name"].names = [n for n in font["name"].names if n.platformID == 3 and n.nameID not in (16, 17)]
        font.save(path)
    return path


def glyph(font: TTFont, character: str) -> str:
    return font.getBestCmap()[ord(character)]


def erased(characters: str) -> Change:
    """Their outlines are empty."""

    def change(font: TTFont) -> None:
        for character in characters:
            font["glyf"][glyph(font, character)] = Glyph()

    return change


def unmapped(characters: str) -> Change:
    def change(font: TTFont) -> None:
        for table in font["cmap"].tables:
            for character in characters:
                table.cmap.pop(ord(character), None)

    return change


def drawn_as(pairs: dict[str, str]) -> Change:
    """Each character is drawn as another one."""

    def change(font: TTFont) -> None:
        names = {one: glyph(font, other) for one, other in pairs.items()}
        for table in font["cmap"].tables:
            for one, name in names.items():
                if ord(one) in table.cmap:
                    table.cmap[ord(one)] = name

    return change


def stretched(share: float, characters: str) -> Change:
    """These are so much wider. A scale of the whole font would not show: drawing fits it to the image."""

    def change(font: TTFont) -> None:
        for character in characters:
            outline = font["glyf"][glyph(font, character)]
            if outline.numberOfContours > 0:
                outline.coordinates.scale((share, 1))
                outline.recalcBounds(font["glyf"])

    return change


def raised(factor: float, characters: str) -> Change:
    """These are so much taller, so that all others shrink."""

    def change(font: TTFont) -> None:
        for character in characters:
            outline = font["glyf"][glyph(font, character)]
            outline.coordinates.scale((1, factor))
            outline.recalcBounds(font["glyf"])

    return change
