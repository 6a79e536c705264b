"""Layer-level reuse against the plain sampler, and against its definition written with the networks' own modules."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.models.dit import DiT
from adadiff.models.uvit import UViT
from benchmarks.baselines import reuse
from benchmarks.baselines.reuse import Reusing
from benchmarks.suites import drawing
from sampler.tiny import DIT, UVIT, inputs, scramble

TIMES = (950.0, 700.0, 450.0, 200.0, 50.0)


def network(kind: str) -> nn.Module:
    made = UViT(UVIT) if kind == "uvit" else DiT(DIT)
    scramble(made, 0.15, seed=1)
    return made.requires_grad_(False).eval()


def trajectory(kind: str, n: int = 3) -> tuple[list[Tensor], Tensor]:
    """Other inputs at every step, so that what is reused is not what would be computed."""
    given = inputs(network(kind), n)
    return [given.x + 0.3 * i * given.x.flip(0) for i in range(len(TIMES))], given.context


def by_definition(backbone: nn.Module, xs: list[Tensor], context: Tensor, every: int) -> list[Tensor]:
    predictions, kept = [], {}
    for i, (x, time) in enumerate(zip(xs, TIMES, strict=True)):
        rows, cond = backbone.embed(x, torch.full((len(x),), time), context)
        outputs = []
        for number, block in enumerate(backbone.blocks):
            if block.skip_from is not None:
                rows = block.skip_linear(torch.cat([rows, outputs[block.skip_from]], -1))
            for which in (0, 1):
                if isinstance(backbone, DiT):
                    shift, scale, gate = (v[:, None] for v in cond.modulation[:, number, which].unbind(1))
                    h = F.layer_norm(rows, rows.shape[-1:], eps=1e-6) * (1 + scale) + shift
                else:
                    h, gate = (block.norm1, block.norm2)[which](rows), 1.0
                if i % every == 0:
                    kept[number, which] = (block.attn, block.mlp)[which](h)
                rows = rows + gate * kept[number, which]
            outputs.append(rows)
        predictions.append(backbone.head(rows[:, backbone.num_prefix_tokens :], cond, torch.arange(len(x))))
    return predictions


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_it_is_its_definition(kind: str, every: int) -> None:
    backbone = network(kind)
    xs, context = trajectory(kind)
    ours = reuse.Reusing(backbone, every)
    for x, time, wanted in zip(xs, TIMES, by_definition(backbone, xs, context, every), strict=True):
        torch.testing.assert_close(ours(x, torch.full((len(x),), time), context), wanted, rtol=1e-4, atol=1e-4)


def test_every_step_whole_is_the_plain_network_bit_for_bit() -> None:
    backbone = network("uvit")
    xs, context = trajectory("uvit")
    ours = reuse.Reusing(backbone, 1)
    for x, time in zip(xs, TIMES, strict=True):
        t = torch.full((len(x),), time)
        assert torch.equal(ours(x, t, context), backbone(x, t, context))


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m"])
def test_samples_do_not_depend_on_their_batch(solver: str) -> None:
    """Three batches of 5: the second must not see what the first one left behind."""
    backbone, schedule = network("uvit"), NoiseSchedule("linear")
    seeds, labels = drawing.seeds_and_labels(0, 11, classes=4)
    together = drawing.lockstep(backbone, schedule, seeds, labels, 5, 5, solver, partial(Reusing, backbone, 2))
    for i in (0, 4, 5, 10):
        own = slice(i, i + 1)
        alone = drawing.lockstep(
            backbone, schedule, seeds[own], labels[own], 5, 1, solver, partial(Reusing, backbone, 2)
        )
        torch.testing.assert_close(together[own], alone, rtol=1e-4, atol=1e-4)
    plain = drawing.lockstep(backbone, schedule, seeds, labels, 5, 5, solver)
    assert float((together - plain).abs().max()) > 0.01  # it does reuse


@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_macs_are_those_of_the_products_that_run(kind: str) -> None:
    """Products are counted by hooks on the modules that make them, and those of attention by their formula."""
    backbone = network(kind)
    xs, context = trajectory(kind, n=1)
    ran: list[int] = []

    def linear(module: nn.Linear, given: tuple[Tensor], out: Tensor) -> None:
        ran.append(module.weight.numel() * given[0].numel() // given[0].shape[-1])

    inside = [module for block in backbone.blocks for module in block.modules() if isinstance(module, nn.Linear)]
    for module in inside:
        module.register_forward_hook(linear)
    for block in backbone.blocks:
        products = 2 * backbone.tokens**2 * backbone.dim
        block.attn.register_forward_hook(lambda *_, products=products: ran.append(products))
    ours = reuse.Reusing(backbone, 2)
    for x, time in zip(xs, TIMES, strict=True):
        ours(x, torch.full((1,), time), context)
    fixed = len(TIMES) * sum(backbone.stem_and_head_macs())
    assert reuse.macs(backbone, len(TIMES), 2) == sum(ran) + fixed
    assert reuse.macs(backbone, len(TIMES), 1) == len(TIMES) * (
        sum(block.macs(backbone.tokens) for block in backbone.blocks) + sum(backbone.stem_and_head_macs())
    )


@pytest.mark.parametrize("every", [0, -1, 2.0, True])
def test_periods_that_are_none(every: object) -> None:
    with pytest.raises(ValueError, match="every 1, 2"):
        reuse.Reusing(network("uvit"), every)
