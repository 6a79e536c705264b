"""Several pipelines that share a transformer, each with a scheduler of its own: nothing of one is reused in another."""

from typing import Any

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.pipelines.enable import enabled
from pipelines.pipes import draw, pipeline

STEPS, SEEDS, OTHERS = 6, [1, 2], [7, 8]


def twin(pipe: Any) -> Any:
    """Of the same parts, with a scheduler of its own."""
    made = type(pipe)(**{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)})
    made.set_progress_bar_config(disable=True)
    return made


def interrupted(pipe: Any, name: str, after: int) -> None:
    """In a callback, after so many steps."""

    def stop(_: Any, step: int, *__: Any) -> dict:
        if step + 1 == after:
            raise RuntimeError("enough")
        return {}

    with pytest.raises(RuntimeError, match="enough"):
        draw(pipe, name, SEEDS, STEPS, callback_on_step_end=stop)


def with_noise_of(name: str, images: list[int]) -> dict[str, Any]:
    """The prompts that `interrupted` has, and other noise, so that only the sample is another."""
    return {"generator": [torch.Generator().manual_seed(image) for image in images]}


@pytest.mark.parametrize("policy", ["reuse:every=9", "cache:threshold=1e9"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_run_after_an_interrupted_one_of_another_pipeline_takes_nothing_from_it(name: str, policy: str) -> None:
    """After one step the other one comes at the same time again, with the first scheduler one step on."""
    first = pipeline(name)
    second = twin(first)
    adadiff.enable(first, policy)
    expected = draw(second, name, SEEDS, STEPS, **with_noise_of(name, OTHERS))
    full = [step.full.any().item() for step in enabled(first.transformer).record.steps]
    assert full == [True] + [False] * (STEPS - 1)
    for after in (1, 3):
        interrupted(first, name, after)
        assert torch.equal(draw(second, name, SEEDS, STEPS, **with_noise_of(name, OTHERS)), expected)


def test_a_run_that_begins_where_an_interrupted_one_would_go_on() -> None:
    """At the very time that the interrupted one would come to next, as image-to-image does."""
    first = pipeline("flux")
    second = twin(first)
    record = adadiff.enable(first, "cache:threshold=1e9")
    interrupted(first, "flux", 3)
    sigmas = (first.scheduler.timesteps[3:] / 1000).tolist()

    def late() -> Tensor:
        return draw(second, "flux", SEEDS, len(sigmas), sigmas=sigmas, **with_noise_of("flux", OTHERS))

    images = late()
    assert torch.equal(first.scheduler.timesteps[3:], second.scheduler.timesteps)
    assert [step.full.any().item() for step in record.steps] == [True, False, False]
    adadiff.disable(first)
    adadiff.enable(second, "cache:threshold=1e9")
    assert torch.equal(late(), images)


def test_each_pipeline_counts_the_steps_of_its_own_scheduler() -> None:
    first = pipeline("sd3")
    second = twin(first)
    record = adadiff.enable(first, "reuse:every=3,dense_late=2")
    draw(first, "sd3", SEEDS, STEPS)
    for pipe, steps in ((second, 9), (first, 5), (second, 7)):
        draw(pipe, "sd3", SEEDS, steps)
        full = [step.full.all().item() for step in record.steps]
        assert full == [step % 3 == 0 or step >= steps - 2 for step in range(steps)]


def test_a_pipeline_inside_the_callback_of_another_one_leaves_it_right() -> None:
    """Each change of the caller begins a run: the outer one then runs its next step in full."""
    first = pipeline("flux")
    second = twin(first)
    inner: list[Tensor] = []

    def between(_: Any, step: int, *__: Any) -> dict:
        if step == 2:
            inner.append(draw(second, "flux", OTHERS, 3))
        return {}

    record = adadiff.enable(first, "cache:threshold=1e9")
    alone = draw(second, "flux", OTHERS, 3)
    draw(first, "flux", SEEDS, STEPS, callback_on_step_end=between)
    assert torch.equal(inner[0], alone)
    assert [step.full.any().item() for step in record.steps] == [True, False, False]  # of the last three steps


def test_a_bare_transformer_follows_whoever_calls() -> None:
    pipe = pipeline("sd3")
    record = adadiff.enable(pipe.transformer, "cache:threshold=1e9")
    for after in (1, 4):
        interrupted(pipe, "sd3", after)
        draw(twin(pipe), "sd3", OTHERS, STEPS)
        assert [step.full.any().item() for step in record.steps] == [True] + [False] * (STEPS - 1)
