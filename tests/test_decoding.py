"""Decoding: every odd kind of image, draft decoding, bombs, and bytes that are broken."""

import io
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fuyu_jax.data.example import BadImageError, open_image
from fuyu_jax.data.example import Image as ExampleImage
from fuyu_jax.decoding import MAX_PIXELS, MAX_SCANS, ImageError, decode_image, image_size

# Where EXIF says that stored row r and column c of an image of h × w are shown: orientation 6 is
# "row 0 is the right-hand side, column 0 is the top", and so on.
SHOWN_AT = {
    1: lambda r, c, h, w: (r, c),
    2: lambda r, c, h, w: (r, w - 1 - c),
    3: lambda r, c, h, w: (h - 1 - r, w - 1 - c),
    4: lambda r, c, h, w: (h - 1 - r, c),
    5: lambda r, c, h, w: (c, r),
    6: lambda r, c, h, w: (c, h - 1 - r),
    7: lambda r, c, h, w: (w - 1 - c, h - 1 - r),
    8: lambda r, c, h, w: (w - 1 - c, r),
}


def encode(image, format="PNG", **options):
    sink = io.BytesIO()
    image.save(sink, format=format, **options)
    return sink.getvalue()


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def shown(pixels, orientation):
    h, w = pixels.shape[:2]
    out = np.zeros((w, h, 3) if orientation >= 5 else (h, w, 3), np.uint8)
    for r in range(h):
        for c in range(w):
            out[SHOWN_AT[orientation](r, c, h, w)] = pixels[r, c]
    return out


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def smooth(height, width):
    """Slow waves: what JPEG keeps nearly unchanged."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(y / 37), np.cos(x / 29), np.sin((x + y) / 53)]
    return (127 + 90 * np.stack(waves, -1)).astype(np.uint8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, extra=b"", after=b""):
    """A PNG made by hand; rows: each with its filter byte. Chunks go before or after the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            extra,
            chunk(b"IDAT", zlib.compress(rows)),
            after,
            chunk(b"IEND", b""),
        ]
    )


GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


# --- Kinds ---


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(format, orientation, tmp_path):
    pixels = noise(5, 9)
    options = {"lossless": True} if format == "WEBP" else {}
    encoded = encode(Image.fromarray(pixels), format, exif=oriented(orientation), **options)
    expected = shown(pixels, orientation)
    np.testing.assert_array_equal(decode_image(encoded), expected)
    path = tmp_path / "image"
    path.write_bytes(encoded)
    assert image_size(encoded) == image_size(path) == image_size(str(path)) == expected.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_of_jpeg(orientation, tmp_path):
    stored = encode(Image.fromarray(smooth(24, 40)), "JPEG", quality=95)
    turned = encode(Image.fromarray(smooth(24, 40)), "JPEG", quality=95, exif=oriented(orientation))
    expected = shown(decode_image(stored), orientation)  # same coefficients, so exactly the same
    np.testing.assert_array_equal(decode_image(turned), expected)
    path = tmp_path / "image"
    path.write_bytes(turned)
    assert image_size(turned) == image_size(path) == expected.shape[:2]


def test_exif_behind_the_pixels_of_a_png_counts():
    exif = oriented(6).tobytes().removeprefix(b"Exif\0\0")
    encoded = png(2, 1, 8, GREY, b"\0\x0a\x14", after=chunk(b"eXIf", exif))
    assert image_size(encoded) == (2, 1)
    np.testing.assert_array_equal(decode_image(encoded)[:, 0, 0], [10, 20])


@pytest.mark.parametrize(
    "exif", [b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"]
)
def test_senseless_exif_is_upright(exif):
    encoded = png(2, 1, 8, GREY, b"\0\x0a\x14", extra=chunk(b"eXIf", exif))
    assert image_size(encoded) == (1, 2)
    assert decode_image(encoded).shape == (1, 2, 3)


def test_a_header_behind_a_long_preamble_is_found(tmp_path):
    encoded = encode(Image.fromarray(smooth(24, 40)), "JPEG", exif=oriented(8))
    filler = b"\xff\xe2" + struct.pack(">H", 60_002) + bytes(60_000)
    long = encoded[:2] + 3 * filler + encoded[2:]  # longer than what is read of a path at first
    path = tmp_path / "long.jpg"
    path.write_bytes(long)
    assert image_size(path) == image_size(long) == (40, 24)
    np.testing.assert_array_equal(decode_image(long), decode_image(encoded))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_jpeg_is_decoded_as_pillow_does(options):
    pixels = smooth(50, 70)
    encoded = encode(Image.fromarray(pixels), "JPEG", quality=95, **options)
    decoded = decode_image(encoded)
    assert image_size(encoded) == (50, 70)
    # Quality 95 rounds the coefficients of these waves to steps of at most ten; most pixels move
    # by one or two, and the colours by some more where chroma is halved.
    assert np.abs(decoded.astype(int) - pixels).mean() < 2
    # Pillow may be built with another libjpeg, whose upsampling of colour differs by a rounding.
    with Image.open(io.BytesIO(encoded)) as image:
        np.testing.assert_allclose(decoded.astype(int), np.asarray(image), atol=4)


def test_grey_jpeg():
    grey = np.full((9, 12), 77, np.uint8)
    decoded = decode_image(encode(Image.fromarray(grey), "JPEG", quality=100))
    assert decoded.shape == (9, 12, 3)
    # One flat value: only the rounding of the DC coefficient (step 1, an eighth of a grey level).
    np.testing.assert_allclose(decoded.astype(int), 77, atol=1)


def test_cmyk_jpeg():
    ink = np.array([[[0, 255, 255, 0], [200, 0, 40, 30]]], np.uint8).repeat(8, 0).repeat(8, 1)
    encoded = encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)
    expected = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255
    # Flat blocks at quality 100: a rounding each of coefficient, transform and product.
    np.testing.assert_allclose(decode_image(encoded), expected, atol=2)
    assert image_size(encoded) == (8, 16)


def test_ycck_jpeg():
    # Stored samples are the inverted inks; marking them as YCCK makes them y, cb, cr and k.
    y, cb, cr, k = 120, 140, 110, 200
    ink = np.full((8, 8, 4), [255 - y, 255 - cb, 255 - cr, 255 - k], np.uint8)
    encoded = encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)
    at = encoded.index(b"Adobe") + 11
    assert encoded[at] == 0
    encoded = encoded[:at] + b"\2" + encoded[at + 1 :]
    red = y + 1.402 * (cr - 128)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    blue = y + 1.772 * (cb - 128)
    expected = (255 - np.array([red, green, blue])) * k / 255
    # As above; a rounding of chroma counts 1.8 times in blue.
    np.testing.assert_allclose(decode_image(encoded), np.broadcast_to(expected, (8, 8, 3)), atol=3)


def test_an_adobe_rgb_jpeg_is_not_taken_for_ycbcr():
    flat = np.full((8, 8, 3), [200, 30, 90], np.uint8)
    encoded = encode(Image.fromarray(flat), "JPEG", quality=100, keep_rgb=True)
    np.testing.assert_allclose(decode_image(encoded).astype(int), flat, atol=1)  # rounding


def test_sixteen_bit_png_keeps_the_upper_byte():
    grey = struct.pack(">4H", 0, 0x00FF, 0x8012, 0xFFFF)
    decoded = decode_image(png(4, 1, 16, GREY, b"\0" + grey))
    np.testing.assert_array_equal(decoded, np.array([[[0], [0], [0x80], [0xFF]]]).repeat(3, 2))
    colour = struct.pack(">6H", 0x12FF, 0x3400, 0x5678, 0xFFFF, 1, 0x0100)
    decoded = decode_image(png(2, 1, 16, RGB, b"\0" + colour))
    np.testing.assert_array_equal(decoded, [[[0x12, 0x34, 0x56], [0xFF, 0, 1]]])
    solid = struct.pack(">2H", 0x12FF, 0xFFFF)
    np.testing.assert_array_equal(decode_image(png(1, 1, 16, GREY_ALPHA, b"\0" + solid)), 0x12)


@pytest.mark.parametrize(("depth", "row"), [(1, b"\x40"), (2, b"\x30"), (4, b"\x0f")])
def test_shallow_grey_png_reaches_white(depth, row):
    decoded = decode_image(png(2, 1, depth, GREY, b"\0" + row))
    np.testing.assert_array_equal(decoded[0, :, 1], [0, 255])


PAIR = chunk(b"PLTE", bytes([9, 8, 7, 200, 100, 50]))


@pytest.mark.parametrize(
    ("width", "depth", "colour", "row", "extra", "expected"),
    [
        (2, 8, PALETTE, b"\0\1", PAIR, [[9, 8, 7], [200, 100, 50]]),
        # the first entry is clear, then half so
        (2, 8, PALETTE, b"\0\1", PAIR + chunk(b"tRNS", b"\0"), [[255] * 3, [200, 100, 50]]),
        (1, 8, PALETTE, b"\1", PAIR + chunk(b"tRNS", b"\xff\x80"), [[227.4, 177.2, 152.1]]),
        # 20 % of the colour and 80 % of white
        (1, 8, GREY_ALPHA, bytes([100, 51]), b"", [[224] * 3]),
        (1, 8, RGB_ALPHA, bytes([100, 0, 255, 51]), b"", [[224, 204, 255]]),
        (1, 8, RGB_ALPHA, bytes([100, 0, 255, 0]), b"", [[255, 255, 255]]),
        # one colour is clear, given at the depth of the file
        (2, 8, GREY, b"\x07\x09", chunk(b"tRNS", b"\0\x07"), [[255] * 3, [9] * 3]),
        (2, 4, GREY, b"\xf3", chunk(b"tRNS", b"\0\3"), [[255] * 3, [255] * 3]),
        (2, 1, GREY, b"\x40", chunk(b"tRNS", b"\0\0"), [[255] * 3, [255] * 3]),
        (2, 16, GREY, b"\1\2\3\4", chunk(b"tRNS", b"\1\2"), [[255] * 3, [3] * 3]),
        (1, 8, RGB, b"\1\2\3", chunk(b"tRNS", b"\0\1\0\2\0\3"), [[255] * 3]),
        (1, 16, RGB, b"\1\2\3\4\5\6", chunk(b"tRNS", b"\1\2\3\4\5\6"), [[255] * 3]),
    ],
)
def test_transparency_is_laid_on_white(width, depth, colour, row, extra, expected):
    decoded = decode_image(png(width, 1, depth, colour, b"\0" + row, extra))
    # Laying in 8 bits rounds once.
    np.testing.assert_allclose(decoded[0], expected, atol=1)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (6, 4), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    encoded = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(decode_image(encoded), np.full((4, 6, 3), [255, 0, 0]))
    assert image_size(encoded) == (4, 6)


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("BMP", "RGB", {}),
        ("BMP", "1", {}),
        ("BMP", "L", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "1", {"compression": "group4"}),
        ("PPM", "RGB", {}),
        ("PNG", "1", {}),
        ("PNG", "P", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_lossless_formats_keep_their_pixels(format, mode, options, tmp_path):
    source = Image.fromarray(noise(7, 11)).convert(mode)
    encoded = encode(source, format, **options)
    expected = np.asarray(source.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encoded), expected)
    path = tmp_path / "image"
    path.write_bytes(encoded)
    assert image_size(encoded) == image_size(path) == (7, 11)


def test_lossy_webp():
    pixels = smooth(40, 60)
    encoded = encode(Image.fromarray(pixels), "WEBP", quality=95)
    assert image_size(encoded) == (40, 60)
    # Chroma is halved and quantised: a few levels on slow waves.
    assert np.abs(decode_image(encoded).astype(int) - pixels).mean() < 4


# --- Draft decoding ---


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize(
    ("at_least", "shrunk"),
    [
        ((25, 38), 8),  # both sides are rounded up: 200 / 8, 300 / 8 = 37.5
        ((25, 39), 4),
        ((26, 10), 4),
        ((10, 75), 4),
        ((51, 75), 2),
        ((100, 150), 2),
        ((101, 150), 1),
        ((200, 300), 1),
        ((999, 999), 1),
        ((0, 0), 8),
    ],
)
def test_drafts_are_the_smallest_that_is_large_enough(at_least, shrunk, options, orientation):
    image = Image.fromarray(smooth(200, 300))
    encoded = encode(image, "JPEG", quality=95, exif=oriented(orientation), **options)
    stored = (-(-200 // shrunk), -(-300 // shrunk))
    turned = orientation >= 5
    draft = decode_image(encoded, at_least[::-1] if turned else at_least)
    assert draft.shape[:2] == (stored[::-1] if turned else stored)
    full = Image.fromarray(decode_image(encoded))
    box = full.resize(draft.shape[1::-1], Image.Resampling.BOX)
    # Scaled IDCT is a box filter but for the high coefficients, of which waves have few. At 1/8 the
    # width is rounded up from 37.5: resize() stretches by 1.3 %, up to half a pixel of the draft,
    # which is 4 pixels of the image, where the waves rise by up to 3 levels a pixel.
    difference = np.abs(draft.astype(int) - np.asarray(box))
    assert difference.max() <= (12 if shrunk == 8 else 4)


def test_drafts_through_pillow_are_large_enough_too():
    ink = Image.fromarray(smooth(200, 300)).convert("CMYK")
    encoded = encode(ink, "JPEG", exif=oriented(8))
    draft = decode_image(encoded, (75, 50))
    assert draft.shape == (75, 50, 3)
    # A tint's mean is kept by any filter; rounding alone moves it by less than a level.
    assert abs(draft.mean() - decode_image(encoded).mean()) < 2
    assert decode_image(encoded, (76, 50)).shape == (150, 100, 3)


def test_other_formats_ignore_at_least():
    pixels = noise(40, 60)
    encoded = encode(Image.fromarray(pixels))
    np.testing.assert_array_equal(decode_image(encoded, (10, 10)), pixels)


def test_an_examples_image_checks_its_size():
    encoded = encode(Image.fromarray(smooth(201, 303)), "JPEG", exif=oriented(6))
    image = open_image(encoded, "photo 3")
    assert (image.height, image.width) == (303, 201)
    assert image.decode().shape == (303, 201, 3)
    assert image.decode(at_least=(70, 40)).shape == (76, 51, 3)
    assert image.decode((400, 400)).shape == (303, 201, 3)
    for at_least in (None, (70, 40)):
        with pytest.raises(BadImageError, match=r"photo 3: decodes to .* header says 201×303"):
            ExampleImage(encoded, 201, 303, "photo 3").decode(at_least)
        with pytest.raises(BadImageError, match=r"photo 3: cannot be decoded .*ends early"):
            ExampleImage(encoded[:-100], 303, 201, "photo 3").decode(at_least)
    with pytest.raises(BadImageError, match="photo 4: cannot be read"):
        open_image(b"no image", "photo 4")


def test_bytes_without_a_name_are_told_by_their_number(tmp_path):
    encoded = encode(Image.fromarray(noise(90, 90)))
    with pytest.raises(BadImageError, match=r"^image of 8000 bytes: cannot be read") as caught:
        open_image(b"\x00" * 8000)
    assert len(str(caught.value)) < 200
    assert open_image(encoded).name == f"of {len(encoded)} bytes"
    with pytest.raises(BadImageError, match=r"^image of 9000 bytes: cannot be decoded") as caught:
        ExampleImage(encoded[:9000], 90, 90).decode()
    assert len(str(caught.value)) < 200
    with pytest.raises(BadImageError, match=rf"^image of {len(encoded)} bytes: decodes to"):
        ExampleImage(encoded, 90, 91).decode()
    with pytest.raises(BadImageError, match=r"nowhere\.png: no such file"):
        open_image(tmp_path / "nowhere.png")


# --- Bombs ---


def gif_of(height, width):
    encoded = encode(Image.new("RGB", (8, 8)), "GIF")
    return encoded[:6] + struct.pack("<HH", width, height) + encoded[10:]


def jpeg_of(height, width):
    encoded = encode(Image.new("RGB", (8, 8)), "JPEG")
    at = encoded.index(b"\xff\xc0") + 5
    return encoded[:at] + struct.pack(">HH", height, width) + encoded[at + 4 :]


def webp_of(height, width):
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + sides + bytes(40)


def bmp_of(height, width):
    encoded = encode(Image.new("RGB", (8, 8)), "BMP")
    return encoded[:18] + struct.pack("<ii", width, height) + encoded[26:]


def png_of(height, width):
    return png(width, height, 8, RGB, b"")


@pytest.mark.parametrize("make", [png_of, jpeg_of, webp_of, gif_of, bmp_of])
def test_too_many_pixels_are_refused_by_the_header(make):
    encoded = make(20_000, 30_000)
    start = time.perf_counter()
    for read in (image_size, decode_image):
        with pytest.raises(ImageError, match=r"20000×30000 pixels|exceeds limit"):
            read(encoded)
    # 600 million pixels take seconds to decode, or only to allocate and clear.
    assert time.perf_counter() - start < 1


def test_the_limit_is_exact_and_can_be_set():
    assert MAX_PIXELS == 120_000_000
    assert image_size(png_of(10_000, 12_000)) == (10_000, 12_000)
    with pytest.raises(ImageError, match="10000×12001 pixels: more than 120,000,000 are refused"):
        image_size(png_of(10_000, 12_001))
    small = encode(Image.new("RGB", (10, 10)))
    assert decode_image(small, max_pixels=100).shape == (10, 10, 3)
    for read in (image_size, decode_image):
        with pytest.raises(ImageError, match="10×10 pixels: more than 99 are refused"):
            read(small, max_pixels=99)


def test_extreme_sides_are_fine_under_the_limit():
    rows = b"\0" + bytes(65_534) + b"\x07"
    decoded = decode_image(png(65_535, 1, 8, GREY, rows))
    assert decoded.shape == (1, 65_535, 3)
    assert decoded[0, -1, 0] == 7
    flat = encode(Image.new("RGB", (1, 65_500), (0, 0, 0)), "JPEG")
    assert decode_image(flat).shape == (65_500, 1, 3)
    assert decode_image(flat, (8_000, 1)).shape == (8_188, 1, 3)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_compressed_chunks_do_not_blow_up(kind):
    bomb = zlib.compress(bytes(200 << 20), 1)
    start = {"zTXt": b"k\0\0", "iTXt": b"k\0\1\0\0\0", "iCCP": b"k\0\0"}[kind]
    encoded = png(1, 1, 8, GREY, b"\0\x07", extra=chunk(kind.encode(), start + bomb))
    assert image_size(encoded) == (1, 1)
    code = (
        "import resource, sys\n"
        "from fuyu_jax.decoding import ImageError, decode_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data = sys.stdin.buffer.read()\n"
        "try: decode_image(data)\n"
        "except ImageError as error: print(error)\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print('KiB grown', grown)\n"
        "assert grown < 100 << 10\n"  # the 200 MiB were never inflated
    )
    done = subprocess.run([sys.executable, "-c", code], input=encoded, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"too large" in done.stdout


def test_a_jpeg_of_very_many_scans_is_refused():
    encoded = encode(Image.fromarray(smooth(64, 64)), "JPEG", progressive=True)
    last = encoded[encoded.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match=f"more than {MAX_SCANS} scans"):
        decode_image(encoded[:-2] + MAX_SCANS * last + b"\xff\xd9")
    behind = encoded + 2 * MAX_SCANS * b"\xff\xda"  # bytes behind the image, as films of phones
    np.testing.assert_array_equal(decode_image(behind), decode_image(encoded))


def test_a_program_is_no_image():
    eps = encode(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(ImageError, match="not an image"):
        decode_image(eps)


# --- Broken bytes ---


@pytest.mark.parametrize(
    "encoded", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"text\n"]
)
def test_what_is_no_image_is_one_line(encoded, capfd):
    for read in (image_size, decode_image):
        with pytest.raises(ImageError, match=r"\A[^\n]+\Z"):
            read(encoded)
    assert capfd.readouterr() == ("", "")


def test_a_missing_path_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        image_size(tmp_path / "none.png")


SAVED = {
    "jpeg": ("JPEG", {"quality": 90}),
    "progressive": ("JPEG", {"quality": 90, "progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"quality": 80}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}),
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("at_least", [None, (8, 8)])
def test_what_is_cut_short_is_an_error(kind, at_least):
    format, options = SAVED[kind]
    encoded = encode(Image.fromarray(noise(32, 48)), format, **options)
    assert decode_image(encoded, at_least).shape[2] == 3
    cuts = np.linspace(1, len(encoded) * 0.95, 40).astype(int)
    for cut in cuts:
        with pytest.raises(ImageError):
            decode_image(encoded[:cut], at_least)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("at_least", [None, (8, 8)])
def test_a_cut_jpeg_is_an_error_to_the_last_byte_and_with_an_end_marker(options, at_least):
    encoded = encode(Image.fromarray(noise(32, 48)), "JPEG", **options)
    for cut in (1, 2):
        with pytest.raises(ImageError):
            decode_image(encoded[:-cut], at_least)
    # Pillow alone takes these: the missing part would be grey.
    for cut in np.linspace(len(encoded) * 0.5, len(encoded) * 0.9, 20).astype(int):
        part = encoded[:cut]
        if "progressive" in options:
            # Whole scans less are a coarser image and no damage; cut within a scan.
            scan = part.rindex(b"\xff\xda")
            if cut - scan < 40:
                continue
        with pytest.raises(ImageError):
            decode_image(part.rstrip(b"\xff") + b"\xff\xd9", at_least)


def test_harmless_oddities_of_jpeg_pass():
    encoded = encode(Image.fromarray(smooth(32, 48)), "JPEG")
    expected = decode_image(encoded)
    extraneous = encoded[:-2] + b"\0\1\2\3\4" + encoded[-2:]  # some cameras write these
    np.testing.assert_array_equal(decode_image(extraneous), expected)
    np.testing.assert_array_equal(decode_image(encoded + b"trailing bytes"), expected)


def test_warnings_and_log_lines_stay_silent():
    """An odd file of each sort that Pillow warns or logs about, in a fresh interpreter."""
    tiff = encode(Image.new("RGB", (8, 8)), "TIFF")
    black = Image.new("RGB", (8, 8))
    mpo = encode(black, "MPO", save_all=True, append_images=[black])
    packed = encode(Image.fromarray(noise(16, 16)), "TIFF", compression="tiff_adobe_deflate")
    files = [
        png_of(10_000, 10_000)[:-20],  # past Pillow's own first limit
        tiff.replace(struct.pack("<HHI", 258, 3, 3), struct.pack("<HHI", 258, 3, 9)),
        tiff[:-40],
        packed[:40] + bytes(40) + packed[80:],  # libtiff prints from C
        mpo[: len(mpo) // 2 + 8],
        mpo.replace(b"MPF\0", b"MPF\0\xff\xff"),
    ]
    code = (
        "import sys\n"
        "from fuyu_jax.decoding import ImageError, decode_image, image_size\n"
        "for data in eval(sys.stdin.read()):\n"
        "    for read in (image_size, decode_image):\n"
        "        try: read(data)\n"
        "        except ImageError: pass\n"
        "print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        input=repr(files),
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_warnings_of_others_are_still_shown_once():
    encoded = png(1, 1, 8, GREY, b"\0\x07")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(5):
            decode_image(encoded)
            warnings.warn("of another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["of another"]


def fuzz_seeds():
    small = Image.fromarray(noise(17, 23))
    half = Image.fromarray(np.dstack([noise(17, 23), noise(17, 23, 1)[..., :1]]), "RGBA")
    exif = oriented(6)
    return [
        encode(small, "JPEG", exif=exif),
        encode(small, "JPEG", progressive=True),
        encode(small.convert("CMYK"), "JPEG"),
        encode(small.convert("L"), "JPEG", restart_marker_blocks=1),
        encode(small, exif=exif),
        encode(half),
        encode(small.convert("P")),
        encode(small.convert("1")),
        encode(Image.fromarray(noise(17, 23)[..., 0].astype(np.uint16) * 257)),
        encode(small, "WEBP", quality=50),
        encode(half, "WEBP", lossless=True, exif=exif),
        encode(small, "WEBP", save_all=True, append_images=[small.rotate(90)]),
    ]


def test_any_bytes_decode_or_raise_the_one_error(capfd):
    rng = np.random.default_rng(7)
    seeds = fuzz_seeds()
    outcomes = {"decoded": 0, "refused": 0}
    slowest = 0.0
    start = time.perf_counter()
    for i in range(3600):
        data = bytearray(seeds[i % len(seeds)])
        if i // len(seeds) % 3 == 0:
            del data[int(rng.integers(len(data))) :]
        if i // len(seeds) % 3 != 0 or rng.random() < 0.3:
            for _ in range(int(rng.integers(1, 5))):
                # Half of the flips go to the first bytes, where the headers are.
                reach = len(data) if rng.random() < 0.5 else min(len(data), 64)
                if reach:
                    data[int(rng.integers(reach))] ^= 1 << int(rng.integers(8))
        data = bytes(data)
        at_least = (3, 5) if i % 2 else None
        # A flipped size may still be under MAX_PIXELS; small limits keep the test quick.
        began = time.perf_counter()
        try:
            pixels = decode_image(data, at_least, max_pixels=1_000_000)
        except ImageError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            height, width = image_size(data)
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3 and pixels.shape[2] == 3
            assert pixels.flags.c_contiguous
            if at_least is None:
                assert pixels.shape[:2] == (height, width)
            else:
                assert min(3, height) <= pixels.shape[0] <= height
                assert min(5, width) <= pixels.shape[1] <= width
            outcomes["decoded"] += 1
        slowest = max(slowest, time.perf_counter() - began)
    # Both happen, or the fuzz tests nothing.
    assert min(outcomes.values()) > 500, outcomes
    assert slowest < 5
    assert time.perf_counter() - start < 15  # takes one
    assert capfd.readouterr() == ("", "")
