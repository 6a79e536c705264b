"""Our networks compared with the authors' own modules, at full size, with the same random weights.

python -m benchmarks.studies.parity --reference CLONE [--reference CLONE ...] [--only NAME,NAME] [--out FILE]
python -m benchmarks.studies.parity --diffusers

--diffusers compares with the modules of diffusers, for networks that are published there. CLONE is a checkout of
baofff/U-ViT, facebookresearch/DiT or willisma/SiT (need timm), Tangshengku/AdaDiff or razvanmatisan/duodiff (need
einops), recognised by its files. Its module is imported, filled with random weights and saved as its authors save it;
`adadiff.convert` reads the file, and outputs are compared on the same inputs: in float32 to 1e-5 of the largest value,
in bfloat16 by the rule of tests/numerics.py (error at most twice theirs plus four roundings). Writes a table, keeping
the rows of models that were not run. The exit code is 1 if any comparison fails.
"""

import argparse
import gc
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import adadiff
from adadiff import forward
from adadiff.config import PRESETS, ModelConfig
from adadiff.conversion.convert import convert
from adadiff.models.mmdit import MMDiTConfig
from adadiff.models.pixart import PixArtConfig
from adadiff.policies.exits import Replay, Threshold

TABLE = Path(__file__).parents[1] / "results" / "parity.md"
TIMES = torch.tensor([999.0, 20.5])  # one of them fractional, as in U-ViT's solvers
TOLERANCE = 1e-5
HEAD = """# The authors' modules and ours

The authors' module, with random weights at full size, is saved, and read by `adadiff convert`; outputs of two lanes are
compared. Written by `python -m benchmarks.studies.parity --reference CLONE ...`. Errors: the largest difference,
divided by the authors' largest value.

In float32, with a tolerance of 1e-5: *forward*, the plain network; *engine*, `adadiff.forward` without exits; *layers*,
the prediction of each exit; *u*, the uncertainty of each layer. *bfloat16*: one lane of our engine; *theirs*: the
authors' module in bfloat16; both against the authors' module in float32 with the same bfloat16 weights. The tolerance
is twice their error plus four roundings.

| model | read from | parameters | forward | engine | layers | u | bfloat16 | theirs | result |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""


@dataclass(frozen=True)
class Outputs:
    """noise: [B, C or 2 C, H, W]. layers, u: predictions [L - 1, B, C, H, W] and uncertainties [L - 1, B] of layers
    1..L-1, None without exits."""

    noise: Tensor
    layers: Tensor | None = None
    u: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """make: builds the authors' module. run: outputs of the module for x, t, context. save: writes its checkpoint, in
    the authors' format, to a folder, and returns the path for `convert`."""

    preset: str
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Outputs]
    save: Callable[[nn.Module, Path], Path]


def saved(wrap: Callable[[dict[str, Tensor]], Any] = dict) -> Callable[[nn.Module, Path], Path]:
    def save(module: nn.Module, folder: Path) -> Path:
        torch.save(wrap(module.state_dict()), folder / "theirs.pth")
        return folder / "theirs.pth"

    return save


def diffusers_cases() -> Iterator[Case]:
    """Cases for the presets of families that diffusers implements."""
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

    def run(module: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Outputs:
        mask = (context != 0).any(2).to(x.dtype)
        given = {"encoder_attention_mask": mask, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return Outputs(module(x, context, t, **given).sample)

    def run_sd3(module: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Outputs:
        return Outputs(module(x, context[:, 1:], context[:, 0, : module.config.pooled_projection_dim], t).sample)

    def save(module: nn.Module, folder: Path) -> Path:
        module.save_pretrained(folder / "theirs")
        return folder / "theirs"

    for name, config in PRESETS.items():
        if isinstance(network := config.network, PixArtConfig):
            settings = {
                "num_attention_heads": network.heads, "attention_head_dim": network.dim // network.heads,
                "in_channels": network.channels, "out_channels": 2 * network.channels, "num_layers": network.depth,
                "cross_attention_dim": network.dim, "sample_size": network.image_size, "patch_size": network.patch,
                "caption_channels": network.context_dim, "interpolation_scale": network.interpolation,
            }  # fmt: skip
            yield Case(name, lambda settings=settings: PixArtTransformer2DModel(**settings), run, save)
        elif isinstance(network, MMDiTConfig):
            settings = {
                "num_attention_heads": network.heads, "attention_head_dim": network.dim // network.heads,
                "in_channels": network.channels, "out_channels": network.channels, "num_layers": network.depth,
                "sample_size": network.position_base * network.patch, "patch_size": network.patch,
                "joint_attention_dim": network.context_dim, "caption_projection_dim": network.dim,
                "pooled_projection_dim": network.pooled_dim, "pos_embed_max_size": network.position_side,
            }  # fmt: skip
            yield Case(name, lambda settings=settings: SD3Transformer2DModel(**settings), run_sd3, save)


class Settings(dict):
    """Replaces ml_collections.ConfigDict, which U-ViT's configurations use."""

    def __init__(self, initial_dictionary: dict[str, Any] | None = None):
        super().__init__(initial_dictionary or {})

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


@contextmanager
def importing(clone: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports modules of a clone and unloads them afterwards, since clones have modules of the same name."""
    loaded = {path.stem for path in clone.iterdir()}
    stubs = {"ml_collections": {"ConfigDict": Settings}, "torchvision.utils": {"save_image": None}}
    for name, values in stubs.items():
        if importlib.util.find_spec(name.split(".")[0]) is None:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__dict__.update(values)
            loaded.add(name)
    sys.path[:0] = [str(clone)]
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(clone))
        for name in [name for name in sys.modules if name in loaded or name.split(".")[0] in loaded]:
            del sys.modules[name]


def cases(clone: Path) -> Iterator[Case]:
    """Every published model whose module the clone has. Raises ValueError for any other folder."""
    clone = clone.resolve()
    uvit, dit, duodiff = clone / "libs" / "uvit.py", clone / "models.py", clone / "models" / "early_exit.py"
    with importing(clone) as load:
        if uvit.is_file():
            yield from _uvit_cases(uvit, load)
        elif dit.is_file():
            sit = "SiT_models" in dit.read_text()
            yield from (_sit_cases if sit else _dit_cases)(dit, load)
        elif duodiff.is_file():
            yield from _duodiff_cases(duodiff, load)
        else:
            raise ValueError(f"{clone} is no checkout of U-ViT, DiT, SiT, AdaDiff or duodiff")


def _uvit_cases(file: Path, load: Callable[[str], ModuleType]) -> Iterator[Case]:
    exits = "lte_classifer" in file.read_text()
    for name in sorted(path.stem for path in (file.parents[1] / "configs").glob("*_uvit_*.py")):
        settings = dict(load(f"configs.{name}").get_config().nnet)
        module = load("libs.uvit_t2i" if settings.pop("name") == "uvit_t2i" else "libs.uvit")
        deep = [("_deep", {**settings, "depth": 16})] if name == "mscoco_uvit_small" and not exits else []
        for suffix, values in [("", settings), *deep]:
            run = _run_official if exits else lambda module, *given: Outputs(module(*given))
            yield Case(name + suffix, lambda module=module, values=values: module.UViT(**values), run, saved())


def _run_official(module: nn.Module, *given: Tensor | None) -> Outputs:
    noise, layers, certainty = module(*given, is_train=True)
    u = 1 - torch.stack([c.flatten(1).mean(1) for c in certainty])
    return Outputs(noise, torch.stack(layers[:-1]), u[:-1])


def _preset(name: str, pixels: int) -> str:
    """name: as the authors write it, "DiT-XL/2"."""
    return name.lower().replace("-", "_").replace("/", "_") + f"_{pixels}"


def _dit_cases(file: Path, load: Callable[[str], ModuleType]) -> Iterator[Case]:
    for name, make in load("models").DiT_models.items():
        for pixels in (256, 512) if name == "DiT-XL/2" else (256,):
            preset = _preset(name, pixels)
            made = lambda make=make, pixels=pixels: make(input_size=pixels // 8)  # noqa: E731
            run = lambda module, *given: Outputs(module(*given))  # noqa: E731
            yield Case(preset, made, run, saved(lambda state: {"ema": state}))


def _sit_cases(file: Path, load: Callable[[str], ModuleType]) -> Iterator[Case]:
    """Their time goes from 0, noise, to 1, data, and their velocity has the other sign."""

    def run(module: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Outputs:
        return Outputs(-module(x, (1 - t / 1000).to(x.dtype), labels))

    for name, make in load("models").SiT_models.items():
        yield Case(_preset(name, 256), lambda make=make: make(input_size=32), run, saved(lambda state: {"ema": state}))


def _duodiff_cases(file: Path, load: Callable[[str], ModuleType]) -> Iterator[Case]:
    yaml = importlib.import_module("yaml")
    early_exit, uvit = load("models.early_exit"), load("models.uvit")
    names = {"celeba": "celeba64"}

    def run(module: nn.Module, x: Tensor, t: Tensor, context: Tensor | None) -> Outputs:
        if not isinstance(module, early_exit.EarlyExitUViT):
            return Outputs(module(x, t, context))
        noise, u, layers = module(x, t, context)
        return Outputs(noise, torch.stack(layers[1:]), torch.stack(u[1:]))  # theirs read the input of a block

    for path in sorted((file.parents[1] / "configs").glob("*.yaml")):
        family, _, rest = path.stem.partition("_")
        data, _, depth = rest.partition("_")
        settings = dict(yaml.safe_load(path.read_text())["model_params"])
        settings.pop("classifier_type", None)
        preset = "duodiff_" + names.get(data, data) + (f"_{depth}" if depth else "")

        def make(settings=settings, exits=family == "deediff") -> nn.Module:
            plain = uvit.UViT(**settings)
            return early_exit.EarlyExitUViT(plain, "mlp_probe_per_layer") if exits else plain

        yield Case(preset, make, run, saved(lambda state: {"model_state_dict": state, "step": 0}))


def fill(module: nn.Module) -> None:
    """Fills every trainable parameter with random values that keep activations near 1."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if not value.requires_grad:
                continue
            noise = torch.empty_like(value).normal_(generator=draw)
            if value.ndim == 1:
                value.copy_(0.1 * noise + (value == 1).all())
            elif any(part in name for part in ("pos_embed", "label_emb", "embedding_table", "scale_shift_table")):
                value.copy_(0.3 * noise)
            else:
                value.copy_(noise / value[0].numel() ** 0.5)


def to_bfloat16(module: nn.Module) -> None:
    """Runs the authors' module in bfloat16: inputs of layers are cast, in case the module computes float32 between."""

    def cast(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)

    module.bfloat16()
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Conv2d | nn.LayerNorm):
            child.register_forward_pre_hook(lambda _, values: cast(values))
        if name.endswith("time_embed"):
            child.register_forward_hook(lambda _, values, output: output.bfloat16())


def engine(model: adadiff.Model, *given: Tensor | None) -> Tensor:
    """Prediction of the engine without exits, [B, C or 2 C, H, W]."""
    full = forward(model, *given, policy="full")
    return full.prediction if full.variance is None else torch.cat([full.prediction, full.variance], 1)


def ours(model: adadiff.Model, x: Tensor, t: Tensor, context: Tensor | None) -> Outputs:
    noise = engine(model, x, t, context)
    if model.exits is None:
        return Outputs(noise)
    n = model.num_layers - 1
    u = forward(model, x, t, context, policy=Threshold(1e-9), record_scores=True).scores[:n]
    depth = torch.arange(1, n + 1).repeat_interleave(len(x))  # one lane for each layer and sample
    many = [None if v is None else v.repeat(n, *[1] * (v.ndim - 1)) for v in (x, t, context)]
    layers = forward(model, *many, policy=Replay(needs_scores=False), threshold=depth.float()).prediction
    return Outputs(noise, layers.view(n, len(x), *layers.shape[1:]), u)


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    draw, network = torch.Generator().manual_seed(1), config.network
    shape = len(TIMES), network.channels, network.image_size, network.image_size
    x = torch.randn(shape, generator=draw).bfloat16().float()
    context = (
        torch.tensor([network.num_classes - 1, 207 % max(1, network.num_classes)]) if network.num_classes else None
    )
    if network.context_tokens:
        shape = (len(TIMES), network.context_tokens, network.context_dim)
        context = torch.randn(shape, generator=draw).bfloat16().float()
        if isinstance(network, PixArtConfig):
            context[:, -network.context_tokens // 3 :] = 0  # no text
    return x, TIMES.floor() if config.schedule == "linear" else TIMES, context


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


@torch.no_grad()
def compare(case: Case) -> str:
    """A row of the table."""
    module = case.make().eval()
    fill(module)
    given = inputs(PRESETS[case.preset])
    theirs = case.run(module, *given)
    with tempfile.TemporaryDirectory() as folder:
        source, dest = case.save(module, Path(folder)), Path(folder, "ours.safetensors")
        first_exit = any(key.startswith("matrix.") for key in module.state_dict())

        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16().float())
        lane = [v if v is None else v[1:] for v in given]  # one lane, because few CPUs are fast in bfloat16
        exact = case.run(module, *lane).noise
        to_bfloat16(module)
        allowed = error(case.run(module, lane[0].bfloat16(), *lane[1:]).noise, exact)
        del module  # memory may not suffice for both modules
        gc.collect()

        done = convert(source, dest, case.preset, drop_first_exit=first_exit)
        model = adadiff.load(dest).requires_grad_(False)
    found = ours(model, *given)
    errors = [error(model.backbone(*given), theirs.noise), error(found.noise, theirs.noise)]
    errors += [None if b is None else error(a, b) for a, b in ((found.layers, theirs.layers), (found.u, theirs.u))]
    fits = all(e is None or e <= TOLERANCE for e in errors)
    found = error(engine(model.bfloat16(), *lane), exact)
    fits &= found <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps
    shown = ["" if e is None else f"{e:.1e}" for e in (*errors, found, allowed)]
    cells = [case.preset, f"{done.layout}", f"{done.parameters:,}", *shown, "fits" if fits else "**does not fit**"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, action="append", default=[], metavar="CLONE")
    parser.add_argument("--diffusers", action="store_true", help="the modules of diffusers, too")
    parser.add_argument("--only", help="presets, separated by commas (default: all)")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    chosen = None if options.only is None else options.only.split(",")
    rows = {}
    if options.out.exists():
        lines = [line for line in options.out.read_text().splitlines() if line.startswith("| ") and "---" not in line]
        rows = {tuple(line.split(" | ")[:2]): line for line in lines[1:]}
    if not options.reference and not options.diffusers:
        parser.error("name a checkout with --reference, or give --diffusers")
    for given in [*map(cases, options.reference), *([diffusers_cases()] if options.diffusers else [])]:
        for case in given:
            if chosen is None or case.preset in chosen:
                row = compare(case)
                print(row, flush=True)
                rows[tuple(row.split(" | ")[:2])] = row
                options.out.write_text(HEAD + "\n".join(rows[key] for key in sorted(rows)) + "\n")
                gc.collect()
    return int(any("does not fit" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
