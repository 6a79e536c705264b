"""Letters: how fonts are drawn, which are left out and why, and the data set that is built of the others."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from adadiff.data import letters, sources
from adadiff.data.glyph_rules import RULES, Designs, broken_rule, thumbnails
from adadiff.data.glyphs import CHARACTERS, MARGIN, NOWHERE, SIZE, draw_font
from adadiff.data.letters import Family, FamilyList, Font, build, family_list, load_letters
from adadiff.data.typefaces import by_family, chosen_styles, group_of, licence_in, read_typeface
from benchmarks.studies import typefaces as study
from sampler.fonts import MONO, SANS, SERIF, SHIPPED, drawn_as, erased, raised, stretched, unmapped, variant
from sampler.shell import error_line, run


def drawn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    images = draw_font(path, CHARACTERS + NOWHERE)
    return images[:-1], images[-1]


def of(images: np.ndarray, character: str) -> np.ndarray:
    return images[CHARACTERS.index(character)]


def rows_of(image: np.ndarray) -> tuple[int, int]:
    """First and last row with ink of at least half a pixel."""
    rows = np.flatnonzero((image >= 128).any(1))
    return int(rows[0]), int(rows[-1])


def test_characters_share_scale_and_baseline_and_are_centred() -> None:
    images = draw_font(SANS)
    assert (images.shape, images.dtype) == ((62, SIZE, SIZE), np.uint8)
    ink = images > 0
    assert not ink[:, [0, -1]].any()
    assert not ink[:, :, [0, -1]].any()
    rows = np.flatnonzero(ink.any((0, 2)))
    columns = np.flatnonzero(ink.any((0, 1)))
    room = SIZE - 2 * MARGIN
    assert max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 in (room, room + 1)  # the larger one just fits
    baseline = rows_of(of(images, "E"))[1]
    assert all(rows_of(of(images, c))[1] == baseline for c in "EHTxzkl17")
    assert rows_of(of(images, "p"))[1] > baseline + 2
    assert rows_of(of(images, "x"))[0] > rows_of(of(images, "X"))[0] + 2
    for character in "HOolA8":
        columns = np.flatnonzero((of(images, character) > 0).any(0))
        assert abs(columns[0] - (SIZE - 1 - columns[-1])) <= 1


def test_drawing_is_averaging_a_larger_drawing() -> None:
    """Against Pillow's own reduction of the same text, drawn once more here. The size is found from the image."""
    images = draw_font(SERIF)
    font = ImageFont.truetype(str(SERIF), 256, layout_engine=ImageFont.Layout.BASIC)
    boxes = [font.getbbox(c, anchor="ls") for c in CHARACTERS]
    height = max(b[3] for b in boxes) - min(b[1] for b in boxes)
    width = max(b[2] - b[0] for b in boxes)
    scale = 4 * 28 / max(height, width)
    font = ImageFont.truetype(str(SERIF), 256 * scale, layout_engine=ImageFont.Layout.BASIC)
    for character in "QgM4":
        canvas = Image.new("L", (128, 128))
        ImageDraw.Draw(canvas).text((64, 90), character, fill=255, font=font, anchor="ms")
        reduced = np.asarray(canvas.reduce(4), dtype=float)
        # Elsewhere on the canvas, so compare what does not depend on the place: all of the ink.
        assert reduced.sum() == pytest.approx(float(of(images, character).sum()), rel=0.01)


def test_the_same_font_draws_the_same_bits() -> None:
    assert np.array_equal(draw_font(MONO), draw_font(MONO))
    assert np.array_equal(draw_font(MONO, "q7"), draw_font(MONO)[[CHARACTERS.index(c) for c in "q7"]])


def test_files_that_are_no_fonts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.ttf"
    file.write_bytes(SANS.read_bytes()[:3000])
    with pytest.raises(ValueError, match="is no font that can be read"):
        draw_font(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_typeface(file)
    with pytest.raises(ValueError, match="draws nothing for ABC"):
        draw_font(variant(tmp_path / "b.ttf", "Empty", erased(CHARACTERS)))


LOWER_AS_CAPITALS = dict(zip(string.ascii_lowercase, string.ascii_uppercase, strict=True))
BROKEN = {
    "missing glyph": (unmapped("Qz"), "Qz drawn as a missing glyph"),
    "blank glyph": (erased("B7"), "B7 blank or nearly so"),
    "same glyph": (drawn_as({"B": "A"}), "A and B differ by 0.0000"),
    "one case": (drawn_as(LOWER_AS_CAPITALS), "capitals and lower case differ by 0.000"),
    "too small": (raised(3.2, "Q"), "capitals are "),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_what_breaks_a_rule_is_told_by_its_name(rule: str, tmp_path: Path) -> None:
    change, detail = BROKEN[rule]
    broken = broken_rule(*drawn(variant(tmp_path / "font.ttf", "Broken", change)))
    assert broken is not None
    assert (broken.rule, broken.detail.startswith(detail)) == (rule, True)
    assert rule in RULES


@pytest.mark.parametrize("font", [SANS, SERIF, MONO, SHIPPED / "STIXGeneral.ttf"], ids=lambda path: path.stem)
def test_clean_fonts_break_no_rule(font: Path) -> None:
    """Of DejaVu Sans, too, where I and l are nearly one stroke."""
    assert broken_rule(*drawn(font)) is None


def test_ink_at_the_border_is_told() -> None:
    images, nowhere = drawn(SANS)
    images[CHARACTERS.index("k"), 9, 0] = 1
    assert broken_rule(images, nowhere).rule == "at the border"


def test_the_nearest_design_is_found_among_many() -> None:
    generator = np.random.default_rng(0)
    fonts = generator.integers(0, 256, (9, 62, SIZE, SIZE)).astype(np.uint8)
    small = thumbnails(fonts)
    designs = Designs.room_for(8)
    assert designs.nearest(small[0]) == ("", float("inf"))
    for index in range(8):
        designs.add(str(index), small[index])
    differences = np.abs(small[:8] - small[8]).mean((1, 2, 3))
    name, difference = designs.nearest(small[8])
    assert name == str(differences.argmin())
    assert difference == pytest.approx(float(differences.min()), rel=1e-5)
    assert designs.nearest(small[5]) == ("5", 0.0)
    assert small[2, 3, 1, 4] == pytest.approx(fonts[2, 3, 2:4, 8:10].mean() / 255, rel=1e-5)


def test_typefaces_tell_family_style_and_licence(tmp_path: Path) -> None:
    faces = [read_typeface(path) for path in sorted(SHIPPED.glob("DejaVuS*.ttf"))]
    families = by_family([*faces, read_typeface(variant(tmp_path / "x.ttf", "dejavu SANS  mono"))])
    ends = ("Sans", "Sans Display", "Sans Mono", "Serif", "Serif Display")
    assert list(families) == [f"DejaVu {end}" for end in ends]
    styles = {style: face.path.stem for style, face in chosen_styles(families["DejaVu Serif"]).items()}
    assert styles == {
        "regular": "DejaVuSerif",
        "bold": "DejaVuSerif-Bold",
        "italic": "DejaVuSerif-Italic",
        "bold italic": "DejaVuSerif-BoldItalic",
    }
    assert len(families["DejaVu Sans Mono"]) == 5
    assert {face.licence for face in faces} == {"Bitstream Vera"}
    only = chosen_styles([read_typeface(SHIPPED / "DejaVuSans-BoldOblique.ttf")])
    assert list(only) == ["regular"]  # whatever it is, the family has no other


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("This Font Software is licensed under the SIL Open Font License, Version 1.1.", "OFL"),
        ("GPL version 2 or later. As a special exception (the font exception) ...", "GPL with font exception"),
        ("GNU General Public License", "GPL"),
        ("mit freundlichen Gruessen", ""),
        ("The MIT License", "MIT"),
        ("", ""),
    ],
)
def test_licences_are_read_from_texts(text: str, name: str) -> None:
    assert licence_in(text) == name


def test_families_that_begin_alike_stay_together() -> None:
    assert group_of("Noto Sans") == group_of("Noto Serif Display") == "noto"
    assert group_of("LMRoman10") == group_of("LMRoman 12") == "lmroman"
    assert group_of("3270") == "3270"
    names = [f"Family{chr(97 + i)}{chr(97 + j)} Sans" for i in range(26) for j in range(26)]
    held_out = sum(study.split_of(name) == "test" for name in names)
    assert abs(held_out / len(names) - study.HELD_OUT / 100) < 0.05
    assert all(study.split_of(name) == study.split_of(name.replace("Sans", "Mono")) for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fonts of eight families: five clean ones, a twin, one whose letters are others, and one that breaks a rule."""
    root = tmp_path_factory.mktemp("fonts")
    clean = {
        "Ab": SANS,
        "Cd": SERIF,
        "Ef": MONO,
        "Gh": SHIPPED / "STIXGeneral.ttf",
        "Ij": SHIPPED / "DejaVuSans-Oblique.ttf",
    }
    for name, start in clean.items():
        variant(root / f"{name}.ttf", f"{name} Letters", start=start)
    variant(root / "Twin.ttf", "Zz Letters", stretched(1.01, "m"))
    shifted = dict(zip(CHARACTERS, CHARACTERS[7:] + CHARACTERS[:7], strict=True))
    variant(root / "Symbols.ttf", "Symbols", drawn_as(shifted), start=SHIPPED / "DejaVuSerif-Bold.ttf")
    variant(root / "Holes.ttf", "Holes", erased("e"))
    variant(root / "Ef-Bold.ttf", "Ef Letters", start=SHIPPED / "DejaVuSansMono-Bold.ttf", style="Bold")
    (root / "Bad.ttf").write_bytes(b"no font")
    return root


@pytest.fixture(scope="module")
def families(folder: Path) -> FamilyList:
    """What the study makes of the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "packages_of", lambda files: dict.fromkeys(files, "fonts-test"))
        patch.setattr(study, "versions_of", lambda packages: dict.fromkeys(packages, "1.0-1"))
        # A fold for each: with so few families the hash might leave one empty.
        order = ["ab", "cd", "ef", "gh", "ij", "symbols"]
        patch.setattr(study, "_hashed", lambda what, text: order.index(text) / len(order))
        patch.setattr(study, "FOLDS", len(order))
        patch.setattr(study, "split_of", lambda name: "test" if name.startswith("Cd") else "train")
        found, dropped = study.candidates(study.font_files([folder]))
        study.draw(found, None)
        study.drop_duplicates(found)
        study.drop_unread(found)
        return study.family_list(found, dropped)


def test_the_study_names_what_it_leaves_out_and_why(families: FamilyList) -> None:
    assert {d.name: d.rule for d in families.dropped} == {
        "Bad.ttf": "unreadable",
        "Holes": "blank glyph",
        "Zz Letters": "duplicate",
        "Symbols": "not read",
    }
    assert next(d.detail for d in families.dropped if d.rule == "duplicate").startswith("of Ab Letters, difference 0.0")
    assert [f.name for f in families.families] == [f"{name} Letters" for name in ("Ab", "Cd", "Ef", "Gh", "Ij")]
    assert [[font.style for font in f.fonts] for f in families.families][2] == ["regular", "bold"]
    assert families.packages == {"fonts-test": "1.0-1"}


def test_a_list_survives_its_file(families: FamilyList, tmp_path: Path) -> None:
    families.write(tmp_path / "list.json")
    assert FamilyList.read(tmp_path / "list.json") == families
    content = json.loads((tmp_path / "list.json").read_text())
    content["families"][1][1] = "valid"
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is no list of families: families without split"):
        FamilyList.read(tmp_path / "list.json")


def test_the_data_set_is_built_bit_for_bit(families: FamilyList, tmp_path: Path) -> None:
    files = [tmp_path / "one.npz", tmp_path / "two.npz"]
    for file in files:
        built = build(families)
        assert built.exact
        built.write(file)
    assert files[0].read_bytes() == files[1].read_bytes()
    train, test = (sources.load(f"letters:{files[0]}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (5 * 62, 62)
    assert (train.shape, train.classes) == ((1, 32, 32), 62)
    images, labels = test.batch(torch.tensor([0, 27, 61]))
    assert labels.tolist() == [0, 27, 61]
    own = draw_font(Path(families.families[1].fonts[0].path))
    assert torch.equal(images[1, 0], torch.from_numpy(own[27]).float() / 127.5 - 1)
    with np.load(files[0]) as arrays:
        assert not set(arrays["family"][arrays["test"]]) & set(arrays["family"][~arrays["test"]])
        assert sorted(set(arrays["font"].tolist())) == list(range(6))
        metadata = json.loads(str(arrays["metadata"]))
    assert metadata["families"] == [f.name for f in families.families]
    assert metadata["fonts"][0] == ["regular", families.families[0].fonts[0].sha256]


def test_other_pixels_are_told_apart(families: FamilyList) -> None:
    """As another release of FreeType draws them."""

    def draw(path: Path) -> np.ndarray:
        images = draw_font(path)
        images[3, 16, 16] ^= 1
        return images

    assert not build(families, draw=draw).exact


def test_missing_and_other_fonts_are_named_before_any_work(families: FamilyList, tmp_path: Path) -> None:
    def draw(path: Path) -> np.ndarray:
        raise AssertionError("work was begun")

    with pytest.raises(
        ValueError, match=r"fonts of 1 Debian packages are missing, such as /.*; as root: apt-get install "
    ):
        build(families, tmp_path, draw)
    first = families.families[0].fonts[0]
    (tmp_path / first.path.lstrip("/")).parent.mkdir(parents=True)
    (tmp_path / first.path.lstrip("/")).write_bytes(b"another release")
    with pytest.raises(ValueError, match=r"fonts of other releases of 1 packages .* the list is of fonts-test 1\.0-1"):
        build(families, tmp_path, draw)


def test_files_that_hold_no_letters_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"no such file: .*`adadiff data letters --out"):
        load_letters(file)
    good = {"images": np.zeros((3, 1, 32, 32), np.uint8), "labels": np.arange(3, dtype=np.uint8)}
    for arrays, said in (
        (good, "it needs test"),
        ({**good, "test": np.zeros(2, bool)}, r"images are \[3, 1, 32, 32\]"),
        ({**good, "test": np.ones(3, bool)}, "no image of the split 'train'"),
        ({**good, "test": np.zeros(3, bool), "labels": good["labels"] + 60}, "labels up to 62"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=said):
            load_letters(file)
    with pytest.raises(ValueError, match="split must be"):
        load_letters(file, "valid")
    for text, said in {"letters:": "letters need a file", "letters": "letters needs FILE"}.items():
        with pytest.raises(ValueError, match=said):
            sources.SOURCES.read(text)


def test_the_shipped_list_keeps_what_it_promises() -> None:
    families = family_list()
    assert len(families.families) >= 500
    assert {d.rule for d in families.dropped} <= set(RULES)
    splits: dict[str, set[str]] = {}
    for family in families.families:
        splits.setdefault(group_of(family.name), set()).add(family.split)
        assert family.split == study.split_of(family.name)
        assert family.fonts[0].style == "regular"
        assert len({font.style for font in family.fonts}) == len(family.fonts) <= 4
    assert all(len(own) == 1 for own in splits.values())
    assert set(families.packages) == {family.package for family in families.families}
    assert all(family.licence for family in families.families)
    hashes = [font.sha256 for family in families.families for font in family.fonts]
    assert len(hashes) == len(set(hashes))
    assert letters.LIST.stat().st_size <= 400_000


def test_the_command_builds_lists_and_refuses(
    families: FamilyList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "letters.npz"
    assert run(f"data letters --out {file} --root {tmp_path}") == 2
    assert "as root: apt-get install --no-install-recommends " in error_line(capsys.readouterr().err)
    monkeypatch.setattr(letters, "family_list", lambda: families)
    assert run(f"data letters --out {file}") == 0
    assert "bit for bit" in capsys.readouterr().out
    assert len(load_letters(file)) == 5 * 62
    for line, said in (
        (f"data letters --out {file}", "it exists; --force replaces it"),
        ("data letters", "say where to write"),
        (f"data letters --list --out {file}", "--list writes no file"),
    ):
        assert run(line) == 2
        assert said in error_line(capsys.readouterr().err)
    assert run("data letters --list") == 0
    printed = capsys.readouterr().out
    assert "duplicate: of Ab Letters" in printed
    assert "Gh Letters" in printed
    other = FamilyList(**{**vars(families), "images_sha256": "0" * 64, "pillow": "1.2"})
    monkeypatch.setattr(letters, "family_list", lambda: other)
    assert run(f"data letters --out {file} --force") == 0
    assert "the images differ from those listed, which Pillow 1.2" in capsys.readouterr().out


def test_families_are_plain_values() -> None:
    family = Family("A", "train", "p", "OFL", (Font("regular", "/a.ttf", "0"),))
    assert hash(family) == hash(Family("A", "train", "p", "OFL", (Font("regular", "/a.ttf", "0"),)))
