"""Grey images of more than 8 bits, as 8: the range of their values is what the file, or the user, says.

A camera's 12 or 14 bits are often kept in the low bits of 16. A TIFF says so by BitsPerSample 12, or by a
MaxSampleValue of 2^b - 1 (any other is the brightest value that happens to be there). A PNG says b in
its sBIT chunk; by the PNG specification its values are then scaled to all 16 bits, but some programs
leave them as they were: no value above 2^b - 1, and bits in use that scaling would have left empty.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image


class OutOfRange(ValueError):
    """A value that needs more bits than the user said."""


class Depth(NamedTuple):
    """Bits that a sample takes in the file; in how many its values are, where it says; and what says so."""

    stored: int = 16
    used: int | None = None
    by: str = ""


def depth(image: Image.Image) -> Depth:
    """Of an image as opened: what PNG keeps is gone once its pixels are loaded."""
    if image.format == "PNG" and (f := getattr(image, "fp", None)) is not None:
        place = f.tell()
        try:
            return _png(f)
        finally:
            f.seek(place)
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        stored, most = max(tags.get(258, (1,))), max(tags.get(281, (0,)))
        if 8 < stored < 16:
            return Depth(stored, stored, "BitsPerSample")
        if 255 < most < 2**stored - 1 and most & (most + 1) == 0:
            return Depth(stored, most.bit_length(), "MaxSampleValue")
        return Depth(stored)
    return Depth() if image.mode.startswith("I") else Depth(8)


def _png(f: io.BufferedIOBase) -> Depth:
    f.seek(8)
    stored, used = 8, None
    while len(head := f.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IHDR":
            stored = f.read(length)[8]
        elif kind == b"sBIT":
            used = max(f.read(min(length, 4)), default=None)
            break
        elif kind == b"IDAT":
            break
        else:
            f.seek(length, io.SEEK_CUR)
        f.seek(4, io.SEEK_CUR)  # the checksum
    return Depth(stored, used if used and 8 < used < stored else None, "sBIT")


def grey(image: Image.Image, found: Depth, bits: int | None) -> Image.Image:
    """A loaded image of integers of more than 8 bits, as "L". Raises OutOfRange, or ValueError where a
    value is above what the file says."""
    values = np.asarray(image).astype(np.int64)  # Pillow's own conversion clips at 255
    most, top = int(values.max()), 65535
    if bits is not None:
        top = 2**bits - 1
        if most > top:
            raise OutOfRange(f"a value of {most}, where bits={bits} allows {top}")
    elif found.used is not None and not (found.by == "sBIT" and _scaled(values, found.used)):
        top = 2**found.used - 1
        if most > top:
            raise ValueError(f"a value of {most}, where {found.by} allows {top}")
    return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))


def _scaled(values: np.ndarray, used: int) -> bool:
    return bool(values.max() >= 2**used) or not (values % 2 ** (16 - used)).any()


def check_colour(image: Image.Image, found: Depth, bits: int | None) -> None:
    """ValueError for a colour image whose values Pillow has lost: it keeps the upper 8 of 16 bits."""
    used = found.used if bits is None else bits
    if found.stored <= 8 or used is None or used == 16:
        return
    if bits is None and found.by == "sBIT":
        if np.asarray(image.convert("RGB")).max() > (2**used - 1) >> 8:
            return  # scaled to 16 bits, as it should be
    raise ValueError(
        f"{used} bits in {found.stored}-bit colour, of which Pillow keeps the upper 8: make it 8-bit first"
    )
