"""Feature spaces by name: "digits", "canvases", "letters", "inception:FILE", or the file of a TorchScript module."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..spelling import Entry, Registry
from .canvases import canvas_features
from .features import digits_network
from .letters import letters_features

Extractor = Callable[[Tensor], Tensor]  # images float32 [N, C, H, W] in [-1, 1] -> features [N, F]


@dataclass(frozen=True)
class Features:
    """A named feature extractor. Called with images float32 [N, C, H, W] in [-1, 1]; returns features [N, F]."""

    name: str
    extract: Extractor

    def __call__(self, images: Tensor) -> Tensor:
        return self.extract(images)

    @torch.inference_mode()
    def dims(self, shape: tuple[int, int, int]) -> int:
        """F for images of this shape, found by extracting features of two. Raises ValueError if that fails."""
        tried = torch.zeros(2, *shape, dtype=torch.float32, device="cpu")
        try:
            features = self.extract(tried)
        except (RuntimeError, ValueError, TypeError) as error:
            text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"the features {self.name} do not take images of {'x'.join(map(str, shape))}: {text}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
            made = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"the features {self.name} must be [2, F] for two images, got {made}")
        return features.shape[1]


def _file(path: str) -> Features:
    return Features(path, _torchscript(Path(path)))


def _inception_of(path: str) -> Features:
    if not path:
        raise ValueError("inception needs FILE, the weights of pytorch-fid")
    return Features(f"inception:{path}", _inception(Path(path)))


FEATURES: Registry[Features] = Registry(
    "features",
    (
        Entry("digits", lambda: Features("digits", digits_network().features)),
        Entry("canvases", lambda: Features("canvases", canvas_features)),
        Entry("letters", lambda: Features("letters", letters_features)),
        Entry("inception", _inception_of, "path", path=True, words={"path": "FILE"}),
    ),
    Callable,  # type: ignore[arg-type]  # of images, as Extractor
    also="the file of a TorchScript module",
)


def features_from(text: str) -> Features:
    """The features of that name. Raises ValueError for an unknown name or unusable file, ImportError (with the pip
    command) for Inception without torch-fidelity.

    "inception:FILE": the 2048 Inception features of FID, for images of any size, gray or RGB, which are rounded to 8
    bits and scaled to 299x299 as for the network of 2015-12-05. FILE: its weights,
    pt_inception-2015-12-05-6726825d.pth of pytorch-fid or weights-inception-2015-12-05-6726825d.pth of torch-fidelity.
    A TorchScript file maps images float32 [N, C, H, W] in [-1, 1] to features [N, F]; so does an object of your own
    class, "module:Class".
    """
    if text not in FEATURES.names and Path(text).is_file():
        return _file(text)
    found = FEATURES.read(text)
    return found if isinstance(found, Features) else Features(text, found)


def to_bytes(images: Tensor) -> Tensor:
    """float [N, C, H, W] in [-1, 1] -> uint8, rounded as in a picture file."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _torchscript(path: Path) -> Extractor:
    try:
        module = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"{path} is no TorchScript module that can be read: {str(error).splitlines()[0]}") from error
    return module.eval()


def _inception(path: Path) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("Inception comes with torch-fidelity: pip install 'adadiff_kernels[inception]'") from error
    _check_weights(path)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not hold the weights of the FID Inception: {' '.join(str(error).split())[:300]}"
        ) from error

    def features(images: Tensor) -> Tensor:
        pixels = to_bytes(images)
        return network(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels)[0]

    return features


def _check_weights(path: Path) -> None:
    """ValueError for a file that holds more than tensors, because torch-fidelity unpickles without restrictions."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types
        raise ValueError(f"{path} holds no weights that can be read: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict) or "Mixed_7c.branch_pool.conv.weight" not in weights:
        raise ValueError(
            f"{path} does not hold the weights of the FID Inception, as pytorch-fid's "
            "pt_inception-2015-12-05-6726825d.pth does"
        )
