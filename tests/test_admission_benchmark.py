"""The suite admission: its numbers by hand, and the virtual clock, on which nothing is measured."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as run
from benchmarks import rows
from benchmarks.baselines.simulation import Request
from benchmarks.report import tables
from benchmarks.suites import admission


def request(arrival: float, steps: int, depth: int, seed: int = 0) -> Request:
    return Request(arrival, seed, steps, 0, depth - 1)


def test_numbers_by_hand() -> None:
    outcome = admission.Outcome(
        latencies=np.array([2.0, 4.0, 6.0, 30.0]),
        alone=np.array([1.0, 2.0, 1.0, 10.0]),
        deep=np.array([False, False, False, True]),
        seconds=40.0,
    )
    found = outcome.numbers
    assert (found["all_mean"], found["all_p50"], found["all_longest"]) == (10.5, 5.0, 30.0)
    assert (found["shallow_mean"], found["shallow_p50"], found["deep_p95"]) == (4.0, 4.0, 30.0)
    # slowed down 2, 2, 6 and 3 times
    assert found["slowdown_mean"] == 3.25
    assert found["slowdown_p95"] == pytest.approx(3 + 0.85 * 3)
    assert found["fairness"] == pytest.approx(13**2 / (4 * (4 + 4 + 36 + 9)))


@pytest.mark.parametrize(
    ("kind", "machine", "latencies"),
    [
        # one slot; the deep one takes 13 x 2 blocks of a millisecond, the shallow ones 3 and 6
        ("arrival", "linear", [26, 29, 35]),
        ("work", "linear", [35, 3, 9]),
        ("arrival", "flat", [26, 29, 35]),
    ],
)
def test_latencies_by_hand(kind: str, machine: str, latencies: list[int]) -> None:
    asked = [request(0.0, 2, 13), request(0.0, 1, 3), request(0.0, 2, 3)]
    outcome = admission.simulate(kind, machine, asked, capacity=1)
    assert (1e3 * outcome.latencies).tolist() == pytest.approx(latencies)
    assert (1e3 * outcome.alone).tolist() == pytest.approx([26, 3, 6])
    assert outcome.deep.tolist() == [True, False, False]


def test_machines_by_hand() -> None:
    linear, flat = (admission.costs(machine, 4) for machine in admission.MACHINES)
    rows = np.array([4, 2, 1] + [0] * 10)
    assert linear.seconds(rows) == pytest.approx(7e-3)
    assert flat.seconds(rows) == pytest.approx(3e-3)


def test_loads_and_kinds_of_requests() -> None:
    burst = admission.mixed(500, admission.BURST, None, seed=1)
    assert {one.arrival for one in burst} == {0.0}
    deep = [one for one in burst if one.jitter + 1 == 13]
    assert len(deep) == 50
    assert {50 <= one.steps <= 100 for one in deep} == {True}
    assert {10 <= one.steps <= 30 for one in burst if one not in deep} == {True}
    assert burst == admission.mixed(500, admission.BURST, None, seed=1)
    assert burst != admission.mixed(500, admission.BURST, None, seed=2)
    poisson = admission.mixed(500, 0.5, 8.0, seed=1)
    assert np.diff([one.arrival for one in poisson]).mean() == pytest.approx(1 / 4, rel=5 / 500**0.5)
    groups = admission.mixed(500, admission.GROUPS, 8.0, seed=1)
    assert sorted({one.arrival for one in groups})[:3] == pytest.approx([0.0, 5.0, 10.0])  # 32 at 0.8 of 8 a second
    for other in (poisson, groups):
        assert [dataclasses.replace(one, arrival=0.0) for one in other] == burst


def test_rows_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SHALLOW_STEPS", (1, 3))
    monkeypatch.setattr(admission, "DEEP_STEPS", (5, 9))
    file = rows.Rows(tmp_path)
    admission.run(file, admission.Sizes(20, 2, 3, (0.8,)))
    assert [(row["variant"], row["parameters"]["load"]) for row in file.rows] == [
        (kind, load) for load in ("burst", "groups of 32", 0.8) for kind in ("arrival", "work")
    ] * 2
    for row in file.rows:
        low, high = row["spread"]["all_mean"]
        assert low < high
        assert row["all_mean"] == pytest.approx((low + high) / 2)
    burst = {row["variant"]: row for row in file.rows if row["parameters"]["load"] == "burst"}
    assert burst["work"]["shallow_mean"] < burst["arrival"]["shallow_mean"]
    shown = tables.all_tables(file.rows)
    assert len(shown) == 2
    assert all(len(line) == len(table.header) for table in shown for line in table.body)


def test_the_suite_is_chosen_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(run.admission, "run", lambda file, sizes: chosen.append(sizes))
    for flags in ([], ["--quick"]):
        monkeypatch.setattr("sys.argv", ["run.py", "--suite", "admission", "--out", str(tmp_path), *flags])
        run.main()
    assert chosen == [admission.FULL, admission.QUICK]
