import io
import math
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, TiffImagePlugin

from engines.errors import ImageLoadError, ImageTooLarge, ImageTooSmall, UnsupportedImageFormat
from engines.media.image import load_cover, load_image, load_scribble


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def load(data: bytes) -> torch.Tensor:
    return load_image(data, 8, 16, max_pixels=10_000)


def test_an_image_is_stretched_to_the_size_in_unit_range():
    pixels = load(encoded(Image.new("RGB", (30, 70), (255, 0, 51))))
    assert pixels.shape == (3, 8, 16)
    assert pixels[:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (1.0, 1.0, 1.0)),
        ("L", 51, (0.2, 0.2, 0.2)),
        ("LA", (51, 255), (0.2, 0.2, 0.2)),
        ("RGBA", (255, 51, 0, 255), (1.0, 0.2, 0.0)),
        ("CMYK", (0, 255, 255, 0), (1.0, 0.0, 0.0)),
        ("I;16", 13107, (0.2, 0.2, 0.2)),
        ("I", 13107, (0.2, 0.2, 0.2)),
    ],
)
def test_every_colour_mode_becomes_rgb(mode: str, colour: int | tuple[int, ...], expected: tuple[float, ...]):
    pixels = load(encoded(Image.new(mode, (5, 5), colour), "TIFF"))
    assert pixels.shape == (3, 8, 16)
    assert pixels[:, 4, 8].tolist() == pytest.approx(expected, abs=0.01)


def test_floating_point_images_have_no_range_and_are_refused():
    with pytest.raises(UnsupportedImageFormat, match="Floating-point"):
        load(encoded(Image.new("F", (5, 5), 0.5), "TIFF"))


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """An uncompressed grey TIFF of these values, whatever their depth."""
    height, width = values.shape
    bits = tags.pop("bits", values.dtype.itemsize * 8)
    data = values.tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        packed = (pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255)
        data = np.stack(packed, 1).astype(np.uint8).tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: tags.get("photometric", 1), 273: 8, 277: 1, 278: height}
    entries |= {279: len(data), 339: 2 if values.dtype.kind == "i" else 1}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + table + bytes(4)


@pytest.mark.parametrize(
    ("white", "kind", "tags"),
    [
        (252, np.uint32, {}),
        (65535, np.uint32, {}),
        (2**32 - 1, np.uint32, {}),
        (2**31 - 1, np.int32, {}),
        (65535, np.uint16, {}),
        (32767, np.int16, {}),
        (4095, np.uint16, {"bits": 12}),
    ],
)
def test_grey_of_any_integer_depth_spans_black_to_white(white: int, kind: type, tags: dict[str, int]):
    ramp = (np.linspace(0, 1, 16)[None] * white).astype(kind).repeat(8, 0)
    expected = torch.linspace(0, 252 / 255 if white == 252 else 1, 16)
    assert (load(tiff(ramp, **tags))[0, 4] - expected).abs().max() <= 1 / 255
    if kind == np.uint16 and not tags:
        assert (load(tiff(ramp, photometric=0))[0, 4] - (1 - expected)).abs().max() <= 1 / 255, "white may be zero"


def cut_out(mode: str = "RGBA", hidden: tuple[int, int, int] = (255, 0, 255)) -> Image.Image:
    """A red square of 40 pixels in a transparent ground of 60, with a colour under it."""
    image = Image.new("RGBA", (60, 60), (*hidden, 0))
    image.paste((200, 0, 0, 255), (10, 10, 50, 50))
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_what_transparency_hides_is_not_seen_but_grey(kind: str):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = load(encoded(cut_out(), kind, **options))
    assert pixels[:, 0, 0].tolist() == pytest.approx([128 / 255] * 3)
    assert pixels[:, 4, 8].tolist() == pytest.approx([200 / 255, 0, 0], abs=0.01)


def test_a_transparent_colour_hides_too():
    image = Image.new("RGB", (60, 60), (255, 0, 255))
    image.paste((200, 0, 0), (0, 0, 60, 30))
    assert load(encoded(image, transparency=(255, 0, 255)))[:, -1, 8].tolist() == pytest.approx([128 / 255] * 3)


def strokes(colour: tuple[int, int, int], hidden: tuple[int, int, int], ground: int = 0) -> Image.Image:
    image = Image.new("RGBA", (64, 64), (*hidden, ground))
    ImageDraw.Draw(image).line((0, 32, 64, 32), fill=(*colour, 255), width=8)
    return image


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (30, 90, 200)])
@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255), (255, 0, 255)])
def test_strokes_on_a_transparent_ground_are_white_on_black(colour: tuple[int, int, int], hidden: tuple[int, int, int]):
    pixels = load_scribble(encoded(strokes(colour, hidden)), 64, 64, 10_000)
    assert pixels[:, 32].min() == 1
    assert pixels[:, :20].max() == 0


def test_a_scribble_with_a_ground_of_its_own_stays_as_it_is():
    image = strokes((255, 255, 255), (0, 0, 0), ground=255)
    expected = load_image(encoded(image.convert("RGB")), 64, 64, 10_000)
    assert torch.equal(load_scribble(encoded(image), 64, 64, 10_000), expected)
    image.putpixel((0, 0), (255, 0, 255, 0))
    assert load_scribble(encoded(image), 64, 64, 10_000)[:, :20].max() < 0.1


def wide_gamut() -> bytes:
    """An RGB profile with Adobe RGB's primaries, in D50, and gamma 2.2: ICC.1:2010, 8.3."""

    def number(value: float) -> bytes:
        return round(value * 65536).to_bytes(4, signed=True)

    def xyz(x: float, y: float, z: float) -> bytes:
        return b"XYZ " + bytes(4) + number(x) + number(y) + number(z)

    text = b"desc" + bytes(4) + (5).to_bytes(4) + b"wide\0" + bytes(79)
    curve = b"curv" + bytes(4) + (1).to_bytes(4) + (563).to_bytes(2) + bytes(2)
    tags = {
        b"desc": text,
        b"wtpt": xyz(0.9642, 1, 0.8249),
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body, start = len(tags).to_bytes(4), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + (start + len(body)).to_bytes(4) + len(value).to_bytes(4)
        body += value
    head = (start + len(body)).to_bytes(4) + bytes(4) + b"\2\x10\0\0" + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return (head + number(0.9642) + number(1) + number(0.8249)).ljust(128, b"\0") + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_wide_gamut_profile_is_converted(mode: str):
    image = Image.new(mode, (8, 8), (200, 100, 50) if mode == "RGB" else (200, 100, 50, 255))
    red, green, blue = load(encoded(image, icc_profile=wide_gamut()))[:, 4, 8].mul(255).tolist()
    assert (red, green, blue) == pytest.approx((231, 100, 41), abs=6)  # sRGB must go further for the same red
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert torch.equal(load(encoded(image, icc_profile=srgb)), load(encoded(image))), "no level is rounded for nothing"


def turned_exif(tag: int, kind: int, value: bytes) -> bytes:
    """Orientation 6 and one more tag of this kind, with a value of at most four bytes or at the end."""
    entries = sorted([(0x0112, 3, 1, b"\6\0\0\0"), (tag, kind, 1, value if len(value) <= 4 else (38).to_bytes(4, "little"))])
    table = b"".join(
        t.to_bytes(2, "little") + k.to_bytes(2, "little") + n.to_bytes(4, "little") + v.ljust(4, b"\0") for t, k, n, v in entries
    )
    return b"Exif\0\0II*\0\x08\0\0\0\2\0" + table + bytes(4) + (value if len(value) > 4 else b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "extra",
    [
        (0x011A, 2, b"x\0"),  # a resolution as text
        (0x011A, 10, bytes.fromhex("ffffffff00000000")),  # -1/0
        (0x0131, 77, b"?"),
        (0x8769, 4, b"\xff\xff\xff\x7f"),  # a directory far behind the end
        (0x010F, 2, b"12345"),
    ],
)
def test_a_malformed_tag_beside_the_orientation_is_ignored(kind: str, extra: tuple[int, int, bytes]):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    pixels = load(encoded(image, kind, exif=turned_exif(*extra)))
    assert pixels[0, 0].min() > 0.9
    assert pixels[0, -1].max() < 0.1


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    return len(body).to_bytes(4) + kind + body + (zlib.crc32(kind + body) if crc is None else crc).to_bytes(4)


MALFORMED = {
    "orientation of no kind": ("JPEG", b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff"),
    "no Exif at all": ("PNG", chunk(b"eXIf", b"garbage")),
    "a comment's checksum": ("PNG", chunk(b"tEXt", b"a\0b", 1)),
    "a huge comment": ("PNG", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000)))),
    "a profile's compression": ("PNG", chunk(b"iCCP", b"x\0\5abc")),
    "a profile that is none": ("PNG", chunk(b"iCCP", b"x\0\0" + zlib.compress(b"abc"))),
    "a gamma cut off": ("PNG", chunk(b"gAMA", b"x")),
    "a transparency cut off": ("PNG", chunk(b"tRNS", b"x")),
    "JFIF cut off": ("JPEG", b"\xff\xe0\x00\x07JFIF\0"),
    "a profile's numbers": ("JPEG", b"\xff\xe2\x00\x0eICC_PROFILE\0"),
    "Adobe's segment cut off": ("JPEG", b"\xff\xee\x00\x07Adobe"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_no_malformed_metadata_costs_the_picture(name: str):
    kind, part = MALFORMED[name]
    plain = encoded(Image.effect_noise((16, 8), 80).convert("RGB"), kind)
    start = 33 if kind == "PNG" else 2
    assert torch.equal(load(plain[:start] + part + plain[start:]), load(plain))


def test_a_tag_of_a_tiff_that_points_nowhere_costs_neither_picture_nor_orientation():
    plain = Image.new("RGB", (16, 8))
    plain.paste((255, 255, 255), (0, 0, 8, 8))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274], tags[271] = 6, "the maker"
    data = encoded(plain, "TIFF", tiffinfo=tags)
    entry = data.index((271).to_bytes(2, "little") + (2).to_bytes(2, "little"))
    pixels = load(data[: entry + 4] + b"\xff\xff\xff\x0f" + data[entry + 8 :])
    assert pixels[0, 0].min() > 0.9
    assert pixels[0, -1].max() < 0.1


def test_an_image_that_pil_takes_for_a_decompression_bomb_is_too_large():
    header = encoded(Image.new("1", (1, 1)), "PNG")
    bomb = header.replace((1).to_bytes(4) * 2, (20_000).to_bytes(4) * 2)
    bomb = bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4) + bomb[33:]
    with pytest.raises(ImageTooLarge):
        load(bomb)


def test_a_photo_is_turned_upright():
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the left half becomes the upper
    pixels = load(encoded(image, "PNG", exif=exif))
    assert pixels[0, 0].min() > 0.9
    assert pixels[0, -1].max() < 0.1


def test_too_many_pixels_are_refused_before_decoding():
    with pytest.raises(ImageTooLarge) as error:
        load(encoded(Image.new("1", (400, 400))))
    assert error.value.ctx == {"max_height": 100, "max_width": 100}


@pytest.mark.parametrize("data", [b"", b"not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7"])
def test_what_is_no_image_is_refused(data: bytes):
    with pytest.raises(UnsupportedImageFormat):
        load(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_damaged_image_is_an_image_error_and_nothing_else(kind: str, keep: float):
    noise = Image.effect_noise((60, 60), 80).convert("RGB")
    data = encoded(noise, kind)
    with suppress(ImageLoadError, UnsupportedImageFormat):
        assert load(data[: int(len(data) * keep)]).isfinite().all()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


def published_cover(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Resize and centre crop as torchvision does for tensors of 8 bits."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    if image.height / image.width > height / width:
        size = (math.ceil(image.height / image.width * width), width)
    else:
        size = (height, math.ceil(image.width / image.height * height))
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=False, align_corners=False)[0].round()
    top, left = round((size[0] - height) / 2.0), round((size[1] - width) / 2.0)
    return pixels[:, top : top + height, left : left + width]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((64, 64), (128, 64)),
        ((97, 64), (128, 64)),
        ((300, 200), (128, 64)),
        ((200, 300), (128, 64)),
        ((128, 64), (128, 64)),
        ((1024, 577), (192, 128)),
        ((65, 1000), (64, 64)),
        ((1000, 65), (64, 64)),
        ((99, 67), (256, 256)),
    ],
)
def test_the_centre_covers_the_size_as_torchvision_would(source: tuple[int, int], target: tuple[int, int]):
    image = noise(*source)
    pixels = load_cover(encoded(image), *target, max_pixels=1_000_000)
    assert pixels.shape == (3, *target)
    assert pixels.dtype == torch.uint8
    apart = (pixels - published_cover(image, *target)).abs()
    assert apart.max() <= 1, "where a value lies between two levels, the machine's multiply-add decides"
    assert apart.mean() <= 1e-5


def test_the_side_that_sticks_out_is_cut_off_evenly():
    image = Image.new("RGB", (256, 64), (255, 0, 0))
    image.paste((0, 255, 0), (96, 0, 160, 64))
    pixels = load_cover(encoded(image), 64, 64, max_pixels=1_000_000)
    assert (pixels[1] == 255).all()
    assert (pixels[0] == 0).all()


def test_a_very_elongated_image_costs_only_what_its_crop_costs():
    pixels = load_cover(encoded(Image.new("RGB", (100_000, 64), (51, 51, 51))), 512, 256, max_pixels=10_000_000)
    assert pixels.shape == (3, 512, 256)
    assert (pixels == 51).all()


@pytest.mark.parametrize("size", [(63, 64), (64, 63), (1, 1), (2000, 10)])
def test_a_side_below_the_least_is_too_small(size: tuple[int, int]):
    with pytest.raises(ImageTooSmall) as error:
        load_cover(encoded(Image.new("RGB", size)), 128, 64, max_pixels=1_000_000)
    assert error.value.ctx == {"min_height": 64, "min_width": 64}


def test_a_photo_is_turned_upright_before_it_is_cut():
    image = Image.new("RGB", (128, 64))
    image.paste((255, 255, 255), (0, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = load_cover(encoded(image, "PNG", exif=exif), 128, 64, max_pixels=1_000_000)
    assert pixels[:, :64].min() == 255
    assert pixels[:, 64:].max() == 0


def huge_header(kind: str) -> bytes:
    if kind == "BMP":
        data = encoded(Image.new("RGB", (1, 1)), kind)
        return data[:18] + (100_000).to_bytes(4, "little") * 2 + data[26:]
    data = encoded(Image.new("RGB", (1, 1)))
    data = data.replace((1).to_bytes(4) * 2, (100_000).to_bytes(4) * 2)
    return data[:29] + zlib.crc32(data[12:29]).to_bytes(4) + data[33:]


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
@pytest.mark.parametrize("load_it", [load_image, load_cover])
def test_a_header_that_promises_too_many_pixels_is_refused(kind: str, load_it):
    with pytest.raises(ImageTooLarge) as error:
        load_it(huge_header(kind), 64, 64, 1_000_000)
    assert error.value.ctx == {"max_height": 1000, "max_width": 1000}


@pytest.mark.parametrize("data", [b"", b"not an image"])
def test_what_is_no_image_cannot_be_a_cover(data: bytes):
    with pytest.raises(UnsupportedImageFormat):
        load_cover(data, 64, 64, 1_000_000)
