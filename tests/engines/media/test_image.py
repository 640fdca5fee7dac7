import io
import math
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from engines.errors import ImageLoadError, ImageTooLarge, ImageTooSmall, UnsupportedImageFormat
from engines.media.image import load_cover, load_image


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
        ("LA", (51, 0), (0.2, 0.2, 0.2)),
        ("RGBA", (255, 51, 0, 0), (1.0, 0.2, 0.0)),
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
    """Resize and centre crop as torchvision does for tensors, but in double precision and without its rounding to 8 bits."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 255.0
    if image.height / image.width > height / width:
        size = (math.ceil(image.height / image.width * width), width)
    else:
        size = (height, math.ceil(image.width / image.height * height))
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=False, align_corners=False)[0]
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
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, published_cover(image, *target).float(), atol=1e-6, rtol=0)


def test_the_side_that_sticks_out_is_cut_off_evenly():
    image = Image.new("RGB", (256, 64), (255, 0, 0))
    image.paste((0, 255, 0), (96, 0, 160, 64))
    pixels = load_cover(encoded(image), 64, 64, max_pixels=1_000_000)
    assert (pixels[1] == 1).all()
    assert (pixels[0] == 0).all()


def test_a_very_elongated_image_costs_only_what_its_crop_costs():
    pixels = load_cover(encoded(Image.new("RGB", (100_000, 64), (51, 51, 51))), 512, 256, max_pixels=10_000_000)
    assert pixels.shape == (3, 512, 256)
    assert pixels.mean().item() == pytest.approx(0.2)


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
    assert pixels[:, :64].min() == 1
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
