"""What is computed where branches are reused: rows of products, totals, and memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.rest_of_network import reuse_bytes
from adadiff.model import Model
from adadiff.models.layers import Attention, Mlp
from adadiff.policies.reuse import Reuse
from sampler.branches_by_hand import OneLane
from sampler.cached_branches import (
    CONFIGS,
    EXECUTIONS,
    HOST,
    INVARIANT,
    POLICIES,
    Watched,
    mixed,
    run,
)
from sampler.tiny import served


def test_a_capacity_in_bytes_counts_the_branches_that_are_kept() -> None:
    backbone = served().backbone
    one = 4 * backbone.tokens * backbone.dim
    both, few = (reuse_bytes(Reuse(2, "layer", layers=k), backbone, True, torch.float32) for k in (None, (2, 2)))
    # and what a store has in reserve, an eighth
    assert both - few == pytest.approx(8 * one * 9 / 8, abs=1)
    assert 2 * one <= few < 2.5 * one


def count_rows(monkeypatch: pytest.MonkeyPatch, model: Model) -> list[tuple[int, int, int]]:
    """Fills with (layer, j, rows) of every product of a branch."""
    seen: list[tuple[int, int, int]] = []
    bodies = {}
    for layer, block in enumerate(model.backbone.blocks, start=1):
        bodies |= {id(block.attn): (layer, 0), id(block.mlp): (layer, 1)}
    for body in (Attention, Mlp):
        usual = body.forward

        def counted(self, h: Tensor, *given: object, usual: Callable = usual) -> Tensor:
            seen.append((*bodies[id(self)], len(h)))
            return usual(self, h, *given)

        monkeypatch.setattr(body, "forward", counted)
    return seen


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_products_see_the_rows_that_compute_and_the_totals_say_so(
    kind: str, execution: ExecutionOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of lanes at different steps, where nobody exits: exactly those rows, whoever knows them."""
    model = served(CONFIGS[kind])
    tokens, blocks = model.backbone.tokens, model.backbone.blocks
    requests = [(i // 2, {"seed": i, "steps": 5, "policy": POLICIES[0] if i % 2 else "full"}) for i in range(4)]
    seen = count_rows(monkeypatch, model)
    _, batch = run(kind, requests, execution)
    ran = [sum(rows for *branch, rows in seen if branch == [layer, j]) for layer in range(1, 5) for j in (0, 1)]
    assert ran == [20 - 4] * 8  # of two samples steps 1 and 3 reuse
    assert (batch.totals.passes, batch.totals.reused) == (20, 4)
    spent = sum(rows * blocks[layer - 1].branches[j].macs(tokens) for layer, j, rows in seen)
    join = 2 * model.backbone.dim**2 * tokens * sum(block.skip_from is not None for block in blocks)
    assert batch.totals.macs == spent + 20 * (sum(model.backbone.stem_and_head_macs()) + join)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("execution", [HOST, INVARIANT], ids=["host", "lane by lane"])
def test_products_see_no_rows_that_have_exited_or_reuse(
    kind: str, execution: ExecutionOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, watched = served(CONFIGS[kind]), Watched()
    seen = count_rows(monkeypatch, model)
    run(kind, mixed(others=False), execution, watched)
    computing: dict[tuple[int, int], int] = {}
    for history in (history for histories in watched.told.values() for history in histories):
        lane = OneLane(history[0][0], model.num_layers)
        for _, step, left, *_, exit_layer in history:
            taken, kept, full = lane.step(step, left)
            lane.ends(step, kept, full, exit_layer)
            for layer in range(1, exit_layer + 1):
                for j in (0, 1):
                    computing[layer, j] = computing.get((layer, j), 0) + ((layer, j) not in taken)
    for branch, rows in computing.items():
        assert sum(n for *own, n in seen if tuple(own) == branch) == rows


def test_costs_are_of_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply-adds of the report, with exits: every product that ran, joins, scores, stems and heads."""
    model = served()
    seen = count_rows(monkeypatch, model)
    policy = "reuse:every=2,level=layer+exit:depth=3"  # asks for no score
    _, report = adadiff.sample(model, 3, steps=5, seed=1, policy=policy, execution=INVARIANT)
    backbone, blocks = model.backbone, model.backbone.blocks
    spent = sum(rows * blocks[layer - 1].branches[j].macs(backbone.tokens) for layer, j, rows in seen)
    join = 2 * backbone.dim**2 * backbone.tokens
    joined = int((report.exit_layer >= 4).sum()) * join + int((report.exit_layer >= 5).sum()) * join
    own_heads = int((report.exit_layer[..., 0] < 5).sum()) * model.exits.head_macs(4)
    assert report.macs == spent + joined + own_heads + 15 * sum(backbone.stem_and_head_macs())
    assert report.reuses == 6
    assert "40.0% of the steps reused an earlier one" in str(report)
