"""Opens a video file of unknown origin, without decoding anything.

The container is recognised by its first bytes and its demuxer is fixed, so FFmpeg never guesses: no playlist, no other file and
no URL is ever opened.
"""

import ctypes
import errno
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from engines.errors import UnsupportedVideoFormat, VideoLoadError

FORMATS = ("AVI", "GIF", "MKV", "MOV", "MP4", "WEBM")
"""The formats that are read. FFmpeg knows 300 more, but every demuxer adds to the attack surface.

A GIF is read whole, as FFmpeg adds up its duration.
"""

CODECS = {
    "AV1": ("av1", "libdav1d"),
    "GIF": ("gif",),
    "H.264": ("h264",),
    "HEVC": ("hevc",),
    "Motion JPEG": ("mjpeg",),
    "MPEG-4": ("mpeg4",),
    "ProRes": ("prores",),
    "VP8": ("vp8",),
    "VP9": ("vp9",),
}
"""The codecs that are decoded, with FFmpeg's names of the decoders that may run. Sound is never decoded."""

DECODERS = tuple(name for names in CODECS.values() for name in names)

MAX_BLOCK = 128 << 20
"""Bytes that FFmpeg may allocate at once: a frame of 44 megapixels in RGB, or the index of five million frames."""

_DEMUXERS = "avi,gif,matroska,mov"

_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")
"""Brands of HEIF and AVIF pictures, which use mp4's container: ISO/IEC 23008-12, annex B."""

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
"""The elements of a Matroska file, RFC 8794 and RFC 9559."""

_MAX_STREAMS = 16
"""Limit of streams of any kind, as each has an index. Above it, Matroska's streams are ignored and other files are refused."""

_DAMAGED = "The video is damaged and could not be decoded."


def open_container(file: BinaryIO) -> InputContainer:
    """Raises `UnsupportedVideoFormat` (ctx supported_formats) and `VideoLoadError`."""
    demuxer = _demuxer(file.read(16))
    if demuxer is None:
        raise _unsupported(f"The file is not a video in one of the formats {', '.join(FORMATS)}.")
    file.seek(0)
    # No decoder may run here. FFmpeg would decode frames to learn more than the header says, before a limit could be checked.
    # It would also trust the frames over the header, and would guess durations.
    options = {"codec_whitelist": "none", "format_whitelist": _DEMUXERS, "max_streams": str(_MAX_STREAMS)}
    with translated():
        return av.open(file, "r", demuxer, options, metadata_errors="replace", io_open=_open_nothing_else)


def video_stream(container: InputContainer) -> VideoStream:
    """The first video stream that is not a cover picture. Raises `UnsupportedVideoFormat` and `VideoLoadError`."""
    if not len(container.streams):
        raise VideoLoadError("The video is damaged: its header lists no streams.")
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        raise _unsupported("The file holds no video stream.")
    codec = moving[0].codec_context
    if codec is None:
        raise _unsupported(f"The video's codec is not known. Served are {', '.join(CODECS)}.")
    if codec.name not in DECODERS:
        raise _unsupported(f"The codec {codec.name} is not served. Served are {', '.join(CODECS)}.")
    return moving[0]


def share_present(file: BinaryIO) -> float:
    """How much of the file is there, by the sizes of its outermost parts: other numbers in headers are often wrong.

    1 for a GIF, and for live recordings, which state no size.
    """
    place, size = file.tell(), file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        return min(size / max(_declared_size(file, size), 1), 1.0)
    finally:
        file.seek(place)  # of its other reader, the demuxer


@contextmanager
def translated() -> Iterator[None]:
    """Turns what PyAV raises on files into `VideoLoadError`.

    These are FFmpeg's errors, ValueError (Unicode errors among them), and OverflowError for odd numbers.
    """
    try:
        yield
    except (av.error.FFmpegError, ValueError, ArithmeticError) as exc:
        raise VideoLoadError(_DAMAGED) from exc
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # a fault of our disk, not of the file
            raise
        raise VideoLoadError(_DAMAGED) from exc  # the file made FFmpeg seek to a negative offset


def _limit_blocks() -> None:
    """Bound every allocation of PyAV's FFmpeg, process-wide: an mp4 of 3 kB that declares 100 million samples took 2.3 GB.

    PyAV 18 does not expose the call, but its wheels contain the library. A PyAV built against the system's FFmpeg has no such
    bound.
    """
    for library in (Path(av.__file__).parents[1] / "av.libs").glob("libavutil*.so*"):
        ctypes.CDLL(str(library)).av_max_alloc(ctypes.c_size_t(MAX_BLOCK))


_limit_blocks()


def _demuxer(head: bytes) -> str | None:
    """FFmpeg's name of the demuxer for a file that begins with these 16 bytes; None if it is not served."""
    if head[4:8] == b"ftyp":
        return None if head[8:12] in _STILL_BRANDS else "mov"
    if head[4:8] in (b"free", b"mdat", b"moov", b"skip", b"wide"):  # QuickTime, before it had ftyp
        return "mov"
    if head.startswith(_EBML):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    return "gif" if head.startswith((b"GIF87a", b"GIF89a")) else None


def _declared_size(file: BinaryIO, size: int) -> int:
    """Where the file's last outermost part ends. size: of the file, also the answer if it declares none."""
    head = file.read(64)
    demuxer = _demuxer(head[:16])
    if demuxer == "avi":
        return 8 + int.from_bytes(head[4:8], "little")
    if demuxer == "matroska" and (start := head.find(_SEGMENT) + len(_SEGMENT)) >= len(_SEGMENT):
        length = 9 - head[start].bit_length()  # of the number, whose first bit set says so
        unknown = (1 << 7 * length) - 1
        segment = int.from_bytes(head[start : start + length]) & unknown
        return size if segment == unknown else start + length + segment
    at = 0
    while demuxer == "mov" and at < size:
        file.seek(at)
        box = file.read(16).ljust(16, b"\0")
        (length,) = struct.unpack_from(">I", box)
        if length == 1:  # a longer number follows
            (length,) = struct.unpack_from(">Q", box, 8)
        if length < 8:  # 0: up to the end of the file
            return size
        at += length
    return max(at, size) if demuxer == "mov" else size


def _open_nothing_else(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise ValueError(f"A video file asked for {url!r}.")


def _unsupported(message: str) -> UnsupportedVideoFormat:
    return UnsupportedVideoFormat(message, (), {"supported_formats": list(FORMATS)})
