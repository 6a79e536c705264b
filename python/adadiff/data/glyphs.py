"""Characters of one font as 32x32 images.

All characters of a font share one scale and one baseline, such that the tallest, the deepest and the widest just fit
between the margins. Each is centred horizontally. They are drawn at four times the size, then averaged over 4x4 pixels.
"""

import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits  # the place of each is its label
SIZE = 32  # pixels
MARGIN = 2  # pixels left free on each side
OVERSAMPLING = 4
NOWHERE = "\U0010fffd"  # a private code point that no font maps: shows a font's glyph for missing characters
EM = 256.0  # pixels, font size at which characters are measured


def open_font(path: Path, size: float) -> ImageFont.FreeTypeFont:
    """Opens a font with Pillow's basic layout, because shaping would depend on further libraries. Raises ValueError for
    a file that FreeType cannot read."""
    try:
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ValueError(f"{path} is no font that can be read: {error}") from error


def draw_font(path: Path, characters: str = CHARACTERS) -> np.ndarray:
    """Images of characters, uint8 [len(characters), 32, 32]: 0 background, 255 ink.

    Scale and baseline are always those of CHARACTERS. Raises ValueError for a file that is no font, that draws nothing
    at all, or whose outlines FreeType refuses.
    """
    try:
        return _draw(path, characters)
    except (OSError, MemoryError, OverflowError) as error:
        raise ValueError(f"{path} cannot be drawn: {error}") from error


def _draw(path: Path, characters: str) -> np.ndarray:
    measured = open_font(path, EM)
    boxes = np.array([measured.getbbox(character, anchor="ls") for character in CHARACTERS], dtype=np.float64)
    inked = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if not inked.any():
        raise ValueError(f"{path} draws nothing for {CHARACTERS[:3]}...")
    left, top, right, bottom = boxes[inked].T
    room = OVERSAMPLING * (SIZE - 2 * MARGIN)
    height = max(bottom.max() - top.min(), 1.0)
    scale = min(room / height, room / (right - left).max())
    font = open_font(path, EM * scale)
    side = OVERSAMPLING * SIZE
    baseline = round((side - scale * height) / 2 - scale * top.min())
    images = np.empty((len(characters), SIZE, SIZE), np.uint8)
    for i, character in enumerate(characters):
        x0, _, x1, _ = font.getbbox(character, anchor="ls")
        canvas = Image.new("L", (side, side))
        ImageDraw.Draw(canvas).text(
            (round((side - (x1 - x0)) / 2 - x0), baseline), character, fill=255, font=font, anchor="ls"
        )
        images[i] = _averaged(np.asarray(canvas))
    return images


def _averaged(canvas: np.ndarray) -> np.ndarray:
    """Means over k x k blocks of a uint8 [k * SIZE, k * SIZE], in integer arithmetic: identical on every machine."""
    k = OVERSAMPLING
    sums = canvas.reshape(SIZE, k, SIZE, k).sum((1, 3), dtype=np.uint32)
    return ((sums + k * k // 2) // (k * k)).astype(np.uint8)
