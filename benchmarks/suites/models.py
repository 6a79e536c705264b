"""A forward pass of every published network at batch 1 and 8, random weights: plain, compiled, and through the engine.

On a GPU, if there is one, in bfloat16; else on the CPU in float32, where only networks of at most MOST_MACS are
measured unless others are named. Two patterns for the engine: no lane exits, though every block is scored; and every
other lane, starting with the first, exits after block 2 (at batch 1, that is the whole batch).
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

import adadiff
from adadiff import ForwardOutput, Model
from adadiff.config import PRESETS, ModelConfig
from adadiff.policies.exits import Replay
from adadiff.uem import PAPER
from benchmarks.baselines.attainable import Call
from benchmarks.gpu.session import DeviceTimer, check_close
from benchmarks.harness import Comparison, interleave, peak_bytes
from benchmarks.rows import Rows, dtype_name, say
from benchmarks.suites.network import compile_network, patterns

SUITE = "models"
MOST_MACS = 17e9  # of one lane; eight such lanes take about two seconds on two cores
BATCHES = (1, 8)
PLAIN, COMPILED = "plain, eager", "plain, compiled"
ENGINE = ("nobody leaves", "two-phase")
WRONG = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative error above which a variant is not timed
Inputs = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Setting:
    """presets: None: all that are suitable for `device`. limit: seconds of a comparison, see `interleave`."""

    device: torch.device
    presets: Sequence[str] | None = None
    repeats: int = 7
    limit: float = 120.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.presets or () if name not in PRESETS]
        if unknown:
            raise ValueError(f"unknown preset {', '.join(unknown)}, known: {', '.join(PRESETS)}")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def names(self) -> list[str]:
        if self.presets is not None:
            return list(self.presets)
        most = float("inf") if self.device.type == "cuda" else MOST_MACS
        costs = {name: macs(config) for name, config in PRESETS.items()}
        return sorted((name for name, cost in costs.items() if cost <= most), key=costs.__getitem__)


@cache
def macs(config: ModelConfig) -> int:
    """Multiply-adds of one lane through all blocks."""
    with torch.device("meta"):
        network = Model(replace(config, exits=None)).backbone
    return sum(network.stem_and_head_macs()) + sum(block.macs(network.tokens) for block in network.blocks)


def run(rows: Rows, setting: Setting) -> None:
    """Measures what an earlier run of this commit on this machine has not measured yet."""
    for name in setting.names:
        missing = [batch for batch in BATCHES if not _is_measured(rows, setting, name, batch)]
        if not missing:
            continue
        model = made(name, setting)
        for batch in missing:
            say(f"models: {name}, batch {batch}, {dtype_name(setting.dtype)} on {setting.device.type}")
            measure(rows, setting, name, model, inputs_of(model, batch))
        del model
        torch.compiler.reset()
        gc.collect()


def _is_measured(rows: Rows, setting: Setting, name: str, batch: int) -> bool:
    wanted = (SUITE, {"preset": name, "batch": batch}, dtype_name(setting.dtype), torch.get_num_threads())
    return any(
        (row["suite"], row["parameters"], row["dtype"], row["threads"]) == wanted
        and (row["commit"], row["machine"], row["device"]) == (rows.commit, rows.machine, setting.device.type)
        and row["variant"] == ENGINE[-1]  # the last row that a comparison writes
        for row in rows.rows
    )


def made(name: str, setting: Setting) -> Model:
    """A model with exits and random weights, including parameters that are initialised to zero, such as DiT's gates."""
    torch.manual_seed(0)
    with setting.device:
        model = adadiff.build(name, exits=PAPER)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.to(setting.dtype).requires_grad_(False)


def inputs_of(model: Model, batch: int) -> Inputs:
    network, parameter = model.config.network, next(model.parameters())
    like = {"dtype": parameter.dtype, "device": parameter.device}
    x = torch.randn(batch, *model.backbone.sample_shape, **like)
    t = torch.linspace(1, 999, batch, device=parameter.device).round()
    if network.context_tokens:
        return x, t, torch.randn(batch, network.context_tokens, network.context_dim, **like)
    return x, t, torch.arange(batch, device=parameter.device) % network.num_classes if network.num_classes else None


def measure(rows: Rows, setting: Setting, name: str, model: Model, inputs: Inputs) -> None:
    """Measures one comparison and writes a row for each variant."""
    B, device = len(inputs[0]), setting.device
    calls: dict[str, Call] = {PLAIN: lambda: model.backbone(*inputs)}
    compiled, _ = compile_network(model, *inputs)
    if compiled is not None:
        calls[COMPILED] = lambda: compiled(*inputs)
    results: dict[str, ForwardOutput] = {}
    wanted = {
        pattern: exits.to(device) for pattern, exits in patterns(B, model.num_layers).items() if pattern in ENGINE
    }
    for pattern, exits in wanted.items():
        calls[pattern] = pass_of(model, inputs, exits)
    with torch.inference_mode():
        noise = calls[PLAIN]()
        for pattern in wanted:  # also warms up before bytes are counted
            results[pattern] = calls[pattern]()
        check_close(ENGINE[0], results[ENGINE[0]].prediction, noise[:, : inputs[0].shape[1]], WRONG[setting.dtype])
        if compiled is not None:
            check_close(COMPILED, calls[COMPILED](), noise, WRONG[setting.dtype])
    for pattern, exits in wanted.items():
        if results[pattern].exit_layer.tolist() != exits.tolist():
            raise RuntimeError(f"{name}, {pattern}: lanes exited after {results[pattern].exit_layer.tolist()} blocks")
    peaks = {variant: peak_bytes(call, device) for variant, call in calls.items()}
    timer = DeviceTimer(device, 0.02) if device.type == "cuda" else None
    measured = interleave(
        calls, setting.repeats, turn=0.02, limit=setting.limit, label=f"{name}, batch {B}", timer=timer
    )
    write(rows, setting, name, model, measured, results, peaks)


def pass_of(model: Model, inputs: Inputs, exits: Tensor) -> Callable[[], ForwardOutput]:
    return lambda: adadiff.forward(model, *inputs, policy=Replay(), threshold=exits)


def write(
    rows: Rows,
    setting: Setting,
    name: str,
    model: Model,
    measured: Comparison,
    results: Mapping[str, ForwardOutput],
    peaks: Mapping[str, int],
) -> None:
    fastest = min((variant for variant in measured.times if variant not in results), key=measured.median)
    full = results[ENGINE[0]]
    for variant in measured.times:
        result = results.get(variant)
        rows.write(
            SUITE,
            "evaluation",
            variant,
            {"preset": name, "batch": len(full.exit_layer)},
            dtype=dtype_name(setting.dtype),
            device=setting.device.type,
            **measured.row(variant),
            speedup=measured.ratio(fastest, variant).median,
            fastest_plain=fastest,
            macs=result.macs if result else full.macs_full,
            macs_full=full.macs_full,
            blocks=int(result.exit_layer.sum()) if result else len(full.exit_layer) * model.num_layers,
            blocks_full=len(full.exit_layer) * model.num_layers,
            peak_bytes=peaks[variant],
            weight_bytes=sum(value.nbytes for value in model.backbone.parameters()),
        )
