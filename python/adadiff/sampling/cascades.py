"""Cascades in sampling: settings of a request's student and teacher stages, and the handover between them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import find
from ..diffusion.noise import initial_noise, refinement_noise
from ..diffusion.refining import Refining
from ..diffusion.solvers import solver_from
from ..diffusion.tables import Solver
from ..forward.two_stage import check_draws_the_same
from ..model import Model
from ..policies.cascade import Cascade
from .cascade_file import CascadeFile, read_cascade
from .oracle import oracle_labels


@dataclass(frozen=True, eq=False)
class Draft:
    """The two stages of one request's samples.

    solver, steps: the student's. threshold: images with a lower score go on to the teacher. teacher_solver,
    teacher_steps: solver and network evaluations, int64 [n], of the second stage; sigma: None if the teacher starts
    from noise ("regenerate").
    """

    file: CascadeFile
    threshold: float
    sigma: float | None
    teacher_solver: Solver
    teacher_steps: Tensor

    @property
    def solver(self) -> Solver:
        return solver_from(self.file.settings.solver)

    @property
    def steps(self) -> int:
        return self.file.settings.steps

    @torch.no_grad()
    def scores(self, images: Tensor, labels: Tensor | None, one_by_one: bool) -> Tensor:
        """The oracle's scores, float32 [k]. images: float32 [k, C, H, W]; labels: int64 [k], as the network gets them,
        or None. one_by_one: score images separately, so that a score is bit-identical in any batch."""
        oracle = self.file.oracle
        labels = oracle_labels(oracle.config, labels, len(images), images.device)
        if not one_by_one:
            return oracle(images, labels)
        singles = (None if labels is None else labels[i : i + 1] for i in range(len(images)))
        return torch.cat([oracle(image[None], label) for image, label in zip(images, singles, strict=True)])

    def asks_for_more(self, scores: np.ndarray) -> np.ndarray:
        """bool [k]: images that go on to the teacher. A NaN score goes on, unless the share is 0."""
        return ~(scores >= self.threshold) if self.threshold > -np.inf else np.zeros(len(scores), dtype=bool)

    def begin_again(self, images: Tensor, seeds: Tensor, one_by_one: bool) -> Tensor:
        """The teacher's initial x: float32 [k, C, H, W]. images: of the student; seeds: int64 [k], on the CPU.
        one_by_one: see `scores`."""
        # rounding may depend on an element's position in a vector
        parts = seeds.split(1) if one_by_one else (seeds,)
        draw = initial_noise if self.sigma is None else refinement_noise
        z = torch.cat([draw(part, images.shape[1:], images.device) for part in parts])
        if self.sigma is None:
            return z
        a = torch.tensor(1 - self.sigma, dtype=torch.float64, device="cpu")
        return (a.sqrt().item() * images.double() + (1 - a).sqrt().item() * z).float()


def draft_of(model: Model, cascade: Cascade, solver: Solver, steps: Tensor) -> Draft:
    """The stages of samples with this cascade. model, solver, steps: int64 [n]: the teacher's.

    Raises ValueError for a file that cannot be read, a student that draws other samples or has more blocks than
    `model`, and a sigma outside the schedule.
    """
    path = find(cascade.path)
    parameter = next(model.parameters())
    file = read_cascade(path, parameter.device, parameter.dtype)
    check_draws_the_same("student", file.student, model)
    if file.student.num_layers > model.num_layers:
        raise ValueError(
            f"the student has {file.student.num_layers} blocks, its teacher {model.num_layers}; are they swapped?"
        )
    settings = file.settings
    share = settings.share if cascade.share is None else cascade.share
    mode = settings.mode if cascade.mode is None else cascade.mode
    if mode == "regenerate" and cascade.sigma is not None:
        raise ValueError("sigma is how much noise 'refine' adds; this file's mode is 'regenerate', so give mode=refine")
    sigma = None
    if mode == "refine":
        sigma = settings.sigma if cascade.sigma is None else float(cascade.sigma)
        solver = Refining(solver, sigma)
    rows = {count: solver.table(model.schedule, count).steps for count in set(steps.tolist())}
    return Draft(
        file=file,
        threshold=settings.threshold(share),
        sigma=sigma,
        teacher_solver=solver,
        teacher_steps=torch.tensor([rows[count] for count in steps.tolist()], dtype=torch.int64, device="cpu"),
    )
