"""Prediction types of networks, and conversions between them.

With x = alpha x0 + sigma eps, a prediction is p = a x0 + b eps:

    epsilon        eps                       the noise (Ho et al. 2020)
    sample         x0                        the image
    v_prediction   alpha eps - sigma x0      (Salimans and Ho 2022)
    flow           eps - x0                  the velocity of x = (1 - t) x0 + t eps (Lipman et al. 2023; SD3)

x and p are two linear equations in x0 and eps, so any other prediction is a linear combination of x and p. Conversion
commutes with classifier-free guidance, a combination of predictions whose weights add up to 1.
"""

from typing import TypeVar

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow", "sample")

Number = TypeVar("Number", float, Tensor)


def check_prediction_type(name: object) -> None:
    """Raises ValueError unless name is one of PREDICTION_TYPES."""
    if name not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {name!r}")


def conversion(given: str, wanted: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """px and pe in wanted = px x + pe given, shaped as alpha and sigma (float64, any shape). Not finite where `given`
    does not determine x0 and eps: epsilon at alpha = 0, sample at sigma = 0."""
    (a, b), (c, d) = _parts(given, alpha, sigma), _parts(wanted, alpha, sigma)
    scale = alpha * b - sigma * a
    return (c * b - d * a) / scale, (d * alpha - c * sigma) / scale


def predicted_sample(given: str, prediction: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """x0 from a prediction of type `given` at x. prediction, x: [...]; alpha, sigma: numbers, or broadcastable to x."""
    a, b = _parts(given, alpha, sigma)
    return (b * x - sigma * prediction) / (alpha * b - sigma * a)


def predicted_noise(given: str, prediction: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """eps from a prediction of type `given` at x; arguments as for `predicted_sample`."""
    a, b = _parts(given, alpha, sigma)
    return (alpha * prediction - a * x) / (alpha * b - sigma * a)


def target_of(wanted: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The training target of a network that predicts `wanted`. x0, noise: [...]; alpha, sigma: broadcastable to x0."""
    if wanted in ("epsilon", "sample"):
        return noise if wanted == "epsilon" else x0
    a, b = _parts(wanted, alpha, sigma)
    return a * x0 + b * noise


def _parts(name: str, alpha: Number, sigma: Number) -> tuple[Number | float, Number | float]:
    """a and b in p = a x0 + b eps."""
    return {
        "epsilon": (0.0, 1.0),
        "v_prediction": (-sigma, alpha),
        "flow": (-1.0, 1.0),
        "sample": (1.0, 0.0),
    }[name]
