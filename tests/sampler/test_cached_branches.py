"""Samples that reuse single branches of an earlier step of theirs, against the same done by hand, one lane alone."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adadiff
from adadiff.config import ModelConfig
from adadiff.forward import runner
from adadiff.forward.branch_plan import BranchPlan
from adadiff.forward.decision import decide
from adadiff.forward.forward import directly, run_forward
from adadiff.forward.layers import Asked
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.forward.rest_of_network import reuse_bytes
from adadiff.forward.reuse_lanes import NONE, ReuseLanes
from adadiff.forward.structure import structure_of
from adadiff.model import Model
from adadiff.models.dit import DiTConfig
from adadiff.models.layers import Attention, Mlp
from adadiff.policies.exits import Full, Replay
from adadiff.policies.reuse import Reuse, ReuseContext
from adadiff.policies.spelling import parts_from
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.uem import PAPER
from sampler.branches_by_hand import OneLane, pass_by_hand
from sampler.tiny import SERVED, case, served

# T = 4 tokens, 4 blocks, a variance beside the noise
SMALL_DIT = ModelConfig(
    DiTConfig(image_size=4, channels=1, patch=2, dim=16, depth=4, heads=2, num_classes=4),
    "linear",
    null_label=3,
    exits=PAPER,
)
CONFIGS = {"uvit": SERVED, "dit": SMALL_DIT}
LAYERS = 4  # that both have
POLICIES = [
    "reuse:every=2,level=layer",
    "reuse:every=3,level=unit,unit=mlp,layers=2-3+exit:0.45",
    "reuse:every=2,level=layer,dense_early=2,dense_late=1+exit:0.5",
    "reuse:every=3,level=unit,unit=attention+exit:depth=2.5",
    "reuse:every=2,level=layer+exit:patience=0.5",
]
OTHERS = ["full", "exit:0.5", "cache:threshold=0.4", "reuse:every=2"]
HOST, GROUPS = ExecutionOptions(), ExecutionOptions(group_size=2)
SYNC, LAGGED = ExecutionOptions(count_sync="sync"), ExecutionOptions(count_sync="lagged:2")
SELDOM = ExecutionOptions(count_sync="sync:4")  # so that rows are launched that have left
INVARIANT = ExecutionOptions(batch_invariant=True)
EXECUTIONS = [
    pytest.param(HOST, id="host"),
    pytest.param(GROUPS, id="groups"),
    pytest.param(SYNC, id="sync"),
    pytest.param(LAGGED, id="lagged"),
    pytest.param(SELDOM, id="seldom"),
    pytest.param(INVARIANT, id="lane by lane"),
]


@dataclass
class Watched:
    """Forward passes of a batch. told: by lane, the latest of an entry last: step, steps left, x, t, context, and what
    it got: prediction and exit layer."""

    told: dict[int, list[list[tuple]]] = field(default_factory=dict)

    def __call__(self, model: Model, x: Tensor, t: Tensor, context: Tensor, **given: object) -> ForwardOutput:
        output = run_forward(model, x, t, context, **given)
        reuse: ReuseLanes | None = given.get("reuse")
        for b in range(len(x)):
            if reuse is None or reuse.index[b] == NONE:
                continue
            step, left = int(reuse.step[b]), int(reuse.steps_left[b])
            histories = self.told.setdefault(int(reuse.entry[b]), [])
            if step == 0:
                histories.append([])
            own = [None if v is None else v[b : b + 1].clone() for v in (x, t, context)]
            policy = reuse.policies[int(reuse.index[b])]
            got = output.prediction[b : b + 1].clone(), int(output.exit_layer[b])
            histories[-1].append((policy, step, left, *own, *got))
        return output


def run(kind: str, requests: list[tuple[int, dict]], execution: ExecutionOptions, forward: Callable = run_forward):
    """Requests, each admitted at its tick, drawn in one batch of four slots. Returns their images."""
    model = served(CONFIGS[kind])
    batch, waiting, images, slots = (
        Batch(model, 4, execution=execution, forward=forward),
        list(enumerate(requests)),
        {},
        {},
    )
    tick = 0
    while waiting or batch.count:
        while waiting and batch.free and waiting[0][1][0] <= tick:
            number, (_, request) = waiting.pop(0)
            slots[int(batch.admit(SampleBatch.of(model, 1, **request), np.zeros(1, dtype=np.int64))[0])] = number
        made = batch.tick()
        assert not made.failed
        for slot, image in zip(made.done.tolist(), batch.take(made.done), strict=True):
            images[slots.pop(slot)] = image
        tick += 1
    return [images[i] for i in range(len(requests))], batch


def mixed(others: bool = True) -> list[tuple[int, dict]]:
    """Requests at different steps, guided ones among them, some of which reuse nothing or whole blocks."""
    made = []
    for i, policy in enumerate(POLICIES + (OTHERS if others else [])):
        request = {"seed": 10 + i, "steps": 4 + i % 3, "policy": policy, "class_labels": i % 3}
        if i % 3 == 1:
            request |= {"guidance_scale": 2.0, "tied": i == 1}
        made.append((i // 2, request))
    return made


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes after a branch are one, as on a GPU; here PyTorch makes them."""
    monkeypatch.setattr(runner, "is_fused", lambda x, outputs: True)


def check_by_hand(kind: str, execution: ExecutionOptions) -> None:
    model, watched = served(CONFIGS[kind]), Watched()
    run(kind, mixed(), execution, watched)
    passes, taken_ever, older = 0, 0, 0
    for histories in watched.told.values():
        for history in histories:
            policy = history[0][0]
            if not isinstance(policy, Reuse) or policy.level == "block":
                continue
            lane, said = OneLane(policy, LAYERS + (kind == "uvit")), {}
            for _, step, left, x, t, context, prediction, exit_layer in history:
                taken, kept, full = lane.step(step, left)
                wanted = pass_by_hand(model.backbone, model.exits, x, t, context, taken, said, exit_layer)
                torch.testing.assert_close(prediction, wanted, rtol=1e-4, atol=1e-5)
                older += bool(not full and lane.chosen() - taken)
                lane.ends(step, kept, full, exit_layer)
                passes, taken_ever = passes + 1, taken_ever + len(taken)
    assert passes > 25
    assert taken_ever > 50
    assert older > 1  # steps that reuse, in which branches behind an earlier exit are computed


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_every_lane_has_what_it_has_alone_by_hand(kind: str, execution: ExecutionOptions) -> None:
    check_by_hand(kind, execution)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("execution", [SYNC, SELDOM], ids=["sync", "seldom"])
def test_so_it_has_where_passes_are_fused(kind: str, execution: ExecutionOptions) -> None:
    check_by_hand(kind, execution)


# ---- nothing left out ----


class Fresh(Reuse):
    """Keeps every branch at every step, and takes none."""

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return torch.zeros_like(context.step, dtype=torch.bool)


@pytest.mark.parametrize("policy", [Reuse(1, "layer"), Fresh(2, "layer")], ids=["every step is full", "all is kept"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_plan_that_takes_nothing_is_the_plain_network_bit_for_bit(
    kind: str, execution: ExecutionOptions, policy: Reuse
) -> None:
    model, given = served(CONFIGS[kind]), {"steps": 3, "seed": 4, "class_labels": torch.arange(5) % 3}
    for exits in ("full", "exit:0.5"):
        plain, _ = adadiff.sample(model, 5, policy=exits, execution=execution, **given)
        ours, report = adadiff.sample(model, 5, policy=[policy, exits], execution=execution, **given)
        assert torch.equal(ours, plain)
        assert report.reuses == 0


def test_a_capacity_in_bytes_counts_the_branches_that_are_kept() -> None:
    backbone = served().backbone
    one = 4 * backbone.tokens * backbone.dim
    both, few = (reuse_bytes(Reuse(2, "layer", layers=k), backbone, True, torch.float32) for k in (None, (2, 2)))
    # and what a store has in reserve, an eighth
    assert both - few == pytest.approx(8 * one * 9 / 8, abs=1)
    assert 2 * one <= few < 2.5 * one


# ---- any pattern over the rows ----


@st.composite
def patterns(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[int]]:
    """What 5 lanes do with each branch: compute, compute and keep, or take; and after which layer they exit."""
    actions = st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=2, max_size=2)
    return draw(st.lists(actions, min_size=7, max_size=7)), draw(st.lists(st.integers(1, 7), min_size=5, max_size=5))


@settings(max_examples=12)
@given(patterns(), st.sampled_from(["uvit", "dit"]), st.sampled_from([GROUPS, SYNC, SELDOM, INVARIANT]))
def test_any_pattern_over_the_rows(pattern: tuple[list, list[int]], kind: str, execution: ExecutionOptions) -> None:
    check_pattern(np.array(pattern[0]), np.array(pattern[1]), kind, execution)


@pytest.mark.parametrize("kind", ["uvit", "dit"])
@pytest.mark.parametrize("execution", [SYNC, SELDOM, LAGGED], ids=["sync", "seldom", "lagged"])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_what_lies_behind_an_exit_is_not_kept(kind: str, execution: ExecutionOptions, others: int) -> None:
    """Rows of lanes that have left are computed in vain where the host does not know it yet. others: what two lanes do
    that stay."""
    action = np.full((7, 2, 5), 1)
    action[:, :, 3:] = others
    check_pattern(action, np.array([1, 2, 3, 7, 5]), kind, execution)


def check_pattern(action: np.ndarray, exit_layer: np.ndarray, kind: str, execution: ExecutionOptions) -> None:
    """action: [L, 2, 5], what lanes do with each branch: 0 compute, 1 compute and keep, 2 take."""
    c, B = case(kind, PAPER, torch.float32), 5
    L, backbone, inputs = c.num_layers, c.backbone, c.given[slice(0, B)]
    action, exit_layer = action[:L], np.minimum(exit_layer, L)
    entry, draw = torch.tensor([3, 0, 6, 1, 4]), torch.Generator().manual_seed(0)
    T, D = backbone.tokens, backbone.dim
    rows = {
        (layer, j): torch.randn(7, T, D, generator=draw).index_fill_(0, torch.tensor([2, 5]), torch.nan)
        for layer in range(1, L + 1)
        for j in (0, 1)
    }
    for (layer, j), stored in rows.items():  # what nobody takes is not read
        stored[entry[torch.from_numpy(action[layer - 1, j] != 2)]] = torch.nan
    before = {branch: stored.clone() for branch, stored in rows.items()}
    none = np.zeros(0, dtype=np.int64)
    structure = structure_of(backbone)
    plan = BranchPlan(
        *(action == 2, action == 1, entry.numpy(), lambda layer, j: rows[layer, j], structure.branches.macs),
        *(none, none, none, none, none),
    )
    depth = torch.from_numpy(exit_layer).float()
    decision = decide((Replay(),), None, L, inputs.t, depth, None, inputs.x.device)
    asked = Asked(backbone, c.exits, structure, decision, execution, *inputs.all, None, False, None, plan)
    with torch.no_grad():
        done = directly(asked)
    prediction = done.prediction[:, : backbone.sample_shape[0]]
    assert done.placement.exit_layer.tolist() == exit_layer.tolist()
    for b in range(B):
        lane, own = slice(b, b + 1), slice(int(entry[b]), int(entry[b]) + 1)
        taken = {(layer, j) for layer, j in rows if action[layer - 1, j, b] == 2}
        said = {branch: before[branch][own] for branch in taken}
        wanted = pass_by_hand(backbone, c.exits, *inputs[lane].all, taken, said, int(exit_layer[b]))
        torch.testing.assert_close(prediction[lane], wanted, rtol=1e-4, atol=1e-4)
        for (layer, j), stored in rows.items():
            if action[layer - 1, j, b] == 1 and layer <= exit_layer[b]:
                torch.testing.assert_close(stored[own], said[layer, j], rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(stored[own].nan_to_num(7.0), before[layer, j][own].nan_to_num(7.0))
    for branch, stored in rows.items():
        assert stored[[2, 5]].isnan().all(), branch


# ---- what is computed ----


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


# ---- alone and in company ----


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sample_has_the_bits_that_it_has_alone(kind: str) -> None:
    requests = mixed()
    together, _ = run(kind, requests, INVARIANT)
    for image, (_, request) in zip(together, requests, strict=True):
        alone, _ = adadiff.sample(served(CONFIGS[kind]), 1, execution=INVARIANT, **request)
        assert torch.equal(image, alone[0])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_host_may_learn_of_exits_late(kind: str) -> None:
    exact, _ = run(kind, mixed(), SYNC)
    for execution in (LAGGED, SELDOM):
        late, _ = run(kind, mixed(), execution)
        for one, other in zip(exact, late, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # products over other numbers of rows


@pytest.mark.parametrize("fails", [2, 4])
def test_a_tick_that_is_made_again_finds_everything_as_it_was(fails: int) -> None:
    """It fails once its pass has written all rows; then it is made in halves."""
    calls = 0

    def forward(*asked: object, **given: object) -> ForwardOutput:
        nonlocal calls
        calls += 1
        output = run_forward(*asked, **given)
        if calls == fails:
            raise torch.OutOfMemoryError("none is left")
        return output

    usual, _ = run("uvit", mixed(), INVARIANT)
    again, batch = run("uvit", mixed(), INVARIANT, forward)
    assert batch.totals.halvings == 1
    for one, other in zip(usual, again, strict=True):
        assert torch.equal(one, other)


def test_nan_of_one_sample_does_not_reach_another() -> None:
    def forward(model: Model, x: Tensor, *asked: object, **given: object) -> ForwardOutput:
        poison = given["reuse"].entry == 1
        return run_forward(model, torch.where(poison[:, None, None, None], torch.nan, x), *asked, **given)

    requests = [(0, {"seed": i, "steps": 4, "policy": POLICIES[0]}) for i in range(3)]
    clean, _ = run("uvit", requests, INVARIANT)
    hurt, _ = run("uvit", requests, INVARIANT, forward)
    assert [bool(image.isnan().any()) for image in hurt] == [False, True, False]
    assert torch.equal(hurt[0], clean[0])
    assert torch.equal(hurt[2], clean[2])


def test_entries_are_free_again_and_the_next_sample_takes_nothing_of_them() -> None:
    requests = [(i, {"seed": i, "steps": 2, "policy": POLICIES[0]}) for i in range(9)]
    images, batch = run("dit", requests, INVARIANT)
    assert batch._reuse.store.taken == 0
    alone, _ = adadiff.sample(served(SMALL_DIT), 1, execution=INVARIANT, **requests[8][1])
    assert torch.equal(images[8], alone[0])


# ---- what is asked for ----


def test_a_plan_that_never_acts_is_allowed_and_told(caplog: pytest.LogCaptureFixture) -> None:
    _, report = adadiff.sample(served(), 2, steps=1, seed=0, policy="reuse:every=7,level=layer")
    assert report.never_acted
    assert "never let a sample exit or reuse" in str(report)
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
        ("reuse:every=2,level=layer,layers=0-3", r"layers must be the first and the last .* got \(0, 3\)"),
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
    with pytest.raises(ValueError, match="block 2 of this network shows no branches"):
        adadiff.sample(model, 1, steps=1, policy="reuse:every=2,level=layer")
