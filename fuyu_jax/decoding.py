"""Encoded images to upright RGB pixels: JPEG through libjpeg-turbo, all else through Pillow.

Colour profiles are not applied. What decides between the decoders, and what is refused:

* simplejpeg decodes with `strict=True`: it then raises for every warning of libjpeg, also for
  harmless ones ("extraneous bytes before marker", which some cameras leave). Without it, missing
  data would come back as grey. Pillow is lenient the other way about: it notices that bytes ran
  out, but takes a JPEG whose data ends early before a good end marker. So "premature end" from
  simplejpeg is final, and everything else that it refuses is for Pillow to decide.
* Damage that libjpeg can decode around (flipped bits inside a scan) may pass, with wrong pixels.
"""

import contextlib
import ctypes
import io
import logging
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image as PilImage

MAX_PIXELS = 120_000_000
# An honest progressive JPEG has about ten scans; each one costs a pass over all pixels.
MAX_SCANS = 100
# What data sets hold. Left out on purpose: formats that run other programs (EPS) or rare decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

# Pillow's own guard, behind ours: it refuses at twice this many pixels.
PilImage.MAX_IMAGE_PIXELS = MAX_PIXELS
# Without any handler Python prints Pillow's log lines about odd files.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 1 << 16  # bytes of a JPEG file that nearly always reach its first scan
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as `warnings` keeps its filters


class ImageError(ValueError):
    """Bytes that are no image, a broken one, or one of too many pixels; the message is one line."""


def image_size(source: bytes | str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) from a file's header, as it will be shown (EXIF orientation counted in).

    Args:
      source: the file's bytes, or its path (of which no more is read than needed).
      max_pixels: refuses larger images.

    Raises:
      ImageError: not an image, or too large.
      OSError: the path cannot be read.
    """
    if isinstance(source, bytes):
        return _shown_size(io.BytesIO(source), source, max_pixels)
    with open(source, "rb") as file:
        return _shown_size(file, None, max_pixels)


def decode_image(
    encoded: bytes,
    at_least: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    *,
    scratch: bool = False,
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes to RGB, upright; alpha is laid on white, an animation gives its first frame.

    Args:
      encoded: the file's bytes.
      at_least: (height, width) as shown. A JPEG may then come back at 1/2, 1/4 or 1/8 of its size
        (sides rounded up), which is faster, but never smaller than this.
      max_pixels: refuses larger images by their header, before any pixel is decoded.
      scratch: the pixels may lie in a buffer of this thread, which its next such call overwrites;
        saves the first writing of fresh memory, a fifth of decoding.

    Raises:
      ImageError: not an image, broken, cut short, or too large.
    """
    try:
        header = _own_header(io.BytesIO(encoded), encoded)
        if header is None:
            pixels, orientation = _pillow(encoded, None, at_least, max_pixels)
        else:
            height, width, orientation = header
            _check_size(height, width, max_pixels)
            pixels = None
            if encoded.startswith(_JPEG):
                _check_scans(encoded)
                buffer = _scratch(height * width * 3) if scratch else None
                pixels = _turbo(encoded, orientation, at_least, buffer)
            if pixels is None:
                pixels, _ = _pillow(encoded, orientation, at_least, max_pixels)
        return np.ascontiguousarray(_upright(pixels, orientation))
    except Exception as error:  # decoders raise many kinds for broken bytes, SyntaxError too
        raise _as_image_error(error) from None


def _as_image_error(error: Exception) -> ImageError:
    if isinstance(error, ImageError):
        return error
    # Pillow names the memory address of what it was given: no use to anyone.
    text = "not an image" if isinstance(error, PilImage.UnidentifiedImageError) else str(error)
    return ImageError(" ".join(text.split()) or type(error).__name__)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{height}×{width} pixels: both sides must be at least 1")
    if height * width > max_pixels:
        raise ImageError(f"{height}×{width} pixels: more than {max_pixels:,} are refused")


def _shown_size(file: io.BufferedIOBase, encoded: bytes | None, max_pixels: int) -> tuple[int, int]:
    try:
        header = _own_header(file, encoded)
        if header is None:
            file.seek(0)
            with _open(file) as image:
                header = (image.height, image.width, _pillow_orientation(image))
        height, width, orientation = header
        _check_size(height, width, max_pixels)
    except Exception as error:
        raise _as_image_error(error) from None
    return (width, height) if orientation >= 5 else (height, width)


# --- Headers: size as stored and orientation, without Pillow where that is slow or misleading ---


def _own_header(file: io.BufferedIOBase, encoded: bytes | None) -> tuple[int, int, int] | None:
    """(height, width, orientation) of a JPEG, PNG or WebP file; None: Pillow has to say.

    Pillow would decode a whole PNG to look for EXIF behind the pixels, and a whole WebP is read
    to open it.
    """
    head = file.read(33)
    if head.startswith(_JPEG):
        if encoded is None:
            encoded = head + file.read(_HEAD)
            header = _jpeg_header(encoded)
            return header or _jpeg_header(encoded + file.read())
        return _jpeg_header(encoded)
    if head.startswith(_PNG):
        if len(head) < 33 or head[12:16] != b"IHDR":
            raise ImageError("PNG without a header")
        width, height = struct.unpack(">II", head[16:24])
        return height, width, _exif_orientation(_find_chunk(file, 33, b"eXIf"))
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP" and len(head) >= 30:
        return _webp_header(file, head)
    return None


def _jpeg_header(encoded: bytes) -> tuple[int, int, int] | None:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except Exception:  # odd colour spaces give a KeyError
        return None
    return height, width, _jpeg_orientation(encoded)


def _jpeg_segments(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of every segment, up to the head of the first scan."""
    at = 2
    while at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:  # no length follows
            at += 2
            continue
        end = at + 2 + (encoded[at + 2] << 8 | encoded[at + 3])
        yield marker, encoded[at + 4 : end]
        if marker == 0xDA:
            return
        at = end


def _jpeg_orientation(encoded: bytes) -> int:
    """From the first EXIF segment before the first scan."""
    for marker, content in _jpeg_segments(encoded):
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            return _exif_orientation(content)
    return 1


def _webp_header(file: io.BufferedIOBase, head: bytes) -> tuple[int, int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(head[24:27], "little")
        height = 1 + int.from_bytes(head[27:30], "little")
        has_exif = head[20] & 0x08
        exif = _find_chunk(file, 12, b"EXIF") if has_exif else b""
        return height, width, _exif_orientation(exif)
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF), 1
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", head[26:30])
        return height & 0x3FFF, width & 0x3FFF, 1
    return None


def _find_chunk(file: io.BufferedIOBase, at: int, wanted: bytes) -> bytes:
    """The first chunk of a kind in a PNG (eXIf) or WebP (EXIF), or nothing; seeks over others."""
    is_png = wanted == b"eXIf"
    file.seek(at)
    while len(start := file.read(8)) == 8:
        if is_png:
            length, kind = struct.unpack(">I4s", start)
        else:
            kind, length = struct.unpack("<4sI", start)
        if kind == wanted:
            return file.read(min(length, _HEAD))
        if kind == b"IEND":
            break
        # A checksum follows in PNG, filling to an even length in WebP.
        file.seek(length + (4 if is_png else length % 2), io.SEEK_CUR)
    return b""


def _exif_orientation(exif: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 (upright) if there is none or it makes no sense."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, at)
            if tag == 0x0112:
                layout = {1: "B", 3: "H", 4: "I"}[kind]
                (value,) = struct.unpack_from(order + layout, exif, at + 8)
                return value if 1 <= value <= 8 else 1
    except (struct.error, KeyError):
        pass
    return 1


def _upright(
    pixels: UInt8[np.ndarray, "stored_height stored_width 3"], orientation: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Turns and mirrors stored pixels as the orientation (1..8) says; a view."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


# --- JPEG through libjpeg-turbo ---


def _check_scans(encoded: bytes) -> None:
    """Refuses a JPEG of very many scans: kilobytes that would take minutes to decode."""
    components = b""
    for marker, content in _jpeg_segments(encoded):
        if marker in (0xC0, 0xC1):  # sequential
            components = content[5:6]
        elif marker == 0xDA and components and content[:1] == components:
            return  # all in one scan; libjpeg takes no second one
    if encoded.count(b"\xff\xda") <= MAX_SCANS:  # counts thumbnails and films behind the image too
        return
    at, scans = 2, 0
    while (found := _NEXT_MARKER.search(encoded, at)) is not None:
        at = found.start() + 2
        marker = encoded[at - 1]
        if marker == 0xD9:
            return
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            raise ImageError(f"JPEG of more than {MAX_SCANS} scans")
        if marker not in (0x01, 0xD8):
            at += int.from_bytes(encoded[at : at + 2], "big")


def _stored(at_least: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(height, width) as stored, from as shown; libjpeg knows nothing of EXIF."""
    height, width = (max(1, side) for side in at_least)
    return (width, height) if orientation >= 5 else (height, width)


_SCRATCH_BYTES = 1 << 26  # of a thread; larger images get memory of their own
_own = threading.local()


def _scratch(size: int) -> np.ndarray | None:
    """A buffer of this thread of at least so many bytes."""
    if size > _SCRATCH_BYTES:
        return None
    found = getattr(_own, "buffer", None)
    if found is None or found.size < size:
        found = _own.buffer = np.empty(size, np.uint8)
    return found


def _turbo(
    encoded: bytes,
    orientation: int,
    at_least: tuple[int, int] | None,
    buffer: np.ndarray | None,
) -> UInt8[np.ndarray, "stored_height stored_width 3"] | None:
    """Decodes a JPEG as stored; None if Pillow shall decide.

    Raises:
      ImageError: the data ends early.
    """
    low_height = low_width = 0
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
        if space in ("CMYK", "YCCK"):
            return None
        if at_least is not None:
            least = _stored(at_least, orientation)
            # Of libjpeg's eighths only 1/2, 1/4 and 1/8 are fast.
            for s in (8, 4, 2):
                if -(-height // s) >= least[0] and -(-width // s) >= least[1]:
                    low_height, low_width = -(-height // s), -(-width // s)
                    break
        return simplejpeg.decode_jpeg(
            encoded,
            "RGB",
            min_height=low_height,
            min_width=low_width,
            min_factor=2,
            buffer=buffer,
            strict=True,
        )
    except Exception as error:
        if "remature end" in str(error):
            raise ImageError(f"JPEG data ends early ({error})") from None
        return None


# --- Everything else through Pillow ---


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow knows; done once, with it what keeps the decoders quiet."""
    PilImage.init()
    # libtiff prints its errors from C; Pillow raises them all the same.
    with contextlib.suppress(OSError, AttributeError):
        silence = ctypes.CDLL(PilImage.core.__file__).TIFFSetErrorHandler
        silence.argtypes, silence.restype = [ctypes.c_void_p], ctypes.c_void_p
        silence(None)
    return tuple(name for name in FORMATS if name in PilImage.OPEN)


def _open(file: io.BufferedIOBase) -> PilImage.Image:
    # Not catch_warnings(): it is not safe where several threads decode. And not each time: a change
    # of the filters makes Python forget which warnings it has shown.
    if warnings.filters[:1] != [_QUIET]:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    return PilImage.open(file, formats=_formats())


def _pillow_orientation(image: PilImage.Image) -> int:
    """Where `_own_header` gives none; Pillow turns TIFF by itself, its size included."""
    if image.format == "AVIF":  # which has its own turns, not only EXIF
        value = image.getexif().get(0x0112, 1)
        return value if value in range(1, 9) else 1
    if image.format in ("JPEG", "MPO"):
        return _exif_orientation(image.info.get("exif", b""))
    return 1


def _pillow(
    encoded: bytes,
    orientation: int | None,
    at_least: tuple[int, int] | None,
    max_pixels: int,
) -> tuple[UInt8[np.ndarray, "stored_height stored_width 3"], int]:
    """Pixels as stored, and the orientation (found here if it is not given)."""
    with _open(io.BytesIO(encoded)) as image:
        _check_size(image.height, image.width, max_pixels)
        if orientation is None:
            orientation = _pillow_orientation(image)
        if image.format in ("JPEG", "MPO") and at_least is not None:
            image.draft(image.mode, _stored(at_least, orientation)[::-1])
        if image.format == "TIFF":  # a tile is decoded whole, however little of it is shown
            tile = (image.tag_v2.get(tag, 1) for tag in (323, 322))
            _check_size(*tile, max_pixels)
        image.load()
        if image.format == "PNG":
            _mend_transparency(image, depth=encoded[24])
        return rgb_pixels(image), orientation


def _mend_transparency(image: PilImage.Image, depth: int) -> None:
    """Pillow keeps PNG's transparent colour at the file's depth, but the pixels at 8 bits."""
    clear = image.info.get("transparency")
    if image.mode == "L" and isinstance(clear, int) and depth < 8:
        image.info["transparency"] = clear * 255 // ((1 << depth) - 1)
    elif image.mode == "RGB" and isinstance(clear, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def rgb_pixels(image: PilImage.Image) -> UInt8[np.ndarray, "height width 3"]:
    """RGB of a loaded image of any mode; alpha is laid on white, 16 bits keep their upper 8."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image)
        if image.mode.startswith("I;16"):
            upper = (grey >> 8).astype(np.uint8)  # convert() would clip
            clear = image.info.get("transparency")
            if isinstance(clear, int):
                upper[grey == clear] = 255
        else:  # no depth is known: 16 bits if any value needs them
            grey = np.nan_to_num(grey)
            peak = 65535 if grey.max(initial=0) > 255 else 255
            upper = (grey.clip(0, peak) * (255 / peak)).astype(np.uint8)
        return np.repeat(upper[..., None], 3, axis=2)
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PilImage.new("RGBA", image.size, (255, 255, 255, 255))
        image = PilImage.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))
