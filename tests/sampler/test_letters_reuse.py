"""The shipped estimates of letters: what they spend and how near the images are, on noises of their own."""

import pytest
import torch

import adadiff
from adadiff.policies.estimated_file import read_estimates


@pytest.mark.slow
def test_half_of_the_work_has_a_fraction_of_the_error_of_exits() -> None:
    """24 samples, of which few make most of the mean error: by medians. The card has a twentieth of the mean."""
    model, known = adadiff.load("letters"), read_estimates("letters_reuse")
    own = {"steps": 20, "guidance_scale": 2.0, "class_labels": [7 * i % 62 for i in range(24)], "seed": 50}

    def error(policy: str) -> float:
        images, report = adadiff.sample(model, 24, policy=policy, **own)
        assert report.macs / report.macs_full == pytest.approx(0.5, abs=0.02)
        return float((images - full).square().flatten(1).mean(1).median())

    full, _ = adadiff.sample(model, 24, **own)
    exits = error("exit:budget=0.5")
    assert error("estimate:letters_reuse,share=0.5") < exits / 20
    assert error("estimate:letters_reuse,share=0.5,by=step") < exits / 20
    assert (known.best(0.45), known.best(0.55)) == ("step", "sample")
    assert known.samples == 640
    assert torch.tensor(known.t).diff().max() < 0  # from noise to image
