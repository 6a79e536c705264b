"""Alternatives to early exit: every method over its range of settings and numbers of solver steps."""

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import torch

import adadiff
from adadiff.calibration.calibrating import CALIBRATION_SEED, Calibrating, work_of
from adadiff.calibration.kept_runs import KeptRuns
from adadiff.calibration.recording import record
from adadiff.calibration.reliability import reliability_picture
from adadiff.calibration.reuse_errors import ReuseErrors
from adadiff.calibration.stopping import exit_layers, total
from adadiff.policies.estimated_file import estimates_json, read_estimates
from adadiff.policies.joining import quoted
from adadiff.policies.reuse import Cache
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.writing import replace_file
from benchmarks.baselines.sweeps import Networks, Sweep
from benchmarks.suites.drawing import Artist, Method, fingerprint, load

BATCH = 64  # samples at a time, for quality
COMPOSED = (  # several policies each
    "ours, early model",
    "ours, cache and exits",
    "ours, reuse and exits",
    "ours, cache, exits, early model",
)
BY_BUDGET = (  # methods whose settings begin with the budget
    "ours, faithful",
    "ours, distribution",
    "ours, estimated errors",
    *COMPOSED,
)
SINGLE = ("ours, one threshold", "ours, cache", "ours, width", "ours, cascade")  # of one policy
OURS = (*BY_BUDGET, *SINGLE)
CANDIDATES = 200  # single thresholds that are tried
RECORDED, RECORDED_STEPS = 64, 20  # samples and steps on which they are chosen
DENSE = 0.3  # share of the steps that extrapolating reuse makes in full first, as TaylorSeer does


def methods(networks: Networks, sweep: Sweep, folder: Path) -> list[Method]:
    """All methods and settings. folder: with the files of `calibrate`."""
    found = []
    for solver, steps in product((*sweep.solvers, *sweep.further_solvers), sorted({*sweep.steps, *sweep.between})):
        common = {"solver": solver, "steps": steps, "batch": BATCH}
        found += _plain(networks, sweep, common)
        if solver in sweep.solvers and steps in sweep.steps:
            found += _adaptive(networks, sweep, folder, common)
            for name in networks.deep:
                found += _reuse(name, _which(networks, name), sweep, common)
    for (solver, steps), name in product(sweep.estimated, networks.deep):
        common = {"solver": solver, "steps": steps, "batch": BATCH}
        found += _estimated(name, _which(networks, name), sweep, folder, common)
    return found


def _which(networks: Networks, name: str) -> str:
    """End of the settings of methods that run one of the two networks; the full one is not named."""
    return ", plain" if name == networks.plain else ""


def _begin(steps: int) -> int:
    """The first steps that extrapolating reuse makes in full."""
    return min(max(2, round(DENSE * steps)), steps - 1)


def _plain(networks: Networks, sweep: Sweep, common: dict) -> Iterator[Method]:
    """Methods that run plain networks."""
    full = networks.full
    yield Method("fewer steps", full, **common)
    if networks.plain:
        yield Method("plain network", networks.plain, **common)
    if networks.shallow:
        yield Method("shallow network", networks.shallow, **common)
        for t, name in product(sweep.switches, networks.deep):
            setting = f"t ≥ {t:g}{_which(networks, name)}"
            switched = {"shallow_model": networks.shallow, "t_switch": t}
            yield Method("DuoDiff", name, setting=setting, **switched, **common)


def _adaptive(networks: Networks, sweep: Sweep, folder: Path, common: dict) -> Iterator[Method]:
    full, num_layers, begin = networks.full, load(networks.full).num_layers, _begin(common["steps"])
    for depth in sorted({max(1, round(share * num_layers)) for share in sweep.depths}):
        yield Method("fixed depth", full, policy=f"exit:depth={depth}", setting=f"{depth} blocks", **common)
    if networks.slim and networks.widths:
        own = {"policy": f"width:{networks.widths}", "setting": Path(networks.widths).stem}
        yield Method("ours, width", networks.slim, **own, **common)
    if networks.cascade:
        for share in sweep.sent_on:
            own = {"policy": f"cascade:{networks.cascade},share={share:g}", "setting": f"{share:g} go on"}
            yield Method("ours, cascade", full, **own, **common)
    for aim, share in product(sweep.aims, sweep.budgets):
        file = str(calibrated_file(networks.full, aim, common["solver"], common["steps"], sweep, folder))
        yield Method("static table", file, policy=f"exit:table={share:g}", setting=f"{share:g}, {aim}", **common)
        yield Method(f"ours, {aim}", file, policy=f"exit:budget={share:g}", setting=f"{share:g}", **common)
        if aim != sweep.aims[0]:  # the others are composed with the first aim only
            continue
        both = f"reuse:every=2,order=1,dense_early={begin}+exit:budget={share:g}"
        own = {"policy": both, "setting": f"{share:g}, every 2, extrapolated, the first {begin} in full"}
        yield Method("ours, reuse and exits", file, **own, **common)
        for change in sweep.composed:  # extrapolating: less error for the same work
            both = f"{Cache(change, order=1)}+exit:budget={share:g}"
            own = {"policy": both, "setting": f"{share:g}, change {change:g}, extrapolated"}
            yield Method("ours, cache and exits", file, **own, **common)
            for t in sweep.switches if networks.shallow else ():
                early = {"shallow_model": networks.shallow, "t_switch": t, "policy": both}
                setting = f"{own['setting']}, t ≥ {t:g}"
                yield Method("ours, cache, exits, early model", file, setting=setting, **early, **common)
        for t in sweep.switches if networks.shallow else ():
            own = {"shallow_model": networks.shallow, "t_switch": t, "policy": f"exit:budget={share:g}"}
            yield Method("ours, early model", file, setting=f"{share:g}, t ≥ {t:g}", **own, **common)
    for first in sweep.first:
        for theta in single_thresholds(full, tuple(sweep.shares), first, False):
            policy, setting = f"exit:{theta:g},min_layer={first}", f"θ = {theta:g} from block {first}"
            yield Method("ours, one threshold", full, policy=policy, setting=setting, **common)
        for theta in single_thresholds(full, tuple(sweep.shares), first, True):
            policy = f"exit:batch-mean={theta:g},min_layer={first},patience=0"
            setting = f"θ = {theta:g} from block {first}"
            yield Method("batch mean", full, policy=policy, setting=setting, **common)


def _reuse(model: str, which: str, sweep: Sweep, common: dict) -> Iterator[Method]:
    """Reuse, which needs no exits, at fixed steps or by a threshold. which: end of the settings."""
    num_layers, begin = load(model).num_layers, _begin(common["steps"])
    for every in sweep.every:
        yield Method("reuse", model, reuse=every, setting=f"every {every}{which}", **common)
        for early in sorted({1, begin}):
            what = "" if early == 1 else f", the first {early} in full"
            own = {"policy": f"reuse:every={every},order=1,dense_early={early}"}
            own["setting"] = f"every {every}, blocks, extrapolated{what}{which}"
            yield Method("static reuse", model, **own, **common)
        later = f",layers={num_layers // 3 + 1}-{num_layers}"  # the first blocks read the noisy image itself
        for what, plan in {"all layers": "", "later layers": later}.items():
            own = {"policy": f"reuse:every={every},level=layer{plan}", "setting": f"every {every}, {what}{which}"}
            yield Method("static reuse", model, **own, **common)
    for change in sweep.changes:
        for order, what in ((0, ""), (1, ", extrapolated")):
            own = {"policy": str(Cache(change, order=order)), "setting": f"{change:g}{what}{which}"}
            yield Method("ours, cache", model, **own, **common)
        own = {"policy": f"cache:batch={change:g}", "setting": f"{change:g}{which}"}
        yield Method("cache, whole batch", model, **own, **common)


def _estimated(model: str, which: str, sweep: Sweep, folder: Path, common: dict) -> Iterator[Method]:
    """Reuse where its estimated error is small, for the shares that can be had. By step, it is the same for all.
    which: end of the settings."""
    file = estimates_file(model, common["solver"], common["steps"], sweep, folder)
    known = read_estimates(str(file))
    for share in sweep.budgets:
        for by, name, setting in (
            ("sample", "ours, estimated errors", f"{share:g}{which}"),
            ("step", "static reuse", f"{share:g}, by estimated errors{which}"),
        ):
            try:
                known.level(by, share)
            except ValueError:  # beyond the measured shares
                continue
            policy = f"estimate:{quoted(str(file))},share={share:g},by={by}"
            yield Method(name, model, policy=policy, setting=setting, **common)


def estimates_file(model: str, solver: str, steps: int, sweep: Sweep, folder: Path) -> Path:
    return folder / f"{fingerprint(model)}-reuse-{solver}-{steps}-{sweep.estimated_on}.json"


def calibrated_file(full: str, aim: str, solver: str, steps: int, sweep: Sweep, folder: Path) -> Path:
    budgets = "-".join(f"{share:g}" for share in sweep.budgets)
    return folder / f"{fingerprint(full)}-{aim}-{solver}-{steps}-{sweep.calibrated_on}-{budgets}.safetensors"


def calibrate(networks: Networks, sweep: Sweep, folder: Path, artist: Artist) -> Path:
    """Makes the calibrations that `folder` lacks, each with a picture of uncertainties against errors. Returns the
    picture for the first aim and solver with the most steps."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = list(product(sweep.aims, sweep.solvers, sweep.steps))
    files = [calibrated_file(networks.full, *one, sweep, folder) for one in chosen]
    tasks = [
        (networks.full, *one, tuple(sweep.budgets), sweep.calibrated_on, str(file))
        for one, file in zip(chosen, files, strict=True)
        if not file.exists()
    ]
    # the longest first, so that the processes finish at about the same time
    artist.map(_calibrate, sorted(tasks, key=lambda task: -task[3]), "calibrations")
    wanted = [(name, *one) for name, one in product(networks.deep, sweep.estimated)]  # reuse needs no exits
    estimates = {one: estimates_file(*one, sweep, folder) for one in wanted}
    missing = [(*one, sweep.estimated_on, str(file)) for one, file in estimates.items() if not file.exists()]
    artist.map(_estimate, sorted(missing, key=lambda task: -task[2]), "estimates of errors")
    shown = calibrated_file(networks.full, sweep.aims[0], sweep.solvers[0], max(sweep.steps), sweep, folder)
    return shown.with_suffix(".png")


def _calibrate(task: tuple[str, str, str, int, tuple[float, ...], int, str]) -> None:
    full, aim, solver, steps, budgets, n, file = task
    model = adadiff.load(full)
    calibrating = Calibrating(model, budgets, aim=aim, n=n, steps=steps, solver=solver, batch=BATCH, refit=True)
    kept = _kept(file)
    calibrating.run(kept=kept)
    reliability_picture(calibrating.recording, Path(file).with_suffix(".png"))
    adadiff.save(calibrating.model, file)
    kept.drop()


def _estimate(task: tuple[str, str, int, int, str]) -> None:
    model, solver, steps, n, file = task
    errors = ReuseErrors(adadiff.load(model), n=n, steps=steps, solver=solver, batch=BATCH)
    kept = _kept(file)
    found = errors.run(kept=kept)
    replace_file(Path(file), lambda temporary: temporary.write_text(estimates_json(found)), force=True)
    kept.drop()


def _kept(file: str) -> KeptRuns:
    """Keeps the runs of the calibration that makes `file`, whose name has all of its settings."""
    identity = {"adadiff": adadiff.__version__, "torch": torch.__version__, "file": Path(file).name}
    return KeptRuns(Path(f"{file}.runs"), identity, force=True)


@cache
def single_thresholds(name: str, shares: tuple[float, ...], first: int, by_mean: bool) -> list[float]:
    """Single thresholds for all timesteps and for layers from `first` on, whose work on recorded runs of the full
    network is nearest to `shares` of its work. by_mean: the samples' mean uncertainty decides for all of them."""
    model = adadiff.load(name)
    classes = model.config.classes
    labels = [i % classes for i in range(RECORDED)] if classes else None
    samples = SampleBatch.of(model, RECORDED, steps=RECORDED_STEPS, seed=CALIBRATION_SEED, class_labels=labels)
    u = record(model, samples, RECORDED).u[:, first - 1 :].double()
    seen = torch.ones(len(u), first - 1, u.shape[-1])
    u = torch.cat([seen, u.mean(-1, keepdim=True).expand_as(u) if by_mean else u], 1)
    candidates = u[:, first - 1 :].flatten().quantile(torch.linspace(0.005, 0.995, CANDIDATES, dtype=torch.float64))
    asked = torch.arange(u.shape[1]) >= first - 1
    work, nothing = work_of(model), torch.zeros_like(u)
    spent = torch.tensor(
        [total(exit_layers(u, theta.expand(u.shape[:2])), nothing, work, asked)[1] for theta in candidates]
    )
    nearest = [float(candidates[(spent - share).abs().argmin()]) for share in shares]
    return sorted({float(f"{theta:.4g}") for theta in nearest if 0 < theta < 1})
