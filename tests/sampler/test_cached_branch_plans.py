"""Plans of branches to reuse: what is spelled how, what never acts, and what is refused."""

import pytest

import adadiff
from adadiff.model import Model
from adadiff.policies.exits import Full
from adadiff.policies.reuse import Reuse
from adadiff.policies.spelling import parts_from
from sampler.tiny import SERVED, served


def test_a_plan_that_never_acts_is_allowed_and_told(caplog: pytest.LogCaptureFixture) -> None:
    _, report = adadiff.sample(served(), 2, steps=1, seed=0, policy="reuse:every=7,level=layer")
    assert report.never_acted
    assert "never let a sample reuse" in str(report)
    _, report = adadiff.sample(served(), 2, steps=3, seed=0, policy="reuse:every=7,level=layer")
    assert report.reuses == 4  # fewer steps than `every`: all but the first


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("reuse:every=2,level=layer", Reuse(2, "layer")),
        ("reuse:every=2,level=unit,unit=mlp", Reuse(2, "unit", unit="mlp")),
        ("reuse:layers=2-12,every=2,level=layer", Reuse(2, "layer", layers=(2, 12))),
        ("reuse:every=4,level=unit,unit=attention,layers=3", Reuse(4, "unit", unit="attention", layers=(3, 3))),
        ("reuse:every=3,level=layer,dense_early=2,dense_late=1,layers=1-2", Reuse(3, "layer", 2, 1, layers=(1, 2))),
    ],
)
def test_spellings(text: str, policy: Reuse) -> None:
    assert parts_from(text).reuse == policy
    assert parts_from(str(policy)).reuse == policy
    assert parts_from(policy).exit == Full()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reuse:every=2,level=unit", "unit must be one of attention, cross, mlp, got None"),
        ("reuse:every=2,level=unit,unit=norm", "unit must be one of attention, cross, mlp, got 'norm'"),
        ("reuse:every=2,level=layer,unit=mlp", "unit=mlp is for level=unit, got level=layer"),
        ("reuse:every=2,layers=2-3", "layers are chosen at level=layer and level=unit, got level=block"),
        ("reuse:every=2,level=layer,layers=0-3", r"layers must be \(first, last\), .* got \(0, 3\)"),
        ("reuse:every=2,level=layer,layers=4-3", r"counted from 1, got \(4, 3\)"),
        ("reuse:every=2,level=layer,layers=two", "layers must be FIRST-LAST, got 'two'"),
        ("reuse:every=2,level=layer,last=2", "reuse takes no 'last=2'"),
        ("reuse:every=2,level=layer,layers=2-6", r"names layer 6; this network has layers 1..5"),
    ],
)
def test_what_cannot_be_reused_is_refused_before_work_starts(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adadiff.sample(served(), 1, steps=1, policy=text)


def test_blocks_that_show_no_branches_are_refused() -> None:
    class Hidden(type(served().backbone.blocks[1])):
        branches = property(lambda self: (), lambda self, value: None)

    model = Model(SERVED).requires_grad_(False).eval()
    model.backbone.blocks[1].__class__ = Hidden
    with pytest.raises(ValueError, match="block 2 of this network exposes no branches"):
        adadiff.sample(model, 1, steps=1, policy="reuse:every=2,level=layer")
