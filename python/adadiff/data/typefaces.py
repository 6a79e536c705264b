"""Family, style and licence of font files, from their tables. Needs fontTools, which comes with matplotlib.

Only making the list of families (`python -m benchmarks.studies.typefaces`) needs this module; building the data set
from that list does not.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".otf", ".ttf")
REGULAR, BOLD = 400, 700  # weights, of the table OS/2
WIDTH = 5  # "medium" there
ITALIC_BITS = 1 | 1 << 9  # of fsSelection: italic, oblique
SLANT = re.compile(r"italic|oblique|slanted|kursiv|inclined", re.IGNORECASE)
STYLES = {"regular": (REGULAR, False), "bold": (BOLD, False), "italic": (REGULAR, True), "bold italic": (BOLD, True)}
LICENCES = {  # name -> pattern of texts that name it; the first match counts
    "OFL": r"\bofl\b|open font licen[cs]e",
    "Apache": r"apache",
    "GUST": r"gust font",
    "LPPL": r"\blppl|latex project public",
    "Bitstream Vera": r"bitstream|\bvera\b",
    "LGPL": r"\blgpl|lesser general public",
    "GPL with font exception": r"(?s)(\bgpl|general public).*(font exception|embed\w* (this|the) font|font embedding)",
    "GPL": r"a?gpl\b|gplv?[123]|general public licen[cs]e",
    "MIT": r"(?-i:\bMIT\b)|\bexpat\b|permission is hereby granted, free of charge",
    "CC0": r"\bcc0",
    "CC-BY-SA": r"cc-by-sa|attribution-share ?alike",
    "CC-BY": r"cc-by|creative commons attribution",
    "BSD": r"\bbsd\b",
    "public domain": r"public domain|\bpd\b",
    "Ubuntu": r"ubuntu font",
    "Knuth": r"\bknuth\b",
}


@dataclass(frozen=True)
class Typeface:
    """One font file. sha256: of its bytes. weight, width: as in the table OS/2. licence: a key of LICENCES, or "" if
    unknown."""

    path: Path
    sha256: str
    family: str
    style: str
    weight: int
    width: int
    italic: bool
    licence: str


def read_typeface(path: Path) -> Typeface:
    """Reads a font file. Raises ValueError for a file that is no outline font or has no family name, ImportError (with
    the pip command) without fontTools."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise ImportError("font files are read by fontTools: pip install fonttools") from error
    try:
        with TTFont(path, lazy=True) as font:
            if not {"glyf", "CFF ", "CFF2"} & set(font.keys()):
                raise ValueError("it has no outlines")
            if "cmap" not in font or not font.getBestCmap():
                raise ValueError("it maps no characters")
            names = font["name"]
            family, style = names.getDebugName(16) or names.getDebugName(1), names.getDebugName(17)
            if not family or not family.strip():
                raise ValueError("it names no family")
            style = style or names.getDebugName(2) or ""
            licence = licence_in(" ".join(names.getDebugName(i) or "" for i in (13, 14, 0)))
            weight, width, italic = REGULAR, WIDTH, bool(SLANT.search(style))
            if "OS/2" in font:
                table = font["OS/2"]
                weight, width = table.usWeightClass, table.usWidthClass
                italic = italic or bool(table.fsSelection & ITALIC_BITS)
            return Typeface(path, digest(path), " ".join(family.split()), style, weight, width, italic, licence)
    except ValueError:
        raise
    except Exception as error:  # fontTools raises any type for damaged tables
        raise ValueError(f"it cannot be read: {type(error).__name__} {error}") from error


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def licence_in(text: str) -> str:
    """The licence that a text names: a key of LICENCES, or ""."""
    return next((name for name, words in LICENCES.items() if re.search(words, text, re.IGNORECASE)), "")


def by_family(typefaces: Iterable[Typeface]) -> Mapping[str, list[Typeface]]:
    """Typefaces by family, sorted. Family names are compared without case, spaces, hyphens and underscores."""
    found: dict[str, list[Typeface]] = defaultdict(list)
    for typeface in sorted(typefaces, key=lambda t: (t.family, str(t.path))):
        found[re.sub(r"[\s_-]", "", typeface.family).lower()].append(typeface)
    return {faces[0].family: faces for _, faces in sorted(found.items())}


def chosen_styles(faces: Iterable[Typeface]) -> dict[str, Typeface]:
    """At most one file for each of STYLES. "regular" is always there: if possible upright, of normal width and of a
    weight near 400, in this order of importance. Each other style must be within 100 of its weight and have the width
    of "regular". Ties go to the shorter style name, then by path."""
    faces = list(faces)

    def standing(face: Typeface, weight: int, italic: bool, width: int) -> tuple:
        off = abs(face.weight - weight)
        return face.italic != italic, abs(face.width - width), off, len(face.style), str(face.path)

    chosen = {"regular": min(faces, key=lambda face: standing(face, REGULAR, False, WIDTH))}
    for name, (weight, italic) in STYLES.items():
        if name == "regular":
            continue
        width = chosen["regular"].width
        near = [f for f in faces if f.italic == italic and f.width == width and abs(f.weight - weight) <= 100]
        near = [f for f in near if f.sha256 not in {other.sha256 for other in chosen.values()}]
        if near:
            chosen[name] = min(near, key=lambda face: standing(face, weight, italic, width))
    return chosen


def group_of(family: str) -> str:
    """The first word of a family's name, without digits. Families of one group, such as "Noto Sans" and "Noto Serif",
    stay in one split."""
    words = re.findall(r"[^\W\d_]+", family)
    return words[0].lower() if words else family.lower()
