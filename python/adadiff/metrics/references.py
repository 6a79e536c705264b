"""References that generated images are compared with: real images, or statistics of their features."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.numpy_files import npz_headers, read_npz
from .extractors import Extractor, Features
from .frechet import FeatureStatistics
from .images import ImageSet, open_images
from .kernel import mean_within


@dataclass(frozen=True)
class Reference:
    """statistics: for Fréchet distances. features: of real images, float [M, F], for kernel distances, or None."""

    statistics: FeatureStatistics
    features: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> "Reference":
        return cls(FeatureStatistics.of(features), features)

    @cached_property
    def within(self) -> float:
        """See `kernel.mean_within`."""
        return mean_within(self.features)


@dataclass(frozen=True)
class ReferenceFiles:
    """Content of `path`: statistics, images or both, of which headers were checked."""

    path: Path
    statistics: FeatureStatistics | None
    images: ImageSet | None

    def check(self, dims: int, shape: tuple[int, int, int], features: Features) -> None:
        """ValueError if the content does not fit `features`, `dims` of them, of images of this shape."""
        if self.statistics is not None and len(self.statistics.mean) != dims:
            raise ValueError(
                f"{self.path} holds statistics of {len(self.statistics.mean)} features, but {features.name} makes "
                f"{dims}; choose those it was made with"
            )
        if self.images is not None and self.images.shape[1:] != shape[1:]:
            (_, h, w), (_, H, W) = self.images.shape, shape
            raise ValueError(
                f"{self.path} holds images of {h}x{w}, but those to compare are {H}x{W}; bring them to one size"
            )
        if self.images is not None and features.dims(self.images.shape) != dims:
            raise ValueError(f"{self.path} holds images of {self.images.shape[0]} channels, to compare with {shape[0]}")
        if self.images is not None and self.images.count < 2:
            raise ValueError(f"{self.path} holds 1 image; a covariance takes at least 2, better thousands")

    def read(self, extractor: Extractor, progress: bool = False) -> Reference:
        """Extracts features of the images, which takes time, and returns the reference."""
        if self.images is None:
            return Reference(self.statistics)
        reference = Reference.of(extract(extractor, self.images.pieces(progress)))
        return reference if self.statistics is None else Reference(self.statistics, reference.features)


def open_reference(path: str | Path) -> ReferenceFiles:
    """Opens a reference: a .npz file with mu [F] and sigma [F, F] (U-ViT's fid_stats_*.npz, pytorch-fid); one of
    guided-diffusion, which also has images arr_0 (its mu_s and sigma_s are ignored); or anything that `open_images`
    takes.

    With both, statistics are used for Fréchet distances (guided-diffusion's are of more images than the file holds) and
    images for kernel distances. Raises ValueError for anything else.
    """
    path = Path(path)
    if not (path.is_file() and path.suffix == ".npz"):
        return ReferenceFiles(path, None, open_images(path))
    names = set(npz_headers(path))
    has_statistics = {"mu", "sigma"} <= names
    if not has_statistics and "arr_0" not in names:
        held = ", ".join(sorted(names)) or "nothing"
        raise ValueError(f"{path} holds {held}; a reference holds mu and sigma, or images as arr_0")
    statistics = _statistics(path) if has_statistics else None
    return ReferenceFiles(path, statistics, open_images(path) if "arr_0" in names else None)


def _statistics(path: Path) -> FeatureStatistics:
    headers = npz_headers(path)
    mu, sigma = headers["mu"], headers["sigma"]
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or len(mu.shape) != 1 or sigma.shape != 2 * mu.shape:
        raise ValueError(
            f"{path} must hold mu [F] and sigma [F, F] of floats, got {mu.dtype} {list(mu.shape)} and {sigma.dtype} "
            f"{list(sigma.shape)}"
        )
    arrays = read_npz(path, ("mu", "sigma"))
    try:
        mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
        if bool((covariance.diagonal() < 0).any()) or not torch.allclose(covariance, covariance.T, 1e-3, 1e-6):
            raise ValueError("sigma is no covariance: it must be symmetric, with variances >= 0 on its diagonal")
        return FeatureStatistics(mean, covariance, None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@torch.inference_mode()
def extract(extractor: Extractor, pieces: Iterable[Tensor]) -> Tensor:
    """Features [N, F] of pieces of images, float32 [k, C, H, W] each. Autocast is disabled, as its rounding would
    change distances."""

    def one(piece: Tensor) -> Tensor:
        with torch.autocast(piece.device.type, enabled=False):
            return extractor(piece)

    return torch.cat([one(piece) for piece in pieces])
