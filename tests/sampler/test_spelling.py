"""Registries: text to frozen dataclasses, whatever is registered; what is wrong is named, with what there is."""

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adadiff.data.sources import SOURCES, Source
from adadiff.forward.count_sync import COUNT_SYNCS
from adadiff.metrics.extractors import FEATURES
from adadiff.policies.spelling import POLICIES
from adadiff.spelling import Entry, Registry, guessed


@dataclass(frozen=True)
class Tea:
    minutes: float
    cups: int = 1
    milk: bool = False
    sort: Literal["green", "black"] | None = None


@dataclass(frozen=True)
class Blend:
    file: str
    cups: int = 1


@dataclass(frozen=True)
class Coffee:
    cups: int = 2


DRINKS: Registry[object] = Registry(
    "drink",
    (
        Entry("tea", Tea, "minutes", bare=True, words={"minutes": "MINUTES"}),
        Entry("tea", Blend, "file", "blend"),
        Entry("coffee", Coffee),
        Entry("pot", Blend, "file", path=True, words={"file": "FILE"}),
    ),
    Tea | Coffee,
)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("tea:3", Tea(3.0)),
        ("tea:minutes=3.5,milk=true,cups=2", Tea(3.5, 2, True)),
        ("tea:3,sort=green,milk=0", Tea(3.0, 1, False, "green")),
        ("tea:blend=a.txt,cups=4", Blend("a.txt", 4)),
        ("tea:cups=4,blend=a.txt", Blend("a.txt", 4)),
        ("coffee", Coffee()),
        ("coffee:cups=5", Coffee(5)),
        ("pot:/a,b=c/d:e,cups=3", Blend("/a,b=c/d:e", 3)),
        ("pot:cups=3", Blend("cups=3")),  # a file may be called anything
    ],
)
def test_what_is_spelled(text: str, made: object) -> None:
    found = DRINKS.read(text)
    assert found == made
    assert type(found) is type(made)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "",
            "no drink ''; there are tea:MINUTES[,cups=N][,milk=true|false][,sort=green|black], tea:blend=TEXT[,cups=N]",
        ),
        ("wine", "no drink 'wine'; there are"),
        ("tea", "cannot use drink 'tea': tea needs MINUTES. There are tea:MINUTES"),
        ("tea:", "minutes must be a number, got ''"),
        ("tea:cups=2", "tea needs MINUTES"),
        ("tea:long", "minutes must be a number, got 'long'"),
        ("tea:3,cups=2.5", "cups must be a whole number, got '2.5'"),
        ("tea:3,milk=some", "milk must be true or false, got 'some'"),
        ("tea:3,4", "tea takes no '4'"),
        ("tea:3,sugar=1", "tea takes no 'sugar=1'"),
        ("tea:3,minutes=4", "minutes is given twice"),
        ("tea:blend=a,milk=true", "tea takes no 'milk=true'"),
        ("coffee:2", "coffee takes no '2'. There are coffee[:cups=N]"),
        ("pot", "pot needs FILE"),
        ("pot:a,cups=1,cups=2", "cups is given twice"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011, the text is compared whole
        DRINKS.read(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def own_module() -> Iterator[None]:
    module = types.ModuleType("own_drinks")
    module.Strong = dataclass(frozen=True)(type("Strong", (Tea,), {}))
    module.Water = dataclass(frozen=True)(type("Water", (), {}))
    sys.modules["own_drinks"] = module
    yield
    del sys.modules["own_drinks"]


def test_classes_of_ones_own(own_module: None) -> None:
    made = DRINKS.read("own_drinks:Strong:minutes=7,milk=true")
    assert isinstance(made, Tea)
    assert (made.minutes, made.milk) == (7, True)
    for text, said in {
        "own_drinks:Water": "Water is no Tea or Coffee",
        "own_drinks:Juice": "has no 'Juice'",
        "own_drinks:Strong:sugar=1": "sugar",
        "nowhere.drinks:Tea": "there is no module 'nowhere.drinks'",
    }.items():
        with pytest.raises(ValueError, match=said):
            DRINKS.read(text)
    closed: Registry[object] = Registry("drink", DRINKS.entries)
    with pytest.raises(ValueError, match="no drink 'own_drinks:Strong:minutes=7'"):
        closed.read("own_drinks:Strong:minutes=7")


def test_an_own_class_serves_wherever_things_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Source):
        pass

    module = types.ModuleType("own_data")
    module.Mine = Mine
    monkeypatch.setitem(sys.modules, "own_data", module)
    assert isinstance(SOURCES.read("own_data:Mine"), Mine)


@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), max_size=30))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    for registry in (DRINKS, COUNT_SYNCS, POLICIES):
        if text.startswith("width:"):
            continue  # reads a file
        said = ""
        try:
            registry.read(text)
        except ValueError as error:
            said = str(error)
        assert "\n" not in said


@pytest.mark.parametrize("registry", [POLICIES, SOURCES, FEATURES, COUNT_SYNCS], ids=lambda r: r.what)
def test_forms_name_every_entry_and_setting(registry: Registry) -> None:
    for entry in registry.entries:
        assert entry.form in registry.forms()
        assert all(spelled in entry.form for spelled in entry.settings if not (entry.bare or entry.path))


def test_settings_without_a_default_are_required() -> None:
    milk: Registry[object] = Registry("drink", [Entry("milk", lambda sort, fat, cups=1: (sort, fat, cups), "sort")])
    assert milk.forms() == "milk:sort=TEXT,fat=TEXT[,cups=TEXT]"
    assert milk.read("milk:sort=oat,fat=2") == ("oat", 2, 1)
    for text in ("milk:sort=oat", "milk:sort=oat,cups=2"):
        with pytest.raises(ValueError, match="milk needs fat=TEXT"):
            milk.read(text)


def test_guesses() -> None:
    assert [guessed(text) for text in ("3", "3.5", "1e3", "true", "false", "x", "")] == [
        3,
        3.5,
        1e3,
        True,
        False,
        "x",
        "",
    ]
