"""Other packages and published methods around one of our networks: each computes what its authors say, and the suite's
rows, table and picture show it."""

import itertools
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("cache_dit")

from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.models.dit import DiT
from adadiff.models.interface import Backbone
from adadiff.models.uvit import UViT
from benchmarks import rows as row_files
from benchmarks.baselines import contenders, others, routers
from benchmarks.baselines.contenders import Settings
from benchmarks.report import head_to_head_section, head_to_head_tables
from benchmarks.suites import drawing, head_to_head
from sampler.tiny import DIT, UVIT, scramble

STEPS, B = 7, 3  # an odd number: the last step stands alone


@cache
def network(kind: str) -> nn.Module:
    made = UViT(UVIT) if kind == "uvit" else DiT(replace(DIT, learned_variance=False))
    scramble(made, 0.15, seed=1)
    return made.requires_grad_(False).eval()


def draw(backbone: Backbone, start: contenders.Start | None = None, seeds: Tensor | None = None) -> Tensor:
    seeds = torch.arange(B) if seeds is None else seeds
    return drawing.lockstep(backbone, NoiseSchedule("linear"), seeds, seeds % 3, STEPS, len(seeds), "ddim", start)


class Ran:
    """Counts blocks that run."""

    def __init__(self, backbone: Backbone):
        self.calls = [0] * len(backbone.blocks)
        self._handles = [
            block.register_forward_hook(partial(self._count, index)) for index, block in enumerate(backbone.blocks)
        ]

    def _count(self, index: int, *_: object) -> None:
        self.calls[index] += 1

    def __enter__(self) -> list[int]:
        return self.calls

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


KINDS = pytest.mark.parametrize("kind", ["uvit", "dit"])


@KINDS
def test_what_never_leaves_anything_out_draws_what_the_network_draws(kind: str) -> None:
    backbone = network(kind)
    plain, branches = draw(backbone), sum(len(block.branches) for block in backbone.blocks)
    assert torch.equal(draw(backbone, others.first_block_cache(-1.0, backbone)), plain)
    assert torch.equal(draw(backbone, others.mag_cache(0.0, [2.0] * STEPS, backbone)), plain)
    assert torch.equal(draw(backbone, others.CacheDiT(1e-9, STEPS, False, backbone)), plain)
    every = torch.ones(STEPS, branches, dtype=torch.bool)
    torch.testing.assert_close(draw(backbone, partial(routers.Caching, backbone, every)), plain, rtol=0, atol=1e-4)
    always = _routers(backbone, 9.0)
    assert torch.equal(draw(backbone, partial(routers.Routing, backbone, always)), plain)


@KINDS
def test_what_always_reuses_runs_the_blocks_that_it_says(kind: str) -> None:
    backbone = network(kind)
    rest = len(backbone.blocks) - 1
    with Ran(backbone) as calls:
        draw(backbone, others.first_block_cache(1e9, backbone))
    assert calls == [STEPS, *[1] * rest]
    with Ran(backbone) as calls:
        draw(backbone, others.CacheDiT(1e9, STEPS, False, backbone))
    assert calls == [STEPS, *[others.WARM_UP] * rest]
    with Ran(backbone) as calls:
        draw(backbone, others.mag_cache(1e9, [1.0] * STEPS, backbone))
    assert calls[0] == calls[-1] < STEPS
    with Ran(backbone) as calls:
        draw(backbone, others.taylor_seer(2, backbone))
    assert calls == [5] * (rest + 1), "steps 0, 1, 2, then 4 and 6"
    with Ran(backbone) as calls:
        draw(backbone, partial(routers.Routing, backbone, _routers(backbone, -9.0)))
    assert calls == [0] * (rest + 1)


@pytest.mark.parametrize("make", ["first block", "DBCache", "TaylorSeer"])
def test_a_second_batch_starts_anew(make: str) -> None:
    backbone = network("uvit")
    start = {
        "first block": partial(others.first_block_cache, 0.2),
        "DBCache": partial(others.CacheDiT, 0.2, STEPS, True),
        "TaylorSeer": partial(others.taylor_seer, 3),
    }[make](backbone)
    first = draw(backbone, start)
    draw(backbone, start, torch.arange(10, 15))
    assert torch.equal(draw(backbone, start), first)


def test_the_first_block_cache_decides_for_the_batch() -> None:
    """By the mean over the batch of the change of the first block's residual, as diffusers defines it."""
    backbone = network("dit")
    seen: list[Tensor] = []

    def noting(called: others.Network) -> others.Network:
        def network_of_step(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            rows, cond = backbone.embed(x, t, context)
            seen.append(backbone.blocks[0](rows, cond) - rows)
            return called(x, t, context)

        return network_of_step

    draw(backbone, lambda: noting(backbone))
    threshold = float(torch.stack([_change(a, b) for a, b in itertools.pairwise(seen)]).median())
    seen.clear()
    start = others.first_block_cache(threshold, backbone)
    with Ran(backbone) as calls:
        draw(backbone, lambda: noting(start()))
    full, last = 1, seen[0]
    for residual in seen[1:]:
        if _change(last, residual) > threshold:
            full, last = full + 1, residual
    assert 1 < full < STEPS, "it reuses on some steps"
    assert calls[-1] == full


def _change(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).abs().mean() / before.abs().mean()


def _routers(backbone: Backbone, logit: float) -> nn.ModuleList:
    made = nn.ModuleList(routers.Router(backbone.dim, backbone.time_dim) for _ in backbone.blocks)
    for router in made:
        nn.init.zeros_(router.last.weight)
        nn.init.constant_(router.last.bias, logit)
    return made.requires_grad_(False)


@KINDS
def test_caching_takes_the_branch_of_the_step_before(kind: str) -> None:
    """The table by hand: on step 1 the second branch of block 2 is that of step 0."""
    backbone = network(kind)
    runs = torch.ones(2, 2 * len(backbone.blocks), dtype=torch.bool)
    runs[1, 3] = False
    x, t, labels = torch.randn(B, *backbone.sample_shape), torch.full((B,), 500.0), torch.arange(B) % 3
    kept: list[Tensor] = []
    routers.by_branch(backbone, x, t, labels, lambda _, compute: kept.append(compute()) or kept[-1])
    outputs = lambda number, compute: kept[3] if number == 3 else compute()  # noqa: E731
    wanted = routers.by_branch(backbone, x + 0.3, t - 90, labels, outputs)
    found = routers.Caching(backbone, runs)
    found(x, t, labels)
    assert torch.equal(found(x + 0.3, t - 90, labels), wanted)
    assert not torch.allclose(wanted, backbone(x + 0.3, t - 90, labels), atol=1e-3)


def trajectories(backbone: Backbone, n: int = 8) -> routers.Trajectories:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(STEPS, n, *backbone.sample_shape, generator=generator)
    return routers.Trajectories(x, torch.linspace(950, 20, STEPS), torch.arange(n) % 3)


def test_a_larger_weight_caches_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "UPDATES", 120)
    monkeypatch.setitem(routers.LR, "l2c", 0.2)
    backbone = network("uvit")
    nothing, all_ = (routers.learn_to_cache(backbone, trajectories(backbone), weight) for weight in (0.0, 10.0))
    assert nothing[::2].all()
    assert all_[::2].all(), "every other step runs in full"
    assert nothing[1::2].double().mean() > 0.6
    assert not all_[1::2].any()


def test_routers_learn_the_share_they_aim_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "UPDATES", 150)
    monkeypatch.setitem(routers.LR, "elastic", 1e-2)
    backbone, given = network("dit"), trajectories(network("dit"))
    means = []
    for aim in (0.2, 0.8):
        learnt = routers.learn_to_route(backbone, given, aim)
        rows, cond = backbone.embed(*given.take(2, torch.arange(8)))
        means.append(torch.stack([router(rows, cond.time).sigmoid().mean() for router in learnt]).mean())
    assert means[0] + 0.15 < means[1]


TINY = head_to_head.Sizes(
    Settings(4, (2,), (0.7,), (0.3,), (2,), (0.3,), (1e-3,), (0.5,), trained_on=64),
    samples=8, alone=4, reference_steps=6, repeats=3, limit=1.0, turn=0.0,
)  # fmt: skip


@pytest.mark.slow
def test_the_suite_writes_rows_that_tables_and_picture_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(routers, "UPDATES", 2)
    monkeypatch.setattr(head_to_head, "compiles", lambda *calls: False)  # takes minutes
    rows = row_files.Rows(tmp_path)
    head_to_head.HeadToHead(rows, "digits", "digits", TINY).run()
    qualities = [row for row in rows.rows if row["kind"] == "quality"]
    timed = [row for row in rows.rows if row["kind"] == "speed"]
    assert len({row["variant"] for row in qualities}) == 16
    assert len(timed) == 2 * len(qualities)
    by_sample = [row for row in qualities if row["decides"] != contenders.BATCH]
    assert all(row["changed"] == 0 for row in by_sample), "only a decision for the batch changes batch-mates"
    written = len(rows.rows)
    head_to_head.HeadToHead(rows, "digits", "digits", TINY).run()
    assert len(rows.rows) == written, "nothing is measured twice"

    (table,) = head_to_head_tables.tables(rows.rows)
    assert [line[0] for line in table.body] == [row["variant"] for row in qualities]
    assert "cache-dit" in table.title
    panels = head_to_head_tables.picture(rows.rows, "digits").axes
    assert [panel.get_title() for panel in panels] == ["batch 1", "batch 8"]
    section = head_to_head_section.section(rows.rows)
    assert len(section.lines) == 17, "a header and a line for each method"
