"""A policy that is there to let samples exit, and lets none exit, says so: in the report, once in the log, and in the
line of the command."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff.commands.sample import _asks
from adadiff.policies.exits import Depth, Full, Replay, Threshold
from adadiff.policies.interface import ExitPolicy
from adadiff.policies.width import Width
from adadiff.sampling.reports import Totals, log_never_acted
from naming import named
from sampler.shell import config, run, saved
from sampler.slim import slim_served
from sampler.test_calibration import made
from sampler.tiny import SERVED, scramble, served, stepped

NEVER = [[0.0] * 4] * 3, [5, 5, 5]


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    log_never_acted.cache_clear()


class Stubborn(ExitPolicy):
    """Asks, and answers no."""

    def exit_mask(self, u: torch.Tensor | None, layer: int, context: object) -> torch.Tensor:
        return torch.zeros(len(u), dtype=torch.bool)

    def __str__(self) -> str:
        return "stubborn"


def broken() -> adadiff.Model:
    """Its uncertainties are NaN, which is below no threshold."""
    model = adadiff.Model(SERVED).requires_grad_(False).eval()
    scramble(model, 0.3)
    model.exits.weight.fill_(torch.nan)
    return model


def sure_of_nothing() -> adadiff.Model:
    """Its uncertainties are 0.5."""
    model = broken()
    for parameter in (model.exits.weight, model.exits.bias, model.exits.time_weight):
        parameter.zero_()
    return model


def calibrated() -> adadiff.Model:
    model = broken()
    model.calibration = made((0.5, *NEVER))
    return model


CASES = [
    (sure_of_nothing, "exit:0.1"),
    (sure_of_nothing, "exit:patience=0.1"),
    (sure_of_nothing, "exit:batch-mean=0.1"),
    (served, "exit:depth=5"),
    (served, "exit:depth=99"),
    (served, Stubborn()),
    (broken, "exit:0.99"),
    (broken, "exit:patience=0.99"),
    (calibrated, "exit:budget=0.5"),
    (calibrated, "exit:table=0.5"),
]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "adadiff"]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize(("make", "policy"), CASES, ids=named)
def test_a_run_in_which_nobody_exits_says_so(make, policy, guidance_scale: float, caplog) -> None:
    settings = {"steps": 3, "class_labels": [0, 1, 2], "policy": policy, "guidance_scale": guidance_scale}
    with caplog.at_level(logging.WARNING, "adadiff"):
        for _ in range(2):
            _, report = adadiff.sample(make(), 3, **settings)
            assert report.never_acted
            assert str(report).endswith("; the policy never let a sample exit")
    assert messages(caplog) == [f"policy {policy} never let a sample exit: every block was run"]  # once


@pytest.mark.parametrize(
    ("policy", "n"),
    [
        ("full", 3),
        (Full(), 3),
        ("exit:0.5", 3),
        ("exit:depth=2", 3),
        ("exit:depth=4.9", 3),
        (Threshold(0.99), 3),
        (Depth(1), 3),
        ("exit:1e-30", 0),
    ],
    ids=named,
)
def test_others_say_nothing(policy, n: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "adadiff"):
        _, report = adadiff.sample(served(), n, steps=4, policy=policy)
    assert not report.never_acted
    assert "never" not in str(report)
    assert messages(caplog) == []


def test_one_exit_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    """One sample, at one step of many, after the last layer that one may exit after."""
    exit_layer = torch.full((4, 3, 2), 5, dtype=torch.uint8)
    exit_layer[2, 1, 0] = 4
    with caplog.at_level(logging.WARNING, "adadiff"):
        _, report = adadiff.sample(served(), 3, steps=4, policy=Replay(exit_layer, needs_scores=False))
    assert not report.never_acted
    assert messages(caplog) == []


def test_an_engine_says_so_when_it_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "adadiff"), stepped() as engine:
        stuck = engine.submit(seed=1, steps=3, policy=Stubborn())
        whole = engine.submit(seed=2, steps=3, policy="full")
        while engine.step():
            pass
        assert (stuck.report.never_acted, whole.report.never_acted) == (True, False)
        assert engine.report.never_acted
        assert messages(caplog) == []  # others may still come
    assert len(messages(caplog)) == 1
    assert "requests" in messages(caplog)[0]


def test_an_engine_with_one_request_that_exits_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "adadiff"), adadiff.Engine(served(), 4) as engine:
        handles = [engine.submit(seed=1, steps=3, policy=policy) for policy in (Stubborn(), "full", "exit:depth=2")]
        for handle in handles:
            handle.result(60)
    assert [handle.report.never_acted for handle in handles] == [True, False, False]
    assert not engine.report.never_acted
    assert messages(caplog) == []


def test_an_engine_of_plain_requests_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "adadiff"), stepped() as engine:
        engine.submit(seed=1, steps=2, policy="full")
    assert engine.report.batch == Totals(ticks=2, passes=2, blocks=10, **costs(engine.report.batch))
    assert not engine.report.never_acted
    assert messages(caplog) == []


def costs(totals: Totals) -> dict[str, int]:
    return {name: getattr(totals, name) for name in ("macs", "macs_full", "rows_moved")}


@pytest.mark.parametrize(("policy", "never"), [("exit:depth=5", True), ("exit:depth=2", False), ("full", False)])
def test_blocks_that_a_shallow_network_lacks_are_no_exits(policy: str, never: bool, caplog) -> None:
    """Half of the steps are the shallow network's, by any policy."""
    config = dataclasses.replace(SERVED, network=dataclasses.replace(SERVED.network, depth=2), exits=None)
    shallow = adadiff.Model(config).requires_grad_(False).eval()
    given = {"steps": 4, "class_labels": 1, "policy": policy}
    both = {"shallow_model": shallow, "t_switch": 500.0}
    with caplog.at_level(logging.WARNING, "adadiff"):
        _, report = adadiff.sample(served(), 3, **given, **both)
        assert report.blocks < report.blocks_full
        assert report.never_acted == never
        assert ("never let a sample exit" in str(report)) == never
        with stepped(**both) as engine:
            engine.submit(seed=0, **given)
        assert engine.report.never_acted == never
    assert len(messages(caplog)) == 2 * never


WIDTHS = Width((500.0,), (1.0, 0.5))  # narrow at noisy times


def test_widths_that_never_narrow_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """Also where some exit, and where a schedule is narrow at times at which nobody comes."""
    given = {"class_labels": 1}
    late = {"init_image": torch.zeros(2, *slim_served().backbone.sample_shape), "strength": 0.3}
    with caplog.at_level(logging.WARNING, "adadiff"):
        for _ in range(2):
            _, report = adadiff.sample(slim_served(), 2, steps=4, policy="width:1", **given)
            assert report.never_acted
            assert str(report).endswith("; the policy never let a sample run narrow")
        _, report = adadiff.sample(slim_served(), 2, steps=4, policy=[WIDTHS, "exit:depth=2"], **late, **given)
        assert report.idle == ("width",)
        _, report = adadiff.sample(slim_served(), 2, steps=4, policy=WIDTHS, **given)
        assert (report.never_acted, report.idle) == (False, ())
    assert messages(caplog) == [
        "policy width:1 never let a sample run narrow",
        "policy exit:depth=2+width:2 widths never let a sample run narrow",
    ]


def test_an_engine_names_each_part_that_never_acted(caplog: pytest.LogCaptureFixture) -> None:
    policies = ("exit:depth=2", "cache:threshold=0", "width:1", "full")
    with caplog.at_level(logging.WARNING, "adadiff"):
        with adadiff.Engine(slim_served(), 4, threaded=False) as engine:
            for i, policy in enumerate(policies):
                engine.submit(seed=i, steps=3, policy=policy)
        assert messages(caplog) == ["policy of all requests to an engine never let a sample reuse or run narrow"]
        caplog.clear()
        with adadiff.Engine(slim_served(), 4, threaded=False) as engine:
            for i, policy in enumerate(("exit:depth=5", "reuse:every=2", "width:0.5")):
                engine.submit(seed=i, steps=3, policy=policy)
        assert messages(caplog) == ["policy of all requests to an engine never let a sample exit"]


@pytest.mark.parametrize("form", ["png", "npz"])
def test_the_command_says_so_in_its_line(form: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = saved(tmp_path / "m.safetensors", config())
    said = "no work left out: the policy never let a sample exit"
    for number, (policy, never) in enumerate([("exit:0.0001", True), ("exit:depth=3", True), ("full", False)]):
        line = f"sample {model} --out {tmp_path}/{number} --n 2 --steps 2 --format {form} --policy {policy}"
        assert run(line) == 0
        printed = capsys.readouterr().out
        assert (said in printed) == never
        assert "no work left out" in printed
    assert run(f"sample {model} --out {tmp_path}/d --n 2 --steps 2 --format {form} --policy exit:depth=1") == 0
    assert "no work left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "asks"),
    [
        ("estimate:FILE,share=0.5", ("reuse",)),
        ("cache:threshold=0.1+exit:0.2", ("reuse", "exit")),
        ("width:FILE", ("width",)),
        ("full", ()),
    ],
)
def test_the_command_knows_what_a_policy_is_there_for(policy: str, asks: tuple[str, ...]) -> None:
    assert _asks(policy) == asks
