"""Fronts of the comparison at equal seconds, by hand and by brute force."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadiff.metrics.intervals import Interval
from benchmarks.report import fronts
from benchmarks.studies import recipes
from benchmarks.suites import screening


def point(method: str, seconds: float, frechet: float, setting: str | None = None, **more: object) -> fronts.Point:
    """Every round and every draw as the value, unless said otherwise."""
    given = {
        "steps": 10,
        "solver": "ddim",
        "rounds": (seconds * 64,) * 3,
        "macs": seconds * 1e9,
        "exit_layer": 4.0,
        "measures": {"frechet": Interval(frechet, frechet, frechet), "accuracy": Interval(0.5, 0.4, 0.6)},
        "draws": {"frechet": np.full(4, frechet)},
        "psnr": 20.0,
    }
    return fronts.Point(method=method, setting=setting, seconds=seconds, **{**given, **more})


places = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@settings(max_examples=40)
@given(places)
def test_a_front_holds_those_that_nobody_beats(given: list[tuple[int, int]]) -> None:
    """In both, or in one with the other equal: whole numbers make for many ties."""
    all_points = [point(str(i), float(x), float(y)) for i, (x, y) in enumerate(given)]
    found = fronts.front(all_points, "seconds", "frechet")
    unbeaten = {(x, y) for x, y in given if not any((a <= x and b <= y) and (a, b) != (x, y) for a, b in given)}
    assert [(p.seconds, p.measures["frechet"].value) for p in found] == sorted(unbeaten)


def test_where_more_is_better_the_front_rises() -> None:
    shares = {1.0: 0.2, 2.0: 0.9, 3.0: 0.8}
    given = [point("a", x, 1.0, measures={"accuracy": Interval(share, share, share)}) for x, share in shares.items()]
    assert [p.seconds for p in fronts.front(given, "seconds", "accuracy")] == [1.0, 2.0]


# On the way from (1 s, 8) to (4 s, 2) the distance falls as 8 over the seconds.
OTHERS = [point("fewer steps", 1.0, 8.0), point("fewer steps", 4.0, 2.0)]


@pytest.mark.parametrize(
    ("seconds", "frechet", "ratio", "verdict"),
    [
        (2.0, 3.0, 0.75, "below"),
        (2.0, 5.0, 1.25, "above"),
        (1.0, 8.0, 1.0, "on it"),  # as good as one that is there
        (4.0, 1.0, 0.5, "below"),
        (9.0, 3.0, 1.5, "above"),  # whoever has more time may take less
        (0.5, 9.0, None, "no other so fast"),
    ],
)
def test_over_the_front_by_hand(seconds: float, frechet: float, ratio: float | None, verdict: str) -> None:
    found = fronts.over_front(point("ours, faithful", seconds, frechet), OTHERS, "seconds", "frechet")
    assert fronts.verdict(found) == verdict
    if ratio is None:
        assert found is None
    else:
        assert (found.value, found.low, found.high) == pytest.approx((ratio,) * 3)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.8, 0.99, "below"),
        (0.8, 1.01, "undecided"),
        (0.99, 1.2, "undecided"),
        (1.01, 1.2, "above"),
        (1.00001, 1.00002, "on it"),  # as a setting of theirs, with scores that nobody left by
        (0.9999, 1.01, "undecided"),
        (0.9, 0.9999, "below"),
    ],
)
def test_a_verdict_takes_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert fronts.verdict(Interval((low + high) / 2, low, high)) == verdict


def test_the_interval_holds_samples_and_rounds() -> None:
    """Draws of the distance from 2.7 to 3.3, in pairs with those of the others, and rounds 10 % apart."""
    wide = {"frechet": np.array([2.7, 3.3, 2.7, 3.3])}
    ours = point("ours, faithful", 2.0, 3.0, draws=wide)
    found = fronts.over_front(ours, OTHERS, "seconds", "frechet")
    assert found.value == 0.75
    assert (found.low, found.high) == pytest.approx((0.675, 0.825))
    assert fronts.over_front(ours, [], "seconds", "frechet") is None
    shared = [dataclasses.replace(p, draws={"frechet": wide["frechet"] * p.measures["frechet"].value}) for p in OTHERS]
    paired = fronts.over_front(ours, shared, "seconds", "frechet")
    assert (paired.low, paired.high) == pytest.approx((0.75, 0.75))
    uncertain = dataclasses.replace(ours, draws={"frechet": np.full(200, 3.0)}, rounds=(1.8, 2.0, 2.2))
    rest = [dataclasses.replace(p, draws={"frechet": np.full(200, p.measures["frechet"].value)}) for p in OTHERS]
    timed = fronts.over_front(uncertain, rest, "seconds", "frechet")
    assert timed.low < 0.75 < timed.high
    assert fronts.over_front(uncertain, rest, "macs", "frechet").low == pytest.approx(0.75)


def test_rounds_are_drawn_together() -> None:
    """What all settings lose in a slow round cancels."""
    one = point("a", 2.0, 1.0, rounds=(1.0, 2.0, 3.0)).cost_draws("seconds", 50)
    other = point("b", 4.0, 1.0, rounds=(2.0, 4.0, 6.0)).cost_draws("seconds", 50)
    assert len(set(one.tolist())) > 1
    np.testing.assert_allclose(other, 2 * one)


def test_neighbours_that_change_places_in_a_draw() -> None:
    close = [
        point("a", 1.0, 8.0, rounds=(0.9, 1.0, 1.1), draws={"frechet": np.full(50, 8.0)}),
        point("b", 1.01, 2.0, rounds=(1.1, 1.01, 0.9), draws={"frechet": np.full(50, 2.0)}),
    ]
    ours = point("ours, faithful", 1.005, 4.0, rounds=(1.0, 1.005, 1.0), draws={"frechet": np.full(50, 4.0)})
    found = fronts.over_front(ours, close, "seconds", "frechet")
    assert 4 / 8 - 2 < found.low <= found.value <= found.high < 4 / 2 + 2  # finite, within what the two can make of it


def test_what_is_near_a_front_of_its_family() -> None:
    """Ours are far below the others, whose best is kept all the same; so is the best of every line of the tables,
    and every number of steps that fewer steps do not beat, though other methods do."""
    given = [
        cost("fewer steps", 1.0, 8.0), cost("fewer steps", 2.0, 7.9), cost("fewer steps", 2.1, 9.0),
        cost("fewer steps", 4.0, 2.0), cost("fewer steps", 4.1, 2.5),
        cost("static table", 2.0, 7.0), cost("static table", 2.1, 9.0), cost("fixed depth", 2.0, 20.0),
        cost("ours, cache", 1.0, 0.8), cost("ours, cache", 1.1, 0.9),
        cost("ours, faithful", 1.0, 0.5, "0.4"), cost("ours, faithful", 1.0, 3.0, "0.7"),
    ]  # fmt: skip
    kept = screening.near_a_front(given, screening.JUDGED[-1])
    names = [(p.method, p.macs, p.setting) for p in given if p in kept]
    assert names == [
        ("fewer steps", 1.0, None), ("fewer steps", 2.0, None), ("fewer steps", 4.0, None),
        ("static table", 2.0, None), ("fixed depth", 2.0, None),
        ("ours, cache", 1.0, None),
        ("ours, faithful", 1.0, "0.4"), ("ours, faithful", 1.0, "0.7"),
    ]  # fmt: skip
    assert screening.near_a_front(given, dict.fromkeys(screening.MEASURES, math.inf)) == given


def test_the_short_table_takes_the_best_setting_of_each_budget() -> None:
    found = [
        cost("fewer steps", 1.0, 8.0), cost("fewer steps", 4.0, 4.0),
        cost("ours, faithful", 4.0, 3.0, "0.4"), cost("ours, faithful", 4.0, 2.0, "0.4"),
        cost("ours, early model", 1.0, 9.6, "0.7, t ≥ 500"),
    ]  # fmt: skip
    row = {
        "machine": {"cpu": "a CPU"}, "threads": 1, "dtype": "float32", "versions": {"torch": "2"}, "usable": True,
    }  # fmt: skip
    table = fronts.short_table(found, [], [row], "digits")
    assert table.header == ("digits, at the same", "budget 40%", "budget 70%")
    assert table.body == [
        ("multiply-adds, squared error", "**0.50**", "**1.20**"),
        ("multiply-adds, Fréchet distance", "**0.50**", "**1.20**"),
    ]


def cost(method: str, macs: float, value: float, setting: str | None = None) -> fronts.Point:
    made = point(method, 1.0, value, setting)
    draws = {name: np.full(4, value) for name in screening.MEASURES}
    measures = {name: Interval(value, value, value) for name in screening.MEASURES}
    return dataclasses.replace(made, macs=macs, measures=measures, draws=draws)


def test_recipes_are_compared_along_their_own_fronts() -> None:
    """Only what exits early counts, and what an early model adds can be left out."""
    first = [
        point("ours, faithful", 1.0, 8.0, "0.4"),
        point("ours, faithful", 4.0, 2.0, "0.9"),
        point("ours, early model", 1.5, 3.0, "0.4, t ≥ 500"),
        point("fewer steps", 1.0, 1.0),
    ]
    second = [
        point("ours, one threshold", 2.0, 5.0, "θ = 0.5"),
        point("ours, faithful", 3.0, 6.0, "0.7"),  # beaten by the one before
        point("ours, early model", 1.5, 4.5, "0.4, t ≥ 500"),
        point("static table", 0.5, 0.1),
    ]
    alone = recipes.over(second, first, early=False)
    assert [(row[0], row[2], row[4]) for row in alone.body] == [("θ = 0.5", "2000.0", "1.250 (1.250 to 1.250)")]
    together = recipes.over(second, first, early=True)
    assert [(row[0], row[4]) for row in together.body] == [("early model, 0.4, t ≥ 500", "1.500 (1.500 to 1.500)")]


def test_recipes_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").touch()
    for path, message in ((tmp_path / "rows.jsonl", "no rows of the quality suite of canvases"), (tmp_path, "[Errno")):
        with pytest.raises(SystemExit):
            recipes.main([str(path), str(path)])
        assert f"error: {message}" in capsys.readouterr().err
