"""Makes the list of typefaces for `adadiff data letters` from the fonts installed on this machine:

    python -m benchmarks.studies.typefaces --out python/adadiff/data/letters_families.json

The rules of `adadiff.data.glyph_rules` are applied to every family in order. For a family that passes, the regular
style is kept, and those of bold, italic and bold italic that pass the rules on images. Needs fontTools and Debian's
dpkg, which gives the package of a file.
"""

import argparse
import gzip
import hashlib
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from adadiff.data.glyph_rules import CAPITALS, DIGITS, LOWER, Broken, Designs, boxed, broken_rule, thumbnails
from adadiff.data.glyphs import CHARACTERS, NOWHERE, draw_font
from adadiff.data.letters import FOLDERS, LIST, Dropped, Family, FamilyList, Font, releases
from adadiff.data.typefaces import SUFFIXES, Typeface, by_family, chosen_styles, group_of, licence_in, read_typeface

HELD_OUT = 15  # percent of groups in the test split, see `group_of`
DUPLICATE = 0.025  # mean absolute difference of thumbnails below which two fonts are one design
LEAST_READ = 0.5  # least accuracy of a classifier on capitals, on lower case letters and on digits
FOLDS = 4
# Characters of similar shape count as the same: both cases of a letter, O and 0, I, l and 1.
ALIKE = torch.tensor([CHARACTERS.index({"0": "O", "L": "I", "1": "I"}.get(c.upper(), c.upper())) for c in CHARACTERS])
RANDOM, RIDGE = 1500, 1.0  # random features of the classifiers; ridge penalty for each font


@dataclass
class Candidate:
    """A family to which the rules are applied. drawn: style -> uint8 [63, 32, 32], the last image of a code point that
    no font has. broken: why it is dropped; None while it is kept."""

    name: str
    faces: dict[str, Typeface]
    package: str
    drawn: dict[str, np.ndarray] = field(default_factory=dict)
    broken: Broken | None = None


def font_files(folders: Sequence[Path] = FOLDERS) -> list[Path]:
    """All font files in folders, each once; links are followed."""
    found = (path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted({path.resolve() for path in found if path.is_file()})


def packages_of(files: Sequence[Path]) -> dict[Path, str]:
    """The Debian package of each file; files without a package are left out."""
    found = {}
    for start in range(0, len(files), 200):
        part = files[start : start + 200]
        run = subprocess.run(["dpkg-query", "-S", *map(str, part)], capture_output=True, text=True, check=False)
        for line in run.stdout.splitlines():
            package, _, path = line.partition(": ")
            found[Path(path)] = package.split(",")[0].split(":")[0]
    return found


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    run = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version}\n", *packages], capture_output=True, text=True, check=True
    )
    return dict(line.split() for line in run.stdout.splitlines())


def licence_of(face: Typeface, package: str) -> str:
    """Licence according to the font, else to its TeX Live package, else to its Debian package."""
    if face.licence:
        return face.licence
    match = re.search(r"/texmf-dist/fonts/\w+/[\w-]+/([\w-]+)/", str(face.path))
    if match and (found := licence_in(_of_tex(package).get(match[1], ""))):
        return found
    return licence_in(_copyright(package)) or f"see /usr/share/doc/{package}/copyright"


@cache
def _of_tex(package: str) -> Mapping[str, str]:
    """Licences from TeX Live's list, with lines such as "abel: ofl"."""
    path = Path(f"/usr/share/doc/{package}/Licenses.gz")
    if not path.is_file():
        return {}
    lines = gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines()
    return dict(line.split(": ", 1) for line in lines if re.match(r"[\w.-]+: ", line))


@cache
def _copyright(package: str) -> str:
    """Licences in Debian's copyright file, except those of Debian's own files."""
    path = Path(f"/usr/share/doc/{package}/copyright")
    if not path.is_file():
        return ""
    text = path.read_text("utf-8", "replace")
    parts = [part for part in re.split(r"\n\s*\n", text) if not part.startswith("Files: debian/")]
    return "\n".join(re.findall(r"^License: *(.+)$", "\n\n".join(parts), re.MULTILINE)) or text


def candidates(files: Sequence[Path]) -> tuple[list[Candidate], list[Dropped]]:
    """Families with their chosen styles, and unreadable fonts, which are dropped under their file names."""
    package_of = packages_of(files)
    faces, dropped = [], []
    for path in tqdm(files, "font files", disable=None):
        try:
            faces.append(read_typeface(path))
        except ValueError as error:
            if path in package_of:
                dropped.append(Dropped(path.name, package_of[path], "unreadable", str(error)[:80]))
    faces = [face for face in faces if face.path in package_of]
    found = []
    for name, members in by_family(faces).items():
        chosen = chosen_styles(members)
        found.append(Candidate(name, chosen, package_of[chosen["regular"].path]))
    return found, dropped


def draw(found: Sequence[Candidate], cached: Path | None) -> None:
    """Draws every style and applies the rules on images. A family is dropped if its regular style breaks one; other
    styles that break one are left out."""
    for candidate in tqdm(found, "families", disable=None):
        for style, face in list(candidate.faces.items()):
            try:
                images = _drawn(face, cached)
                broken = broken_rule(images[:-1], images[-1])
            except ValueError as error:
                broken = Broken("unreadable", str(error)[-80:])
            if broken is None:
                candidate.drawn[style] = images
            elif style == "regular":
                candidate.broken = broken
                break


def _drawn(face: Typeface, cached: Path | None) -> np.ndarray:
    kept = None if cached is None else cached / f"{face.sha256}.npy"
    if kept is not None and kept.exists():
        return np.load(kept)
    images = draw_font(face.path, CHARACTERS + NOWHERE)
    if kept is not None:
        np.save(kept, images)
    return images


def drop_duplicates(found: Sequence[Candidate], bar: float = DUPLICATE) -> list[tuple[float, str, str]]:
    """Drops duplicates. Families of packages with many families come first, then by name. A style that looks like one
    of an earlier family is left out; if it is the regular style, the family is dropped. Returns (difference, family,
    nearest earlier family) for all that are kept."""
    held = Counter(candidate.package for candidate in found if candidate.broken is None)
    designs = Designs.room_for(sum(len(candidate.drawn) for candidate in _kept(found)))
    near = []
    for candidate in tqdm(sorted(_kept(found), key=lambda c: (-held[c.package], c.name)), "duplicates", disable=None):
        small = dict(zip(candidate.drawn, thumbnails(np.stack(list(candidate.drawn.values()))[:, :-1]), strict=True))
        for style, thumbnail in small.items():
            name, difference = designs.nearest(thumbnail)
            if difference < bar and style == "regular":
                candidate.broken = Broken("duplicate", f"of {name}, difference {difference:.4f}")
                break
            if difference < bar:
                del candidate.drawn[style]
            elif style == "regular":
                near.append((difference, candidate.name, name))
        for style in candidate.drawn if candidate.broken is None else ():
            designs.add(candidate.name, small[style])
    return sorted(near)


def drop_unread(found: Sequence[Candidate], bar: float = LEAST_READ) -> dict[str, float]:
    """Drops families that a classifier cannot read. Cross-validated: each fold of groups of families is read by a
    classifier trained on the other folds. Returns for each family the accuracy on its worst part (capitals, lower case
    or digits)."""
    kept = list(_kept(found))
    fold = [int(_hashed("fold", group_of(candidate.name)) * FOLDS) for candidate in kept]
    shares: dict[str, float] = {}
    for number in range(FOLDS):
        reader = Reader.of([candidate for candidate, k in zip(kept, fold, strict=True) if k != number])
        for candidate in (c for c, k in zip(kept, fold, strict=True) if k == number):
            right = (ALIKE[reader.read(candidate)] == ALIKE).double()
            shares[candidate.name] = min(float(right[part].mean()) for part in (CAPITALS, LOWER, DIGITS))
    for candidate in kept:
        if (share := shares[candidate.name]) < bar:
            candidate.broken = Broken("not read", f"{share:.0%} of its worst part read")
    return shares


@dataclass(frozen=True)
class Reader:
    """A classifier of characters: ridge regression, in closed form, on random features of the ink's bounding box scaled
    to 16x16 pixels. (The box, because old-style figures may hang below the baseline.)

    projection: float64 [257, RANDOM]; weights: float64 [RANDOM, 62].
    """

    projection: Tensor
    weights: Tensor

    @classmethod
    def of(cls, found: Sequence[Candidate], seed: int = 0) -> "Reader":
        """A classifier trained on the regular styles of these families."""
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(257, RANDOM, generator=generator, dtype=torch.float64, device="cpu")
        reader = cls(projection, torch.zeros(RANDOM, len(CHARACTERS), dtype=torch.float64, device="cpu"))
        gram = RIDGE * len(found) * torch.eye(RANDOM, dtype=torch.float64, device="cpu")
        for candidate in found:
            features = reader.features(candidate)  # one row for each character, so the targets are an identity matrix
            gram += features.T @ features
            reader.weights.add_(features.T)
        return cls(projection, torch.linalg.solve(gram, reader.weights))

    def features(self, candidate: Candidate) -> Tensor:
        """Features of the regular style, float64 [62, RANDOM]."""
        images = candidate.drawn["regular"][:-1]
        pixels = torch.from_numpy(np.stack([boxed(image) for image in images])).double().flatten(1) - 0.5
        return (F.pad(pixels, (0, 1), value=1.0) @ self.projection).relu()

    def read(self, candidate: Candidate) -> Tensor:
        """Predicted label of each character, int64 [62]."""
        return (self.features(candidate) @ self.weights).argmax(1)


def split_of(name: str) -> str:
    """The split of a family, by the hash of its group, so that adding a family does not change the split of others."""
    return "test" if 100 * _hashed("split", group_of(name)) < HELD_OUT else "train"


def family_list(found: Sequence[Candidate], dropped: Sequence[Dropped]) -> FamilyList:
    families, digest = [], hashlib.sha256()
    for candidate in sorted(_kept(found), key=lambda c: c.name):
        fonts = []
        for style, images in candidate.drawn.items():
            face = candidate.faces[style]
            fonts.append(Font(style, str(face.path), face.sha256))
            digest.update(images[:-1].tobytes())
        licence = licence_of(candidate.faces["regular"], candidate.package)
        families.append(Family(candidate.name, split_of(candidate.name), candidate.package, licence, tuple(fonts)))
    out = [*dropped, *(Dropped(c.name, c.package, c.broken.rule, c.broken.detail) for c in found if c.broken)]
    packages = versions_of(sorted({family.package for family in families}))
    return FamilyList(
        *releases(), digest.hexdigest(), packages, tuple(families), tuple(sorted(out, key=lambda d: (d.name, d.rule)))
    )


def _kept(found: Sequence[Candidate]) -> Iterator[Candidate]:
    return (candidate for candidate in found if candidate.broken is None)


def _hashed(what: str, text: str) -> float:
    """A hash, uniform in [0, 1)."""
    return int.from_bytes(hashlib.sha256(f"{what} {text}".encode()).digest()[:6]) / 2**48


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.typefaces", description=__doc__)
    parser.add_argument("--out", type=Path, default=LIST, help="list to write (default: the shipped one)")
    parser.add_argument("--cached", type=Path, help="folder in which drawn fonts are kept for the next run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cached is not None:
        options.cached.mkdir(parents=True, exist_ok=True)
    found, dropped = candidates(font_files())
    print(f"{len(found)} families, {len(dropped)} unreadable files")
    draw(found, options.cached)
    near = drop_duplicates(found)
    shares = drop_unread(found)
    result = family_list(found, dropped)
    result.write(options.out)
    for rule, count in Counter(d.rule for d in result.dropped).most_common():
        print(f"{count:5} {rule}")
    print("nearest that stay:", *(f"{d:.4f} {a} | {b}" for d, a, b in near[:10]), sep="\n  ")
    low = sorted((share, name) for name, share in shares.items())
    print("read worst of those kept:", *[f"{s:.2f} {n}" for s, n in low if s >= LEAST_READ][:20], sep="\n  ")
    splits = Counter(family.split for family in result.families)
    print(f"kept {len(result.families)} families {dict(splits)}, {sum(len(f.fonts) for f in result.families)} fonts")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
