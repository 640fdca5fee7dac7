import io
import zlib
from contextlib import suppress

import pytest
import torch
from PIL import Image

from engines.errors import ImageLoadError, ImageTooLarge, UnsupportedImageFormat
from engines.media.image import load_image


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


def test_what_pil_takes_for_a_bomb_is_too_large():
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
