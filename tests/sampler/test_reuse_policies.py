"""Policies that reuse earlier steps: their spelling, their checks, who reuses, and where they are refused."""

import math

import pytest
import torch

from adadiff.policies.reuse import BatchCache, Cache, CachedRest, Reuse, ReuseContext, ReusePolicy
from adadiff.policies.spelling import policy_from, reuse_or_exit_policy_from


def context(step: list[int], age: list[int], left: list[int] | None = None) -> ReuseContext:
    steps_left = None if left is None else torch.tensor(left)
    return ReuseContext(torch.tensor(step), torch.tensor(age), steps_left, torch.zeros(len(step)))


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("cache:threshold=0.08", Cache(0.08)),
        ("cache:threshold=0", Cache(0)),
        ("cache:threshold=0.1234567,first=2,last=3,gate=input", Cache(0.1234567, 2, 3, "input")),
        ("cache:gate=residual,threshold=1e-7", Cache(1e-7)),
        ("cache:threshold=0.2,order=1", Cache(0.2, order=1)),
        ("cache:batch=0.08", BatchCache(0.08)),
        ("cache:first=2,batch=0.08", BatchCache(0.08, 2)),
        ("reuse:every=2", Reuse(2)),
        ("reuse:every=4,order=1", Reuse(4, order=1)),
        ("reuse:every=3,level=layer,dense_early=4,dense_late=1", Reuse(3, "layer", 4, 1)),
    ],
)
def test_spellings(text: str, policy: ReusePolicy) -> None:
    found = reuse_or_exit_policy_from(text)
    assert found == policy
    assert type(found) is type(policy)
    assert reuse_or_exit_policy_from(policy) is policy
    assert reuse_or_exit_policy_from(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache:", "cache takes no ''.* There are cache:threshold=CHANGE"),
        ("cache:0.08", "cache takes no '0.08'"),
        ("cache:first=2", "cache needs threshold"),
        ("cache:threshold=x", "threshold must be a number, got 'x'"),
        ("cache:threshold=nan", "finite and at least 0, got nan"),
        ("cache:threshold=-0.1", "finite and at least 0, got -0.1"),
        ("cache:threshold=0.1,threshold=0.2", "threshold is given twice"),
        ("cache:threshold=0.1,first=0", "first must be a whole number of 1 or more, got 0"),
        ("cache:threshold=0.1,first=1.5", "first must be a whole number, got '1.5'"),
        ("cache:threshold=0.1,last=-1", "last must be a whole number of 0 or more, got -1"),
        ("cache:threshold=0.1,gate=output", "gate must be one of residual, input, got 'output'"),
        ("cache:threshold=0.1,every=2", "cache takes no 'every=2'"),
        ("cache:batch=0.1,gate=input", "cache takes no 'gate=input'"),
        ("cache:threshold=0.1,order=2", "order must be one of 0, 1, got 2"),
        ("reuse:every=2,level=layer,order=1", "order=1 is for level=block, got level=layer"),
        ("cache:batch=nan", "finite and at least 0, got nan"),
        ("reuse:every=0", "every must be a whole number of 1 or more, got 0"),
        ("reuse:level=block", "reuse needs every"),
        ("reuse:every=2,level=head", "level must be one of block, layer, unit, got 'head'"),
        ("reuse:every=2,dense_early=0", "dense_early must be a whole number of 1 or more, got 0"),
        ("caches:threshold=1", "no policy"),
        ("cache", "cache needs threshold"),
    ],
)
def test_what_is_no_policy_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reuse_or_exit_policy_from(text)


def test_settings_are_checked_in_python_too() -> None:
    for wrong in (True, "0.1", None, math.inf):
        with pytest.raises(ValueError, match="threshold must be"):
            Cache(wrong)
    with pytest.raises(ValueError, match="order must be one of 0, 1, got True"):
        Reuse(2, order=True)
    with pytest.raises(ValueError, match="depth must be a whole number"):
        CachedRest(2.5)


def test_a_cache_reuses_up_to_its_threshold_and_never_at_nan() -> None:
    change = torch.tensor([0.0, 0.25, 0.2500001, math.inf, math.nan])
    mask = Cache(0.25).reuse_mask(change, context([3] * 5, [1] * 5))
    assert mask.tolist() == [True, True, False, False, False]


def test_a_static_plan_counts_steps_of_each_lane() -> None:
    plan = Reuse(3, dense_early=2, dense_late=1)
    taken, age = [], 0
    for step in range(10):
        (reuses,) = plan.reuse_mask(None, context([step], [age], [9 - step])).tolist()
        taken.append(reuses)
        age = age + 1 if reuses else 1
    # full: 0 and 1 (early), then every third, and 9 (late)
    assert taken == [False, False, True, True, False, True, True, False, True, False]
    # lanes of one call stand at steps of their own
    assert plan.reuse_mask(None, context([1, 5, 5, 9], [1, 1, 3, 1], [8, 4, 4, 0])).tolist() == [
        *(False, True, False, False),
    ]
    assert not Reuse(1).reuse_mask(None, context([1, 2], [1, 1])).any()
    assert plan.needs_steps_left
    assert not Reuse(3).needs_steps_left


def test_the_cached_rest_is_always_taken() -> None:
    assert CachedRest(3).first == 3
    assert CachedRest(3).reuse_mask(None, context([0, 7], [1, 7])).all()


@pytest.mark.parametrize("policy", ["cache:threshold=0.08", "reuse:every=2", Cache(0.1)], ids=str)
def test_one_forward_pass_alone_refuses_them(policy: str | ReusePolicy) -> None:
    with pytest.raises(ValueError, match="only exit policies can be") as refused:
        policy_from(policy)
    assert "\n" not in str(refused.value)
