"""adadiff data: makes a data set from installed fonts."""

import argparse
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from ..data import letters
from ..data.glyph_rules import RULES
from ..data.glyphs import CHARACTERS
from ..writing import check_outputs
from .terminal import print_table, say, show, with_bars


def data(options: argparse.Namespace) -> None:
    if options.list:
        if options.out is not None:
            raise ValueError("--list writes no file; leave --out out")
        _print_list(letters.family_list())
        return
    if options.out is None:
        raise ValueError("say where to write the data set, as in --out letters.npz, or give --list")
    check_outputs(options.force, options.out)
    families = letters.family_list()
    pillow, freetype = letters.releases()
    built = letters.build(families, options.root, progress=_bar)
    built.write(options.out)
    fonts = {split: sum(len(f.fonts) for f in families.families if f.split == split) for split in letters.SPLITS}
    shown = {
        "families": len(families.families),
        "images_to_train_on": len(CHARACTERS) * fonts["train"],
        "images_held_out": len(CHARACTERS) * fonts["test"],
        "pillow": pillow,
        "freetype": freetype,
        "as_listed": "bit for bit" if built.exact else "no",
    }
    show(shown)
    if not built.exact:
        say(
            f"the images differ from those listed, which Pillow {families.pillow} with FreeType {families.freetype} "
            "drew; results on them may differ slightly"
        )
    say(f"wrote {options.out}")


def _bar(values: Iterable[Any]) -> Iterable[Any]:
    return tqdm(values, disable=not with_bars(), unit="family", dynamic_ncols=True)


def _print_list(families: letters.FamilyList) -> None:
    kept = [
        {"family": f.name, "in": f.split, "package": f.package, "licence": f.licence, "why": ""}
        for f in families.families
    ]
    dropped = [
        {"family": d.name, "in": "", "package": d.package, "licence": "", "why": f"{d.rule}: {d.detail}"}
        for d in families.dropped
    ]
    print_table(kept + dropped)
    counts = Counter(dropped.rule for dropped in families.dropped)
    print_table([{"rule": rule, "families": str(counts[rule]), "dropped where": text} for rule, text in RULES.items()])
    say(f"{len(families.families)} families are kept")
