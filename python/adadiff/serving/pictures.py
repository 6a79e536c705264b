"""Samples as the bytes of PNG files."""

import asyncio
import io
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from ..output.pictures import to_pixels
from .errors import ServiceError
from .served import ServedModel

SMALL = 2**14  # values; smaller images are encoded faster than a thread is started


def png(image: Tensor) -> bytes:
    """Bytes of a PNG file, the same as `adadiff sample` writes. image: float [C, H, W] in [-1, 1], C 1 or 3."""
    buffer = io.BytesIO()
    Image.fromarray(to_pixels(image)).save(buffer, format="PNG")
    return buffer.getvalue()


async def png_of(model: ServedModel, sample: Callable[[], Tensor]) -> bytes:
    """Bytes of a PNG file. sample: returns float [C, H, W], and may wait for a device. Slow work runs in a thread, to
    keep the event loop free.

    Raises ServiceError for NaN and infinity.
    """

    def make() -> bytes:
        value = sample()
        try:
            return png(value if model.decode is None else model.decode(value[None])[0])
        except ValueError as error:  # NaN or infinity, of a sample or of the decoder
            raise ServiceError(500, f"there is no picture of it: {error}", "not_finite") from error

    C, H, W = model.model.backbone.sample_shape
    if model.decode is None and C * H * W <= SMALL and model.model.device.type == "cpu":
        return make()
    return await asyncio.to_thread(make)
