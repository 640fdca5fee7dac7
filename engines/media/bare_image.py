"""An image file without what only describes the picture: for files whose metadata is malformed and whose pixels are not.

Pillow gives up a file for a wrong checksum of a comment, or for a colour profile that is cut off. Browsers ignore both.
"""

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PICTURE = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_IF_INTACT = (b"tRNS", b"eXIf")
_PNG_COLOUR_TYPE = 25  # place of that byte
_PNG_KEY_BYTES = {0: 2, 2: 6}
"""Size of a transparent colour, by colour type: grey, RGB. A palette's transparency has any size."""

_JPEG = b"\xff\xd8\xff"
_JPEG_METADATA = {0xE0, *range(0xE2, 0xF0), 0xFE}
"""APP0 to APP15, and comments: ITU-T T.81, table B.1. APP1 stays, as Exif in it may say which side is up."""
_JPEG_ADOBE, _JPEG_SCAN = 0xEE, 0xDA

_TIFF = {b"II*\0": "<", b"MM\0*": ">"}
_TIFF_PICTURE = {*range(254, 267), 273, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 338, 339, 347, *range(529, 533)}
"""Tags that decode a picture. TIFF 6.0, appendix A."""
_TIFF_ORIENTATION = (274, 3, 1)  # tag, type, count


def without_metadata(data: bytes) -> bytes | None:
    """The file with the parts that its picture needs; None for another format than PNG, JPEG and TIFF, or without metadata."""
    try:
        if data.startswith(_PNG):
            bare = _PNG + b"".join(_png_chunks(data))
        elif data.startswith(_JPEG):
            bare = data[:2] + b"".join(_jpeg_segments(data))
        elif data[:4] in _TIFF:
            bare = _bare_tiff(data, _TIFF[data[:4]])
        else:
            return None
    except (struct.error, IndexError):  # the file ends within its structure
        return None
    return None if bare == data else bare


def _png_chunks(data: bytes) -> Iterator[bytes]:
    at = len(_PNG)
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body, crc = data[at + 4 : at + 8], data[at + 4 : at + 8 + size], data[at + 8 + size : at + 12 + size]
        intact = crc == struct.pack(">I", zlib.crc32(body))
        if kind == b"tRNS" and size < _PNG_KEY_BYTES.get(data[_PNG_COLOUR_TYPE], 1):
            intact = False
        if kind in _PNG_PICTURE or (kind in _PNG_IF_INTACT and intact):
            yield data[at : at + 12 + size]
        at += 12 + size


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    at = 2
    while data[at + 1] != _JPEG_SCAN:
        marker, (size,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
        if marker not in _JPEG_METADATA or (marker == _JPEG_ADOBE and size >= 14):  # it names the colour space
            yield data[at : at + 2 + size]
        at += 2 + size
    yield data[at:]


def _bare_tiff(data: bytes, order: str) -> bytes:
    """The first picture's other tags become one private byte each, in place, as everything else lies at fixed offsets."""
    bare = bytearray(data)
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, values = struct.unpack_from(order + "HHI", data, entry)
        if tag not in _TIFF_PICTURE and (tag, kind, values) != _TIFF_ORIENTATION:
            struct.pack_into(order + "HHI4x", bare, entry, 65000, 1, 1)
    return bytes(bare)
