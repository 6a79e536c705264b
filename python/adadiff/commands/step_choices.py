"""Printed tables of a step selector's choices and of its measured errors."""

from collections.abc import Sequence

from ..policies.step_selector import MeasuredSteps, SelectorConfig
from .terminal import print_table, way_of_drawing

MOST_NAMED = 20  # classes that are named in a line


def show_choices(config: SelectorConfig, steps_of_classes: Sequence[int] | None) -> None:
    """Prints the number of steps of each class (None: a selector that reads prompts) and the measured errors."""
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
            f"{measured.n} noises that it was not trained on. error: root mean square. ratio: the selector's error over"
        )
        print("that of the row, with its 95 % interval; below 1, choosing pays.")
        print(f"{measured.above_bar:.0%} of the selector's errors are above the bar, {config.bar:g}.")


def _errors(measured: MeasuredSteps, most: int) -> list[dict[str, str]]:
    error = f"{measured.error:.3g} [{measured.low:.3g}, {measured.high:.3g}]"
    rows = [{"": "chosen by the selector", "mean steps": f"{measured.mean_steps:.2f}", "error": error, "ratio": ""}]
    for name, steps, other in (
        ("the same for all", f"{measured.fixed_steps}", measured.fixed),
        ("its choices, dealt at random", f"{measured.mean_steps:.2f}", measured.random),
    ):
        ratio = "" if other.ratio is None else f"{other.ratio:.2f} ({other.low:.2f} to {other.high:.2f})"
        rows.append({"": name, "mean steps": steps, "error": f"{other.error:.3g}", "ratio": ratio})
    return [*rows, {"": "the most", "mean steps": str(most), "error": "0", "ratio": ""}]


def _named(labels: Sequence[int]) -> str:
    more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
    return ", ".join(map(str, labels[:MOST_NAMED])) + more
