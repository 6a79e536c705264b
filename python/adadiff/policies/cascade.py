"""A few-step student draws every image; a teacher improves those that an oracle scores worst (Starodubcev et al., CVPR
2024, arXiv 2312.10835)."""

from dataclasses import dataclass
from numbers import Real

from .joining import quoted

MODES = ("refine", "regenerate")
LEAST_SHARE = 0.01  # quantiles of scores are stored for whole percentages


@dataclass(frozen=True)
class Cascade:
    """path: a file of `adadiff distill` (student, oracle and its quantiles), or the name of a shipped one.

    share: the share of the student's images, those the oracle scores worst, that go on to the teacher: 0, 1, or from
    0.01 to 0.99. mode: "refine" adds noise up to alpha_bar = 1 - sigma, and the teacher denoises from there;
    "regenerate": the teacher starts over from the sample's initial noise. sigma: in (0, 1). None: as in the file.
    Spelled "cascade:FILE,share=0.3,mode=refine,sigma=0.5". Raises ValueError for other values.
    """

    path: str
    share: float | None = None
    mode: str | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"a cascade is one of a file that `adadiff distill` wrote, got {self.path!r}")
        if self.share is not None:
            check_share(self.share)
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode must be {' or '.join(MODES)}, got {self.mode!r}")
        if self.sigma is not None:
            check_sigma(self.sigma)
            if self.mode == "regenerate":
                raise ValueError("sigma is how much noise 'refine' adds; mode 'regenerate' takes none")

    def __str__(self) -> str:
        options = {"share": self.share, "mode": self.mode, "sigma": self.sigma}
        given = [f",{name}={value}" for name, value in options.items() if value is not None]
        return f"cascade:{quoted(self.path)}{''.join(given)}"


def check_share(share: object) -> None:
    if not isinstance(share, Real) or not _is_share(share):
        raise ValueError(f"share must be 0, 1, or from {LEAST_SHARE:g} to {1 - LEAST_SHARE:g}, got {share!r}")


def check_sigma(sigma: object) -> None:
    if not isinstance(sigma, Real) or isinstance(sigma, bool) or not 0 < float(sigma) < 1:
        raise ValueError(f"sigma must lie between 0 and 1, got {sigma!r}")


def _is_share(share: Real) -> bool:
    value = float(share)
    return not isinstance(share, bool) and (value in (0, 1) or LEAST_SHARE <= value <= 1 - LEAST_SHARE)
