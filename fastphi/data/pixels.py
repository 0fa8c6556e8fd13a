"""One image, as it is stored or decoded, to uint8 pixels.

`convert` measured on one of 2 cores of a shared Xeon virtual machine, from encoded bytes, in four
runs: 8,000 to 9,100 JPEGs/s of 64x64 (2 kB; 2048 of them), 660 to 790 of 500x375 (76 kB; one, 300
times).
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from fastphi.data.depth import OutOfRange, check_colour, depth, grey
from fastphi.data.source import Encoded, Pixels
from fastphi.support import reading

_ORIENTATION = 0x0112  # EXIF
_SCALED = ("PPM", "JPEG2000")  # whose values Pillow itself scales to 16 bits


class Skipped(Exception):
    """An image that is left out, and why."""


class Options(NamedTuple):
    size: int
    color: bool
    allow_upscale: bool
    bits: int | None = None


@contextlib.contextmanager
def strict_decoding() -> Iterator[None]:
    # Pillow's setting is global, and a program may have asked for truncated files to pass.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata; broken pixels raise
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


@contextlib.contextmanager
def skipping() -> Iterator[None]:
    """What broken bytes make a decoder (or a user's data set) raise, as Skipped."""
    try:
        yield
    except (Skipped, MemoryError, OutOfRange):
        raise
    except Exception as error:
        if reading.of_the_system(error) and not isinstance(error, PermissionError):
            raise  # the system's trouble (a lost disk, too many files), not the image's
        raise Skipped(_reason(error)) from None


def convert(
    payload: Pixels, size: int, color: bool, allow_upscale: bool, bits: int | None = None
) -> np.ndarray:
    """One image as uint8 (size, size, C): upright, cropped to the centre square, area-resampled.

    bits: see `fastphi.data.pack`. Raises Skipped where it cannot be read, is cut short, or is too
    small, OutOfRange where a value needs more than `bits`.
    """
    with skipping(), _opened(payload) as image:
        width, height = image.size
        side = min(width, height)
        if side < size and not allow_upscale:
            raise Skipped(f"too small: {width}x{height}")
        pixels = eight_bit(image, "RGB" if color else "L", bits)
    width, height = pixels.size
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != (size, size):
        # Area resampling is exact for any factor >= 1; below it would only repeat pixels.
        how = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
        pixels = pixels.resize((size, size), how, box=(left, top, left + side, top + side))
    return np.asarray(pixels).reshape(size, size, -1)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unreadable: not an image"  # Pillow's text has a path or an address in it
    if isinstance(error, PermissionError):
        return "unreadable: permission denied"
    text = " ".join(str(error).split())[:300] or type(error).__name__
    cut = isinstance(error, EOFError) or "truncated" in text.lower()
    return f"{'truncated' if cut else 'unreadable'}: {text}"


@contextlib.contextmanager
def _opened(payload: Pixels) -> Iterator[Image.Image]:
    if isinstance(payload, Encoded):
        payload = payload.read()
    if isinstance(payload, Image.Image):
        yield payload  # somebody's own, which stays open
    elif isinstance(payload, np.ndarray):
        yield Image.fromarray(payload[..., 0] if payload.shape[2:] == (1,) else payload)
    else:
        with Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload) as image:
            yield image


def eight_bit(image: Image.Image, mode: str, bits: int | None = None) -> Image.Image:
    """An image of any Pillow mode, upright, in the mode "RGB" or "L"; the one given stays as it is."""
    found = depth(image)
    image.load()
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"{image.mode} pixels have no known range")
    upright = image
    with contextlib.suppress(SyntaxError, ValueError, KeyError, struct.error):
        if image.getexif().get(_ORIENTATION, 1) != 1:  # broken EXIF spoils no good pixels
            upright = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        upright = grey(upright, found, None if image.format in _SCALED else bits)
    else:
        check_colour(image, found, bits)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
    return upright if upright.mode == mode else upright.convert(mode)
