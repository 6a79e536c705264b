"""What a network predicts, and how one prediction is told as another: the only place where it matters.

With x = alpha x0 + sigma eps, a prediction is p = a x0 + b eps:

    epsilon        eps                       the noise (Ho et al. 2020)
    sample         x0                        the image
    v_prediction   alpha eps - sigma x0      (Salimans and Ho 2022)
    flow           eps - x0                  the velocity of x = (1 - t) x0 + t eps (Lipman et al. 2023; SD3)

x and p are two equations in x0 and eps, so that any other prediction is a sum of them. It commutes with
classifier-free guidance, which is one of p with weights that add up to 1.
"""

from typing import TypeVar

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow", "sample")

Number = TypeVar("Number", float, Tensor)


def check_prediction_type(name: object) -> None:
    """ValueError unless it is one of PREDICTION_TYPES."""
    if name not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {name!r}")


def conversion(given: str, wanted: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """px and pe of wanted = px x + pe given, shaped as alpha and sigma, float64 of any shape. Not finite where `given`
    does not tell: epsilon at alpha = 0, sample at sigma = 0."""
    (a, b), (c, d) = _parts(given, alpha, sigma), _parts(wanted, alpha, sigma)
    scale = alpha * b - sigma * a
    return (c * b - d * a) / scale, (d * alpha - c * sigma) / scale


def predicted_sample(given: str, prediction: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """The x0 that a prediction at x says. prediction, x: [...]; alpha, sigma: numbers, or shaped to multiply those."""
    a, b = _parts(given, alpha, sigma)
    return (b * x - sigma * prediction) / (alpha * b - sigma * a)


def predicted_noise(given: str, prediction: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """The eps that a prediction at x says; arguments as `predicted_sample`."""
    a, b = _parts(given, alpha, sigma)
    return (alpha * prediction - a * x) / (alpha * b - sigma * a)


def target_of(wanted: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of this type is trained to predict: x0, noise: [...]; alpha, sigma: shaped to multiply those."""
    if wanted in ("epsilon", "sample"):
        return noise if wanted == "epsilon" else x0
    a, b = _parts(wanted, alpha, sigma)
    return a * x0 + b * noise


def _parts(name: str, alpha: Number, sigma: Number) -> tuple[Number | float, Number | float]:
    """a and b."""
    return {
        "epsilon": (0.0, 1.0),
        "v_prediction": (-sigma, alpha),
        "flow": (-1.0, 1.0),
        "sample": (1.0, 0.0),
    }[name]
