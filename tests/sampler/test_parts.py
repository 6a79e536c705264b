"""A sample follows one policy of each kind: how they are spelled together, and whom that concerns."""

import numpy as np
import pytest
import torch

import adadiff
from adadiff.forward.networks import Network
from adadiff.policies.cascade import Cascade
from adadiff.policies.exits import Depth, Threshold
from adadiff.policies.interface import ExitPolicy
from adadiff.policies.parts import Parts
from adadiff.policies.reuse import Cache, Reuse
from adadiff.policies.spelling import parts_from, policy_from
from adadiff.policies.width import Width
from adadiff.sampling.network_set import NetworkSet
from naming import named
from sampler.own_rules import BelowATime
from sampler.tiny import served


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        ("full", Parts()),
        ("exit:0.2,min_layer=3", Parts(exit=Threshold(0.2, 3))),
        ("cache:threshold=0.1", Parts(reuse=Cache(0.1))),
        ("cache:threshold=0.1+exit:0.2", Parts(exit=Threshold(0.2), reuse=Cache(0.1))),
        ("exit:depth=2.5+reuse:every=3,dense_early=2", Parts(exit=Depth(2.5), reuse=Reuse(3, dense_early=2))),
        ("reuse:every=2+cascade:some/file", Parts(reuse=Reuse(2), cascade=Cascade("some/file"))),
        (Threshold(0.2), Parts(exit=Threshold(0.2))),
        ((Cache(0.1), "exit:0.2"), Parts(exit=Threshold(0.2), reuse=Cache(0.1))),
        (Parts(exit=Depth(2)), Parts(exit=Depth(2))),
        ("sampler.own_rules:BelowATime", Parts(exit=BelowATime())),
        (
            "sampler.own_rules:BelowATime:depth=2,below=0.5,strict=true,note=a+exit:0.2".partition("+")[0],
            Parts(exit=BelowATime(2, 0.5, True, "a")),
        ),
        ("reuse:every=2+sampler.own_rules:BelowATime:depth=3", Parts(exit=BelowATime(3), reuse=Reuse(2))),
    ],
    ids=named,
)
def test_spellings(policy: object, parts: Parts) -> None:
    assert parts_from(policy) == parts


def test_text_and_parts_are_each_others_inverse() -> None:
    """Full is not named beside another part, and named where it is all there is."""
    for text in ("full", "exit:0.2,min_layer=3", "exit:0.2+cache:threshold=0.1,first=2", "exit:depth=3+reuse:every=2"):
        assert str(parts_from(text)) == text
    assert str(parts_from("full+reuse:every=2")) == "reuse:every=2"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("exit:0.1+exit:0.2", "one exit policy, got 'exit:0.1' and 'exit:0.2'"),
        ("cache:threshold=0.1+reuse:every=2", "one reuse policy"),
        ("full+exit:0.2", "one exit policy"),
        ("exit:0.1+", "no policy ''"),
        ("exit:0.1+never", "no policy 'never'"),
        ((), "a policy is"),
        ((Threshold(0.1), 3), "a policy is"),
        (None, "a policy is"),
        (object(), "a policy is"),
        ("no_such_module:Rule", "there is no module 'no_such_module'"),
        ("sampler.no_such:Rule", "there is no module 'sampler.no_such'"),
        ("sampler.own_rules:Missing", "has no 'Missing'"),
        ("sampler.own_rules:NoPolicy", "is no ExitPolicy"),
        ("sampler.own_rules:NoPolicy:args=ls,shell=true", "is no ExitPolicy"),
        ("os:system:command=ls", "is no ExitPolicy"),
        ("sampler.own_rules:BelowATime:depths=2", "unexpected keyword argument 'depths'"),
        ("sampler.own_rules:BelowATime:depth=0", "depth must be at least 1, got 0"),
    ],
    ids=named,
)
def test_what_is_none(policy: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts_from(policy)


def test_where_only_exits_are_decided_other_parts_are_refused() -> None:
    assert isinstance(policy_from("exit:0.2"), ExitPolicy)
    model = served()
    x, t = torch.zeros(1, *model.backbone.sample_shape), torch.zeros(1)
    with pytest.raises(ValueError, match="only exit policies"):
        adadiff.forward(model, x, t, torch.tensor([0]), policy="exit:0.2+cache:threshold=0.1")


def test_a_policy_of_ones_own_is_named_wherever_a_built_in_one_is() -> None:
    """The same images and exit layers as with the object itself."""
    given = {"steps": 4, "class_labels": [0, 1, 2]}
    named, report = adadiff.sample(served(), 3, policy="sampler.own_rules:BelowATime:depth=2,below=600", **given)
    images, other = adadiff.sample(served(), 3, policy=BelowATime(2, 600.0), **given)
    assert torch.equal(named, images)
    assert torch.equal(report.exit_layer, other.exit_layer)
    assert set(report.exit_layer[..., 0].flatten().tolist()) == {2, 5}


@pytest.mark.parametrize(
    ("times", "widths", "message"),
    [
        ((), (), "0 times need 1 widths"),
        ((10.0,), (1.0,), "1 times need 2 widths"),
        ((20.0, 10.0), (1.0, 0.5, 0.5), "ascend"),
        ((10.0, 10.0), (1.0, 0.5, 0.5), "ascend"),
        ((1000.5,), (1.0, 0.5), "within 0..1000"),
        ((), (0.0,), r"in \(0, 1\]"),
        ((), (1.5,), r"in \(0, 1\]"),
        ((float("nan"),), (1.0, 0.5), "finite"),
        ((), (True,), "finite"),
    ],
)
def test_widths_that_are_none(times: tuple, widths: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Width(times, widths)


def test_a_width_follows_its_own_time() -> None:
    """A time that parts two widths belongs to the noisier one."""
    width = Width((100.0, 400.0), (1.0, 0.75, 0.25))
    t = np.array([0.0, 99.9, 100.0, 399.9, 400.0, 999.0], dtype=np.float32)
    assert width.widths_at(t).tolist() == [1.0, 1.0, 0.75, 0.75, 0.25, 0.25]


class Halves:
    """Two networks beside the model, by time."""

    def __init__(self, *models: adadiff.Model):
        self.networks = [Network(model, asks=False) for model in models]

    def choose(self, t: np.ndarray) -> np.ndarray:
        return (t // 400).astype(np.int64)


def test_networks_in_flight_are_known_once_and_forgotten_when_unused() -> None:
    full, one, two = (object() for _ in range(3))
    known = NetworkSet(full)
    first, second = Halves(one, two), Halves(two, two)
    numbers = [known.add(choice) for choice in (first, None, second, first)]
    assert numbers == [1, 0, 2, 1]
    assert [network.model for network in known.networks] == [full, one, two]
    t = np.array([0.0, 500.0, 900.0, 500.0, 900.0], dtype=np.float32)
    assert known.now(np.array([1, 1, 1, 0, 2]), t).tolist() == [0, 1, 2, 0, 2]
    assert known.now(np.array([0, 0, 1, 0, 1]), t * 0) is None
    assert known.keep(np.array([2, 0, 2])).tolist() == [1, 0, 1]
    assert (len(known), len(known.networks)) == (1, 2)
    assert known.now(np.array([1, 0, 1]), t[1:4]).tolist() == [1, 0, 1]
