"""What a step selector chooses and how it was measured, printed."""

from collections.abc import Sequence

from ..policies.step_selector import MeasuredSteps, SelectorConfig
from .terminal import print_table, way_of_drawing

MOST_NAMED = 20  # classes that are named in a line


def show_choices(config: SelectorConfig, steps_of_classes: Sequence[int] | None) -> None:
    """Tables of what each class takes, if it goes by classes, and of the errors."""
    if steps_of_classes is not None:
        by_steps: dict[int, list[int]] = {}
        for label, steps in enumerate(steps_of_classes):
            by_steps.setdefault(steps, []).append(label)
        print_table([{"steps": str(steps), "classes": _named(by_steps[steps])} for steps in sorted(by_steps)])
    measured, most = config.measured, config.candidates[-1]
    if measured is not None:
        print_table(_errors(measured, most))
        print(f"Measured with {way_of_drawing(most, config.solver, config.guidance_scale)} as the reference, on")
        print(
            f"{measured.n} noises that were not learnt from. error: root mean square. ratio: the selector's error over"
        )
        print("that of this line, with its 95 % interval; below 1, choosing pays.")
        print(f"{measured.above_bar:.0%} of the selector's errors are above the bar, {config.bar:g}.")


def _errors(measured: MeasuredSteps, most: int) -> list[dict[str, str]]:
    own = f"{measured.error:.3g} [{measured.low:.3g}, {measured.high:.3g}]"
    rows = [{"": "chosen by the selector", "mean steps": f"{measured.mean_steps:.2f}", "error": own, "ratio": ""}]
    for name, steps, one in (
        ("the same for all", f"{measured.fixed_steps}", measured.fixed),
        ("its choices, dealt at random", f"{measured.mean_steps:.2f}", measured.random),
    ):
        ratio = "" if one.ratio is None else f"{one.ratio:.2f} ({one.low:.2f} to {one.high:.2f})"
        rows.append({"": name, "mean steps": steps, "error": f"{one.error:.3g}", "ratio": ratio})
    return [*rows, {"": "the most", "mean steps": str(most), "error": "0", "ratio": ""}]


def _named(labels: Sequence[int]) -> str:
    more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
    return ", ".join(map(str, labels[:MOST_NAMED])) + more
