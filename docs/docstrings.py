"""An extension of griffe, which reads docstrings for the reference: what they say of parameters becomes a list.

Docstrings are prose that names parameters and fields as in "x: [B, C, H, W]; t: float [B]". On a page each of these
begins an entry of its own; so do "Returns" and "Raises". The text stays as it is.
"""

import re
from collections.abc import Collection

import griffe

END = re.compile(r"^(?=(?:Returns|Raises|ValueError)\b)|(?<=\.\n)(?=[A-Z])", re.MULTILINE)


def listed(text: str, names: Collection[str]) -> str:
    """text: a docstring, without the indentation of the source. names: what an entry may explain."""
    return "\n\n".join(_listed(paragraph, names) for paragraph in text.split("\n\n"))


def _listed(paragraph: str, names: Collection[str]) -> str:
    if not names or re.search(r"^ ", paragraph, re.MULTILINE):  # a formula or a table
        return paragraph
    name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    entry = re.compile(rf"(^|\n|(?<=[.;)]) +)((?:{name})(?:, (?:{name})|=\w+)*):\s")
    parts = [part.strip() for part in END.split(paragraph) if part.strip()]
    return "\n\n".join(entry.sub(_item, part).strip() for part in parts)


def _item(match: re.Match[str]) -> str:
    names = ", ".join(f"`{name}`" for name in match[2].split(", "))
    return f"\n\n- {names}: "


class Lists(griffe.Extension):
    """Of functions and classes."""

    def on_function(self, *, func: griffe.Function, **_: object) -> None:
        self._list(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: object) -> None:
        fields = {name for name, member in cls.members.items() if member.kind is griffe.Kind.ATTRIBUTE}
        self._list(cls, fields | {parameter.name for parameter in cls.parameters} - {"self"})

    @staticmethod
    def _list(one: griffe.Function | griffe.Class, names: Collection[str]) -> None:
        if one.docstring is not None:
            one.docstring.value = listed(one.docstring.value, names)
