"""DiT against the paper's formulas, written again from the description alone, and against the published tables."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adadiff import forward, sample
from adadiff.checkpoint import load_strictly
from adadiff.config import PRESETS, ModelConfig
from adadiff.diffusion.noise import initial_noise
from adadiff.model import Model, build
from adadiff.models import layers
from adadiff.models.dit import DiT, DiTConfig, position_embedding
from adadiff.policies.exits import Replay
from adadiff.uem import PAPER
from numerics import assert_as_accurate
from sampler.tiny import BATCH, DIT, case, inputs, scramble

VARIANTS = {
    "as-released": DIT,
    "noise-only": dataclasses.replace(DIT, learned_variance=False),
    "patch-3": dataclasses.replace(DIT, patch=3, depth=2, channels=1),
    "patch-1": dataclasses.replace(DIT, image_size=4, patch=1, depth=1, heads=1, mlp_ratio=3),
    "one-patch": dataclasses.replace(DIT, image_size=4, patch=4, depth=1),
    "diffusers": dataclasses.replace(DIT, frequency_shift=1, mlp_norm_eps=1e-2),
}


def published(state: dict[str, Tensor], config: DiTConfig, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The forward pass from a state dict with the released names."""

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(h: Tensor, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * (1 + scale) + shift

    def silu(h: Tensor) -> Tensor:
        return h / (1 + torch.exp(-h))

    def gelu(h: Tensor) -> Tensor:
        return h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    def attention(h: Tensor, name: str) -> Tensor:
        B, T, D = h.shape
        heads = config.heads
        q, k, v = (part.view(B, T, heads, D // heads).transpose(1, 2) for part in linear(h, f"{name}.qkv").split(D, -1))
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(D // heads), dim=-1)
        return linear((weights @ v).transpose(1, 2).reshape(B, T, D), f"{name}.proj")

    p, B, (H, W) = config.patch, len(x), x.shape[2:]
    frequencies = [10000 ** (-i / (128 - config.frequency_shift)) for i in range(128)]
    sinusoid = torch.stack([f(t * w) for f in (torch.cos, torch.sin) for w in frequencies], 1)
    time = linear(silu(linear(sinusoid, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = silu(time + state["y_embedder.embedding_table.weight"][labels])
    kernel = state["x_embedder.proj.weight"].flatten(1)
    patches = [x[:, :, i : i + p, j : j + p].reshape(B, -1) @ kernel.T for i in range(0, H, p) for j in range(0, W, p)]
    h = torch.stack(patches, 1) + state["x_embedder.proj.bias"] + state["pos_embed"]
    for i in range(config.depth):
        values = linear(c, f"blocks.{i}.adaLN_modulation.1")[:, None].chunk(6, -1)
        h = h + values[2] * attention(norm(h, 1e-6, values[0], values[1]), f"blocks.{i}.attn")
        m = linear(norm(h, config.mlp_norm_eps, values[3], values[4]), f"blocks.{i}.mlp.fc1")
        h = h + values[5] * linear(gelu(m), f"blocks.{i}.mlp.fc2")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    values = linear(norm(h, 1e-6, shift, scale), "final_layer.linear")
    outputs = values.shape[-1] // p**2
    image = torch.zeros(B, outputs, H, W, dtype=x.dtype)
    for index in range(values.shape[1]):
        i, j = p * (index // (W // p)), p * (index % (W // p))
        image[:, :, i : i + p, j : j + p] = values[:, index].view(B, p, p, outputs).permute(0, 3, 1, 2)
    return image


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_is_the_published_one(name: str) -> None:
    config = VARIANTS[name]
    network = DiT(config).double()
    scramble(network, 0.2)
    x, labels = torch.randn(3, *network.sample_shape, dtype=torch.float64), torch.tensor([0, 4, 2])
    # a sinusoid in float32, as published, of whose angle up to 999 one rounding is 6e-5
    for t, tolerance in (([0.3, 0.85, 1.0], 1e-6), ([999.0, 187.0, 20.98], 2e-3)):
        t = torch.tensor(t, dtype=torch.float64)
        want = published(network.state_dict(), config, x, t, labels)
        torch.testing.assert_close(network(x, t, labels), want, rtol=tolerance, atol=tolerance)
        assert want.std() > 0.1  # so that the tolerance means something
        assert want.shape[1] == config.channels * (2 if config.learned_variance else 1)


@pytest.mark.parametrize(("dim", "side"), [(4, 1), (8, 3), (1152, 16)])
def test_position_embedding_is_the_published_one(dim: int, side: int) -> None:
    """By the formula, one number at a time: column before row, sines before cosines."""
    found = position_embedding(dim, side)
    assert found.dtype == torch.float32
    quarter = dim // 4
    for patch in {0, 1 % side, side, side * side - 1, 7 % (side * side)}:
        if patch >= side * side:
            continue
        row, column = divmod(patch, side)
        angles = [[at / 10000 ** (i / quarter) for i in range(quarter)] for at in (column, row)]
        want = [f(angle) for line in angles for f in (math.sin, math.cos) for angle in line]
        torch.testing.assert_close(found[patch], torch.tensor(want), rtol=0, atol=1e-7)


# The paper's table 1 at 256 pixels: million parameters (those of the fixed position embedding counted), 10^9
# multiply-adds of patch 2.
PUBLISHED = {
    "s": (384, 12, 6, {2: 32.96, 4: 32.95, 8: 33.15}, 6.05),
    "b": (768, 12, 12, {2: 130.51, 4: 130.48, 8: 130.88}, 22.99),
    "l": (1024, 24, 16, {2: 458.10, 4: 458.05, 8: 458.59}, 80.7),
    "xl": (1152, 28, 16, {2: 675.13, 4: 675.07, 8: 675.68}, 118.6),
}


def published_shapes(D: int, depth: int, patch: int, tokens: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "pos_embed": (1, tokens, D),
        "x_embedder.proj.weight": (D, 4, patch, patch),
        "x_embedder.proj.bias": (D,),
        "y_embedder.embedding_table.weight": (1001, D),
    }
    linear = {
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (patch * patch * 8, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    for i in range(depth):
        linear |= {
            f"blocks.{i}.attn.qkv": (3 * D, D),
            f"blocks.{i}.attn.proj": (D, D),
            f"blocks.{i}.mlp.fc1": (4 * D, D),
            f"blocks.{i}.mlp.fc2": (D, 4 * D),
            f"blocks.{i}.adaLN_modulation.1": (6 * D, D),
        }
    for name, size in linear.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return shapes


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("dit_")])
def test_preset_has_the_published_keys_and_sizes(name: str) -> None:
    _, size, patch, pixels = name.split("_")
    D, depth, heads, millions, macs = PUBLISHED[size]
    config = PRESETS[name]
    with torch.device("meta"):
        network = DiT(config.network)
    tokens = (int(pixels) // 8 // int(patch)) ** 2
    wanted = published_shapes(D, depth, int(patch), tokens)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == wanted
    assert (network.tokens, config.network.heads, config.schedule, config.null_label) == (tokens, heads, "linear", 1000)
    counted = sum(block.macs(tokens) for block in network.blocks) + sum(network.stem_and_head_macs())
    if pixels == "256":
        parameters = sum(parameter.numel() for parameter in network.parameters())
        assert round(parameters / 1e6, 2) == millions[int(patch)]
        assert parameters == sum(math.prod(shape) for shape in wanted.values())
        if patch == "2":
            assert counted == pytest.approx(macs * 1e9, rel=2e-3)
    else:
        assert counted == pytest.approx(524.5e9, rel=2e-3)


def test_there_are_thirteen_presets() -> None:
    assert sum(name.startswith("dit_") for name in PRESETS) == 13
    assert isinstance(build("dit_s_8_256", exits=PAPER).backbone, DiT)


def test_a_fresh_network_is_as_published() -> None:
    """adaLN-Zero: every block begins as the identity, the prediction as zero; positions are fixed."""
    torch.manual_seed(0)
    network = DiT(DIT)
    given = inputs(network)
    assert not network(*given.all).any()
    rows, cond = network.embed(*given.all)
    assert torch.equal(network.blocks[2](rows, cond), rows)
    assert not network.pos_embed.requires_grad
    assert torch.equal(network.pos_embed[0], position_embedding(36, 3))
    assert float(network.t_embedder.mlp[2].weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_released_state_dicts_load_strictly() -> None:
    network = DiT(DIT)
    scramble(network, 0.2)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    assert state.keys() == published_shapes(36, 5, 2, 9).keys()
    for other in (DiT(DIT), copy.deepcopy(network)):
        other.load_state_dict({key: value * 0 for key, value in state.items()})
        other.load_state_dict(state)
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
        assert torch.equal(other.modulation.weight[3], state["blocks.3.adaLN_modulation.1.weight"])
        given = inputs(network)
        assert torch.equal(other(*given.all), network(*given.all))
    lacking = {key: value for key, value in state.items() if key != "blocks.3.adaLN_modulation.1.bias"}
    with pytest.raises(RuntimeError, match=r"modulation\.bias"):
        DiT(DIT).load_state_dict(lacking)
    with pytest.raises(ValueError, match=r"^it does not fit this model: missing blocks\.3\.adaLN_modulation\.1\.bias$"):
        load_strictly(network, lacking, "it")


def test_macs_are_those_of_the_products_that_run() -> None:
    """Every product of one forward pass counted as it is called, attention by its definition."""
    network = DiT(dataclasses.replace(DIT, mlp_ratio=3))
    counted = 0

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        counted += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(count)
    network(*inputs(network, 1).all)
    counted += network.modulation.weight.numel()
    counted += len(network.blocks) * 2 * network.tokens**2 * DIT.dim  # weights, then weighted values
    assert sum(block.macs(network.tokens) for block in network.blocks) + sum(network.stem_and_head_macs()) == counted


def test_modulation_is_one_product_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing per sample is computed again in a block."""
    c = case("dit", PAPER, torch.float32)
    sizes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda h, *w: sizes.append((h.shape[0], w[0].shape[0])) or linear(h, *w))
    forward(c, *c.given.all, policy="full")
    assert sizes.count((BATCH, 5 * 6 * 36)) == 1
    assert not any(outputs == 6 * 36 for _, outputs in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_variance_goes_with_the_noise(dtype: torch.dtype) -> None:
    """Each lane's own, from the head it exited by."""
    c, exact = case("dit", PAPER, dtype), case("dit", PAPER, dtype, exact=True)
    exit_layer = torch.arange(BATCH) % c.num_layers + 1
    result = forward(c, *c.given.all, policy=Replay(), threshold=exit_layer.float())

    def plain(of) -> Tensor:
        rows, cond = of.backbone.embed(*of.given.all)
        wanted = torch.empty(BATCH, 6, 6, 6, dtype=of.backbone.pos_embed.dtype)
        for layer, block in enumerate(of.backbone.blocks, start=1):
            rows, here = block(rows, cond), exit_layer == layer
            head = of.exits.heads[layer - 1] if layer < c.num_layers else of.backbone.head
            wanted[here] = head(rows, cond, torch.arange(BATCH))[here]
        return wanted

    assert result.prediction.shape == result.variance.shape == (BATCH, 3, 6, 6)
    assert_as_accurate(torch.cat([result.prediction, result.variance], 1), plain(c), plain(exact))
    nothing = forward(c, *c.given[slice(0, 0)].all, policy="full")
    assert nothing.prediction.shape == nothing.variance.shape == (0, 3, 6, 6)
    u_vit = case("uvit", PAPER, dtype)
    assert forward(u_vit, *u_vit.given.all, policy="full").variance is None


def test_samples_are_those_of_a_plain_loop() -> None:
    """DDIM over three steps of the linear schedule, guided, by the formula."""
    model = Model(ModelConfig(DIT, "linear", null_label=4)).requires_grad_(False).eval()
    scramble(model.backbone, 0.15)
    images, _ = sample(model, 2, steps=3, class_labels=[1, 3], guidance_scale=2.5, solver="ddim")
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x = initial_noise(torch.arange(2), (3, 6, 6)).double()
    times = [999, 666, 332]
    for t, after in zip(times, [*times[1:], None], strict=True):
        at, labels, null = torch.full((2,), float(t)), torch.tensor([1, 3]), torch.tensor([4, 4])
        cond, uncond = (model.backbone(x.float(), at, y)[:, :3].double() for y in (labels, null))
        eps = uncond + 2.5 * (cond - uncond)
        a, b = alpha_bar[t], alpha_bar[after] if after is not None else torch.tensor(1.0).double()
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    torch.testing.assert_close(images.double(), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 4}, "multiple of patch"),
        ({"heads": 5}, "multiple of heads 5 and of 4"),
        ({"dim": 18, "heads": 3}, "of heads 3 and of 4"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"num_classes": 0}, "num_classes must be a positive integer"),
        ({"learned_variance": 1}, "learned_variance"),
        ({"frequency_shift": 2}, "frequency_shift must be 0"),
        ({"mlp_norm_eps": 0.0}, "mlp_norm_eps"),
        ({"mlp_norm_eps": 1}, "mlp_norm_eps"),
    ],
)
def test_impossible_configurations_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DIT, **change)


X, TIME, LABELS = torch.zeros(2, 3, 6, 6), torch.zeros(2), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X[:, :, :4], TIME, LABELS), r"x must be \[B, 3, 6, 6\]"),
        ((X, TIME[:1], LABELS), "one timestep per lane"),
        ((X, TIME, None), "needs labels"),
        ((X, TIME, TIME), "int64"),
        ((X, TIME, LABELS + 5), r"0\.\.4"),
        ((X, TIME, LABELS - 1), r"0\.\.4"),
    ],
)
def test_bad_input_is_named(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(DIT)(*given)


@torch.no_grad()
def test_a_gelu_that_its_product_applies_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuBLAS does it on a GPU, whose operator stands in here: the exact one of a CPU would show."""
    c, calls = case("dit", PAPER, torch.float32), []

    def applied(bias: Tensor, h: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
        calls.append(h.shape)
        return F.gelu(torch.addmm(bias, h, weight), approximate="tanh" if use_gelu else "none")

    want = c.backbone(*c.given.all)
    monkeypatch.setattr(torch, "_addmm_activation", applied)
    assert torch.equal(c.backbone(*c.given.all), want)
    assert not calls  # a CPU's operator has another GELU
    monkeypatch.setattr(layers, "has_epilogue", lambda linear, h: True)
    torch.testing.assert_close(c.backbone(*c.given.all), want, rtol=1e-5, atol=1e-5)
    assert calls == [(BATCH * 9, 36)] * c.num_layers
    exact = case("uvit", PAPER, torch.float32)
    exact.backbone(*exact.given.all)
    assert len(calls) == c.num_layers  # U-ViT's GELU is the exact one, which no product has
