"""A video file of unknown origin to RGB frames, one at a time, with every limit checked before memory is taken.

The container is recognised by its first bytes and its demuxer is fixed, so FFmpeg never guesses: no playlist, no other file and
no URL is ever opened. A file may be refused for what its headers say, but is never accepted for it.
"""

import ctypes
import errno
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from math import cos, radians, sin
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from engines.errors import ImageTooLarge, UnsupportedVideoFormat, VideoLoadError, VideoTooLong

FORMATS = ("AVI", "GIF", "MKV", "MOV", "MP4", "WEBM")
"""The formats that are read. FFmpeg knows 300 more, but every demuxer adds to the attack surface.

A GIF is read whole, as FFmpeg adds up its duration.
"""

DECODERS = ("av1", "gif", "h264", "hevc", "libdav1d", "mjpeg", "mpeg4", "prores", "vp8", "vp9")
"""FFmpeg's names of the decoders that may run. Sound is never decoded."""

_DEMUXERS = "avi,gif,matroska,mov"

_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")
"""Brands of HEIF and AVIF pictures, which use mp4's container: ISO/IEC 23008-12, annex B."""

_ENDS_EARLY_S = 0.5
"""A file may end this many seconds before its declared end: the last frame's duration is often missing, and headers round."""

_MAX_STREAMS = 16
"""Limit of streams of any kind, as each has an index. Above it, Matroska's streams are ignored and other files are refused."""

_MAX_BLOCK = 128 << 20
"""Bytes that FFmpeg may allocate at once: a frame of 44 megapixels in RGB, or the index of five million frames."""

_DAMAGED = "The video is damaged and could not be decoded."

Matrix = tuple[float, float, float, float]
"""a, b, c, d of a display matrix, ISO/IEC 14496-12: x' = a x + c y, y' = b x + d y, in any unit."""


class VideoReader:
    """One video, read once, forwards. `open_video` makes it.

    height, width: of the frames as displayed, in pixels: rotation and mirroring in the file's display matrix are applied,
    its sample aspect ratio is not. packets: how many were decoded so far, one frame each except in unusual files.
    """

    def __init__(self, container: InputContainer, max_pixels: int, max_duration_s: float):
        self.packets = 0
        self._closed = False
        self._container = container
        self._max_pixels = min(max_pixels, _MAX_BLOCK // 3)  # a frame in RGB must fit into one block
        self._stream = _video_stream(container)
        # Matroska declares one end for sound and picture together; FFmpeg sometimes copies it to the streams.
        self._declares_streams = container.format.name != "matroska" and self._stream.duration is not None
        self._declared_end_s = self._check_header(max_duration_s)
        self._reached_s = Fraction(0)
        self._set_up_decoder()
        self._to_rgb = VideoReformatter()
        self._decoding = self._decode()
        first = next(self._decoding, None)
        if first is None:
            raise VideoLoadError("The video holds no frame.")
        self._coded_size = first.width, first.height
        with _translated():
            self._matrix = _display_matrix(first)
        self.height, self.width = (first.width, first.height) if _lies_down(self._matrix) else (first.height, first.width)
        self._frames = chain((first,), self._decoding)

    def frames(self, stride: int, count: int) -> Iterator[NDArray[np.uint8]]:
        """Frames 0, stride, 2 stride, … in the order of display, at most count of them, each (height, width, 3), RGB.

        Call it once. stride, count: at least 1. Stops after the last requested frame: what follows is not decoded, and not read
        except for the decoder's reordering and FFmpeg's buffer. The frames between are decoded, because others depend on them,
        but not converted. A shorter file gives fewer frames. A frame of another size than the first, as in browsers'
        recordings, is scaled to it.

        Raises `ImageTooLarge` at a frame above the limit. Raises `VideoLoadError` if decoding fails, and if the file ends before
        these frames and more than half a second before the end that its header declares. Errors that the decoder conceals
        remain in the frames, as in every player.
        """
        last = (count - 1) * stride
        index = -1
        for index, frame in enumerate(islice(self._frames, last + 1)):
            if index % stride == 0:
                yield self._rgb(frame)
        if self._closed:
            raise ValueError("The video is closed.")
        if index < last and self._declared_end_s is not None and self._reached_s + _ENDS_EARLY_S < self._declared_end_s:
            raise VideoLoadError(
                f"The video is damaged: it ends after {float(self._reached_s):.2f} of {float(self._declared_end_s):.2f} seconds."
            )

    def at_most(self, stride: int, count: int) -> int:
        """How many frames `frames` will give according to the file's header, or count if it does not say. For progress only."""
        rate = self._stream.average_rate
        declared = self._stream.frames or (self._declared_end_s is not None and rate and round(self._declared_end_s * rate))
        return min(count, -(-declared // stride)) if declared else count

    def close(self) -> None:
        """End the demuxer's loop before its container is closed: PyAV 18 would go on reading from a closed one and crash."""
        self._decoding.close()
        self._closed = True

    def _check_header(self, max_duration_s: float) -> Fraction | None:
        """The declared end on the packets' clock, in seconds; None if the file declares none, as in live recordings."""
        stream, container = self._stream, self._container
        if stream.codec_context.width * stream.codec_context.height > self._max_pixels:
            raise self._too_large()
        if self._declares_streams and stream.duration is not None and stream.time_base is not None:
            start, duration = (stream.start_time or 0) * stream.time_base, stream.duration * stream.time_base
        elif container.duration is not None:
            start, duration = Fraction(container.start_time or 0, av.time_base), Fraction(container.duration, av.time_base)
        else:
            return None
        if duration > max_duration_s:
            raise VideoTooLong(
                f"The video lasts {float(duration):.2f} seconds, more than {max_duration_s:g}.",
                (),
                {"max_duration": max_duration_s, "provided_duration": round(float(duration), 3)},
            )
        return start + duration

    def _set_up_decoder(self) -> None:
        context = self._stream.codec_context
        # One thread: each further thread decodes a frame ahead and holds it. One takes 0.12 s for 59 frames of 1080p H.264.
        context.thread_count = 1
        # The decoder checks its own limit before it allocates. It counts padded sizes (1080 lines are 1088 for H.264), so its
        # limit is larger than ours; `_checked` refuses frames in between.
        context.options = {"codec_whitelist": ",".join(DECODERS), "max_pixels": str(2 * self._max_pixels + 65536)}
        if context.name == "h264":
            # Without this a stream that does not state its reorder depth loses frames until the decoder has learnt it.
            context.options["strict"] = "strict"

    def _decode(self) -> Generator[av.VideoFrame, None, None]:
        with _translated():
            for packet in self._container.demux():
                self._note_time(packet)
                if packet.stream_index != self._stream.index or not packet.size:  # no size: a repeated frame (AVI), or the end
                    continue
                if packet.is_corrupt:
                    raise VideoLoadError("The video is damaged: a packet is cut off.")
                self.packets += 1
                yield from self._checked(packet)
            yield from self._checked(None)

    def _checked(self, packet: Any) -> Iterator[av.VideoFrame]:
        """The frames that come out for this packet, or those left at the end for None."""
        context = self._stream.codec_context
        try:
            frames = context.decode(packet)
        except av.error.FFmpegError as exc:
            # After a refused size, H.264's decoder still holds it; the others reset it to 0 and report an invalid argument.
            forgotten = context.width == 0 and isinstance(exc, av.error.ArgumentError)
            if forgotten or context.width * context.height > self._max_pixels:
                raise self._too_large() from exc
            raise
        for frame in frames:
            if frame.width * frame.height > self._max_pixels:
                raise self._too_large()
            if frame.is_corrupt:
                raise VideoLoadError("The video is damaged: a frame could not be decoded.")
            yield frame

    def _note_time(self, packet: Any) -> None:
        """Notes how far the file reaches: its picture stream if the header declares that stream's end, else any stream."""
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None and (packet.stream_index == self._stream.index or not self._declares_streams):
            self._reached_s = max(self._reached_s, (time + (packet.duration or 0)) * packet.time_base)

    def _rgb(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        width, height = self._coded_size
        with _translated():
            pixels = self._to_rgb.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
        return _upright(pixels.astype(np.uint8, copy=False), self._matrix)

    def _too_large(self) -> ImageTooLarge:
        side = int(self._max_pixels**0.5)
        message = f"The video's frames have more than {self._max_pixels} pixels."
        return ImageTooLarge(message, (), {"max_height": side, "max_width": side})


@contextmanager
def open_video(path: Path, max_pixels: int, max_duration_s: float) -> Iterator[VideoReader]:
    """The first video stream of the file that is not a cover picture, with its first frame decoded.

    max_pixels: of one frame. max_duration_s: limit of the duration that the header declares, if it declares one, in seconds.

    Raises `UnsupportedVideoFormat` (ctx supported_formats) for another kind of file, or one without such a stream or codec,
    `ImageTooLarge` (ctx max_height, max_width: of a square at the limit), `VideoTooLong` (ctx max_duration,
    provided_duration) and `VideoLoadError`; all with an empty loc, as in `load_image`.
    """
    with path.open("rb", buffering=0) as file, _open_container(file) as container:
        reader = VideoReader(container, max_pixels, max_duration_s)
        try:
            yield reader
        finally:
            reader.close()


def _open_container(file: BinaryIO) -> InputContainer:
    demuxer = _demuxer(file.read(16))
    if demuxer is None:
        raise _unsupported(f"The file is not a video in one of the formats {', '.join(FORMATS)}.")
    file.seek(0)
    # No decoder may run here. FFmpeg would decode frames to learn more than the header says, before a limit could be checked.
    # It would also trust the frames over the header, and would guess durations.
    options = {"codec_whitelist": "none", "format_whitelist": _DEMUXERS, "max_streams": str(_MAX_STREAMS)}
    with _translated():
        return av.open(file, "r", demuxer, options, metadata_errors="replace", io_open=_open_nothing_else)


def _limit_blocks() -> None:
    """Bound every allocation of PyAV's FFmpeg, process-wide: an mp4 of 3 kB that declares 100 million samples took 2.3 GB.

    PyAV 18 does not expose the call, but its wheels contain the library. A PyAV built against the system's FFmpeg has no such
    bound.
    """
    for library in (Path(av.__file__).parents[1] / "av.libs").glob("libavutil*.so*"):
        ctypes.CDLL(str(library)).av_max_alloc(ctypes.c_size_t(_MAX_BLOCK))


_limit_blocks()


def _demuxer(head: bytes) -> str | None:
    """FFmpeg's name of the demuxer for a file that begins with these 16 bytes; None if it is not served."""
    if head[4:8] == b"ftyp":
        return None if head[8:12] in _STILL_BRANDS else "mov"
    if head[4:8] in (b"free", b"mdat", b"moov", b"skip", b"wide"):  # QuickTime, before it had ftyp
        return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):  # EBML, RFC 8794
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    return "gif" if head.startswith((b"GIF87a", b"GIF89a")) else None


def _video_stream(container: InputContainer) -> VideoStream:
    if not len(container.streams):
        raise VideoLoadError("The video is damaged: its header lists no streams.")
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        raise _unsupported("The file holds no video stream.")
    stream = moving[0]
    if stream.codec_context is None:
        raise VideoLoadError("The video is damaged, or its codec is not known.")
    if stream.codec_context.name not in DECODERS:
        raise _unsupported(f"The codec {stream.codec_context.name} is not served.")
    return stream


def _display_matrix(frame: av.VideoFrame) -> Matrix:
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 fails on side data that is newer than its list, such as Exif; it still gives the angle
        angle = radians(-frame.rotation)
        return cos(angle), sin(angle), -sin(angle), cos(angle)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32, count=5).tolist()
    return a, b, c, d


def _lies_down(matrix: Matrix) -> bool:
    """Whether the display swaps height and width. Other angles are rounded to quarter turns."""
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)


def _upright(pixels: NDArray[np.uint8], matrix: Matrix) -> NDArray[np.uint8]:
    across, down = matrix[0], matrix[3]
    if _lies_down(matrix):
        pixels = pixels.transpose(1, 0, 2)  # (W, H, 3)
        across, down = matrix[2], matrix[1]
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


@contextmanager
def _translated() -> Iterator[None]:
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


def _open_nothing_else(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise ValueError(f"A video file asked for {url!r}.")


def _unsupported(message: str) -> UnsupportedVideoFormat:
    return UnsupportedVideoFormat(message, (), {"supported_formats": list(FORMATS)})
