"""Objects spelled as text: NAME, NAME:VALUE, NAME:SETTING=VALUE,..., or a user's class, module:Class.

A registry lists the spellings of policies, solvers, data and the like, and builds frozen dataclasses from text. The
same text is used in Python, on the command line and in configuration files; help and errors list the registered
spellings. To add one, add an `Entry`.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Reader = Callable[[str], Any]
WORDS = {int: "a whole number", float: "a number", bool: "true or false"}
OPTIONAL = re.compile(r"\[[^]]*\]")
EMPTY = inspect.Parameter.empty
PLACES = {int: "N", float: "NUMBER", bool: "true|false"}  # placeholders in forms, unless `words` has one


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A spelling that begins with `name`. make: a dataclass or function, whose parameters are the settings.

    leading: the parameter that comes first. Parameters without a default are required. key: its spelling, if not its
    name; among entries of one name, the one whose key is given is chosen. bare: its value may come first without key.
    path: its value is a file name, without key, which may contain commas; other settings follow it.
    readers: parsers of parameters whose type is not enough; words: placeholders of values in forms.
    """

    name: str
    make: Callable[..., T]
    leading: str | None = None
    key: str | None = None
    bare: bool = False
    path: bool = False
    readers: Mapping[str, Reader] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)

    @property
    def spelled(self) -> str | None:
        return self.key or self.leading

    @property
    def required(self) -> list[str]:
        """The parameters without a default."""
        return [name for name, one in inspect.signature(self.make).parameters.items() if one.default is EMPTY]

    @property
    def settings(self) -> dict[str, str]:
        """Spelled name -> parameter, the leading one first."""
        names = [name for name in inspect.signature(self.make).parameters if name != self.leading]
        first = {self.spelled: self.leading} if self.spelled and self.leading else {}
        return {**first, **{name: name for name in names}}

    @property
    def form(self) -> str:
        """The form for help and errors, such as "cache:threshold=CHANGE[,first=N]"."""
        parts = {parameter: self._part(spelled, parameter) for spelled, parameter in self.settings.items()}
        if not parts:
            return self.name
        required = self.required
        if not required:
            return f"{self.name}[:{','.join(parts.values())}]"
        first, *others = parts.items()
        return f"{self.name}:{first[1]}" + "".join(
            f",{part}" if parameter in required else f"[,{part}]" for parameter, part in others
        )

    def _part(self, spelled: str, parameter: str) -> str:
        word = self.words.get(parameter) or _place(self._type(parameter))
        return word if parameter == self.leading and (self.bare or self.path) else f"{spelled}={word}"

    @property
    def lacking(self) -> str:
        return f"{self.name} needs {self.words.get(self.leading or '', '') if self.bare or self.path else self.spelled}"

    def read(self, text: str) -> T:
        """The object for text, which follows the colon. Raises ValueError for unknown, repeated, missing and invalid
        settings."""
        settings, given = self.settings, dict[str, Any]()
        for spelled, value in self._pairs(text):
            if spelled not in settings:
                raise ValueError(f"{self.name} takes no {f'{spelled}={value}'!r}")
            if settings[spelled] in given:
                raise ValueError(f"{spelled} is given twice")
            given[settings[spelled]] = self._value(spelled, settings[spelled], value)
        required = self.required
        for spelled, parameter in settings.items():
            if parameter in required and parameter not in given:
                leads = parameter == self.leading
                raise ValueError(self.lacking if leads else f"{self.name} needs {self._part(spelled, parameter)}")
        return self.make(**given)

    def _pairs(self, text: str) -> list[tuple[str, str]]:
        if self.path and self.spelled:
            return self._after_path(text)
        pairs = []
        for position, part in enumerate(text.split(",")):
            spelled, equals, value = part.partition("=")
            if not equals and position == 0 and self.bare and self.spelled:
                spelled, value = self.spelled, part
            elif not equals:
                raise ValueError(f"{self.name} takes no {part!r}")
            pairs.append((spelled, value))
        return pairs

    def _after_path(self, text: str) -> list[tuple[str, str]]:
        pairs: list[tuple[str, str]] = []
        others = [spelled for spelled in self.settings if spelled != self.spelled]
        while True:
            before, comma, part = text.rpartition(",")
            spelled, equals, value = part.partition("=")
            if not (comma and equals and spelled in others):
                return [(self.spelled or "", text), *reversed(pairs)]
            pairs.append((spelled, value))
            text = before

    def _type(self, parameter: str) -> Any:
        hints = get_type_hints(self.make.__init__ if inspect.isclass(self.make) else self.make)
        return hints.get(parameter)

    def _value(self, spelled: str, parameter: str, text: str) -> Any:
        if parameter in self.readers:
            return self.readers[parameter](text)
        kind = _kind(self._type(parameter))
        try:
            return _READERS[kind](text) if kind in _READERS else guessed(text) if kind is None else text
        except ValueError:
            raise ValueError(f"{spelled} must be {WORDS[kind]}, got {text!r}") from None


class Registry(Generic[T]):
    """The spellings of one sort of object. what: its name in errors, such as "policy". kind: the type that users'
    classes must have; None: they cannot be named. also: further accepted text, for help and errors."""

    def __init__(self, what: str, entries: Sequence[Entry[T]], kind: type | UnionType | None = None, also: str = ""):
        self.what, self.entries, self.kind, self.also = what, tuple(entries), kind, also

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.name for entry in self.entries))

    def forms(self, *names: str, short: bool = False, own: bool = True) -> str:
        """The forms of the entries of these names, or of all, for help and errors; short: without optional settings;
        own: with users' classes."""
        known = [entry.form for entry in self.entries if not names or entry.name in names]
        known = [OPTIONAL.sub("", form) if short else form for form in known]
        users = ["module:Class[:SETTING=VALUE,...] of your own"] if self.kind and own and not names else []
        return ", ".join([*known, *users, *([self.also] if self.also and not names else [])])

    def read(self, text: str, *, own: bool = True) -> T:
        """The object for `text`. own=False: refuse users' classes, whose modules would be imported: for text of others,
        such as clients and files. Raises ValueError, listing the known forms, for an unknown name or wrong settings."""
        name, colon, rest = text.partition(":")
        entries = [entry for entry in self.entries if entry.name == name]
        if not entries:
            if own and self.kind is not None and colon and _names_a_class(name, rest):
                return self._own(text, name, rest)
            raise ValueError(f"no {self.what} {text!r}; there are {self.forms(own=own)}")
        try:
            return _chosen(entries, rest).read(rest) if colon else _without_settings(entries)
        except ValueError as error:
            raise ValueError(f"cannot use {self.what} {text!r}: {error}. There are {self.forms(name)}") from None

    def _own(self, text: str, module: str, rest: str) -> T:
        name, _, settings = rest.partition(":")
        try:
            made_by = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # a module that this module imports is missing
            raise ValueError(
                f"no {self.what} {text!r}: there is no module {module!r}; there are {self.forms()}"
            ) from None
        except AttributeError:
            raise ValueError(f"cannot use {self.what} {text!r}: module {module!r} has no {name!r}") from None
        if not (isinstance(made_by, type) and issubclass(made_by, self.kind)):  # type: ignore[arg-type]
            raise ValueError(f"cannot use {self.what} {text!r}: {name} is no {_kind_names(self.kind)}")
        given = [setting.partition("=") for setting in settings.split(",")] if settings else []
        try:
            return made_by(**{key: guessed(value) for key, _, value in given})
        except TypeError as error:
            raise ValueError(f"cannot use {self.what} {text!r}: {error}") from None


def guessed(text: str) -> int | float | bool | str:
    """`text` as a number or truth value if it is one, else the text itself."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _chosen(entries: Sequence[Entry[T]], rest: str) -> Entry[T]:
    """The entry whose key is given, else the one that needs no key."""
    given = {part.partition("=")[0] for part in rest.split(",") if "=" in part}
    by_key = [entry for entry in entries if entry.spelled in given and not entry.path]
    alone = [entry for entry in entries if entry.bare or entry.path or entry.leading is None]
    return (by_key or alone or entries)[-1 if by_key else 0]


def _without_settings(entries: Sequence[Entry[T]]) -> T:
    if (plain := next((entry for entry in entries if not entry.required), None)) is not None:
        return plain.make()
    raise ValueError(entries[0].lacking)


def _names_a_class(module: str, text: str) -> bool:
    return all(name.isidentifier() for name in (*module.split("."), text.partition(":")[0]))


def _kind(hint: Any) -> Any:
    """The type to parse: int, float, bool or str, also of X | None and Literal; None for another type or none."""
    if get_origin(hint) in (Union, UnionType):
        others = [one for one in get_args(hint) if one is not NoneType]
        hint = others[0] if len(others) == 1 else None
    if get_origin(hint) is Literal:
        return str
    return hint if hint in (int, float, bool, str) else None


def _place(hint: Any) -> str:
    for one in (hint, *get_args(hint)):
        if get_origin(one) is Literal:
            return "|".join(map(str, get_args(one)))
    return PLACES.get(_kind(hint), "TEXT")


def _truth(text: str) -> bool:
    if text not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text in ("true", "1")


def _kind_names(kind: Any) -> str:
    return " or ".join(one.__name__ for one in (get_args(kind) or (kind,)))


_READERS: dict[Any, Reader] = {int: int, float: float, bool: _truth}
