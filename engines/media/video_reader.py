"""A video file of unknown origin to RGB frames, one at a time, with every limit checked before memory is taken.

A file may be refused for what its headers say, but is never accepted for it. What a damaged file still gives is used: see
`MAX_LOST`.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from math import cos, radians, sin
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from engines.errors import ImageTooLarge, VideoLoadError, VideoTooLong
from engines.media.frame_times import FrameTimes
from engines.media.video_container import DECODERS, MAX_BLOCK, open_container, share_present, translated, video_stream

MAX_LOST = 0.25
"""The largest share of a video that may be lost: of the frames up to the last one used, or of the file. The rest is used, and the
log says so. If more is lost, the result would not be what the caller meant."""

WHOLE = 0.995
"""A file of which this share is there lacks nothing that matters."""

_MAX_STRETCH = 4
"""Pixels wider or higher than this are taken for a mistake in the header."""

_REORDERED, _AHEAD_BYTES = 16, 16 << 20
"""Frames that may come before others that are shown earlier, in H.264 and HEVC; limit of what is read ahead of decoding."""

Matrix = tuple[float, float, float, float]
"""a, b, c, d of a display matrix, ISO/IEC 14496-12: x' = a x + c y, y' = b x + d y, in any unit."""


class VideoReader:
    """One video, read once, forwards. `open_video` makes it.

    height, width: of the frames as displayed, in pixels: sample aspect ratio, rotation and mirroring are applied.
    packets: how many were decoded so far, one frame each except in unusual files.
    """

    def __init__(self, file: BinaryIO, container: InputContainer, max_pixels: int, max_duration_s: float):
        self.packets = self._decoded = self._lost = 0
        self._closed = self._broken = False
        self._file, self._container = file, container
        self._max_pixels = min(max_pixels, MAX_BLOCK // 3)  # a frame in RGB must fit into one block
        self._stream = video_stream(container)
        # Matroska declares one end for sound and picture together; FFmpeg sometimes copies it to the streams.
        self._declares_streams = container.format.name != "matroska" and self._stream.duration is not None
        self._declared_end_s = self._check_header(max_duration_s)
        self._reached_s = Fraction(0)
        self._cut_off = ""
        self._set_up_decoder()
        self._to_rgb = VideoReformatter()
        self._times = FrameTimes(())
        self._packets = self._read()
        self._ahead = deque[Any]()
        self._stamps: list[tuple[Fraction | None, Fraction | None]] = []  # when each picture packet is shown and decoded
        self._decoding = self._decode()
        first = next(self._decoding, None)
        if first is None:
            raise VideoLoadError("The video is damaged: no frame can be decoded." if self._lost else "The video holds no frame.")
        self._size = self._displayed(first)
        with translated():
            self._matrix = _display_matrix(first)
        self.width, self.height = reversed(self._size) if _lies_down(self._matrix) else self._size
        self._frames = chain((first,), self._decoding)

    def frames(self, stride: int, count: int, room: Callable[[], NDArray[np.uint8]] | None = None) -> Iterator[NDArray[np.uint8]]:
        """Frames 0, stride, 2 stride, … in the order of display, at most count of them, each (height, width, 3), RGB.

        If the frames are unevenly spaced in time, these are the frames shown at those multiples of their mean interval, some of
        them perhaps more than once. A frame that is lost is replaced by the one before it.

        Call it once. stride, count: at least 1. room: gives the array into which the next frame is written; each has one of its
        own without it. Stops after the last requested frame: what follows is not decoded, and not read
        except for the decoder's reordering and FFmpeg's buffer. The frames between are decoded, because others
        depend on them, but not converted. A shorter file gives fewer frames. A frame of another size than the first, as in
        browsers' recordings, is scaled to it. Errors that the decoder conceals remain in the frames, as in every player.

        Raises `ImageTooLarge` at a frame above the limit, and `VideoLoadError` if more than `MAX_LOST` is lost.
        """
        self._look_ahead((count - 1) * stride + 1)
        clock = self._stream.time_base or Fraction(0)  # the frames that come out at the end lack it
        done, shown, at = 0, None, Fraction(0)
        for frame in self._frames:
            at = self._times.position(None if frame.pts is None else frame.pts * clock, self._lost > 0)
            while done < count and shown is not None and done * stride < at:
                yield self._rgb(shown, room)
                done += 1
            shown = frame
            if done < count and done * stride == at:
                yield self._rgb(frame, room)
                done += 1
            if done == count:
                break
        else:
            while done < count and shown is not None and done * stride < at + 1:  # the last frame is shown as long as others
                yield self._rgb(shown, room)
                done += 1
        if self._closed:
            raise ValueError("The video is closed.")
        self._check_loss(ended=done < count)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know about the frames that were given."""
        notes = []
        if self._lost:
            lost = f"{self._lost} of {self.packets} frames could not be decoded"
            notes.append(f"the video is damaged: {lost}, and the frame before each is shown longer")
        if self._cut_off:
            notes.append(self._cut_off)
        if self._times.uneven:
            notes.append("the video's frames are unevenly spaced in time: they are taken by time, not by count")
        return tuple(notes)

    @property
    def declared_frames(self) -> int | None:
        """How many frames the file has according to its header; None if it does not say."""
        rate = self._stream.average_rate
        return self._stream.frames or (round(self._declared_end_s * rate) if self._declared_end_s is not None and rate else None)

    def close(self) -> None:
        """End the demuxer's loop before its container is closed: PyAV 18 would go on reading from a closed one and crash."""
        self._decoding.close()
        self._packets.close()
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

    def _read(self) -> Generator[Any, None, None]:
        """The file's packets, until one cannot be read."""
        try:
            for packet in self._container.demux():
                if packet.stream_index == self._stream.index and packet.size:
                    shown, decoded = (None if time is None else time * packet.time_base for time in (packet.pts, packet.dts))
                    self._stamps.append((shown, decoded))
                yield packet
        except av.error.FFmpegError:
            self._broken = True

    def _look_ahead(self, frames: int) -> None:
        """Reads the packets of so many frames, as far as memory allows, to see whether they are evenly spaced in time."""
        read, packet = 0, None
        with translated():
            while len(self._stamps) < frames + _REORDERED and read < _AHEAD_BYTES and (packet := next(self._packets, None)):
                self._ahead.append(packet)
                read += packet.size
        shown = sorted(time for time, _ in self._stamps if time is not None)
        last_decoded = self._stamps[-1][1]
        if (packet is not None or self._broken) and last_decoded is not None:  # of those shown later some may be missing
            shown = [time for time in shown if time <= last_decoded]
        if len(shown) > len(self._stamps) // 2:
            self._times = FrameTimes(shown[:frames])

    def _decode(self) -> Generator[av.VideoFrame, None, None]:
        with translated():
            while packet := self._ahead.popleft() if self._ahead else next(self._packets, None):
                self._note_time(packet)
                if packet.stream_index != self._stream.index or not packet.size:  # no size: a repeated frame (AVI), or the end
                    continue
                self.packets += 1
                if packet.is_corrupt:  # the file ends within it
                    self._lost += 1
                    self._broken = True
                else:
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
            self._lost += 1
            return
        for frame in frames:
            if frame.width * frame.height > self._max_pixels:
                raise self._too_large()
            if frame.is_corrupt:
                self._lost += 1
            else:
                self._decoded += 1
                yield frame

    def _check_loss(self, ended: bool) -> None:
        """ended: the file gave fewer frames than were asked for."""
        if ended and self._lost:  # some decoders also leave out what leans on a lost frame, without an error
            self._lost = max(self._lost, self.packets - self._decoded)
        if self._lost > MAX_LOST * self.packets:
            raise VideoLoadError(f"The video is damaged: {self._lost} of {self.packets} frames could not be decoded.")
        if not ended:
            return
        # A header that promises more seconds or frames than the file holds is no evidence of damage.
        share = share_present(self._file)
        if self._broken and self._declared_end_s:
            share = min(share, float(self._reached_s / self._declared_end_s))
        if share < 1 - MAX_LOST:
            raise VideoLoadError(f"The video is cut off: only {share:.0%} of the file can be read.")
        if share < WHOLE:
            self._cut_off = f"the video is cut off: only {share:.0%} of the file can be read"

    def _note_time(self, packet: Any) -> None:
        """Notes how far the file reaches: its picture stream if the header declares that stream's end, else any stream."""
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None and (packet.stream_index == self._stream.index or not self._declares_streams):
            self._reached_s = max(self._reached_s, (time + (packet.duration or 0)) * packet.time_base)

    def _rgb(self, frame: av.VideoFrame, room: Callable[[], NDArray[np.uint8]] | None) -> NDArray[np.uint8]:
        with translated():
            pixels = self._to_rgb.reformat(frame, *self._size, "rgb24", threads=1).to_ndarray()
        pixels = _upright(pixels.astype(np.uint8, copy=False), self._matrix)
        if room is None:
            return np.ascontiguousarray(pixels)
        written = room()
        written[:] = pixels
        return written

    def _displayed(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Width and height of a frame in display proportions, before it is turned. Its smaller side grows, so nothing is lost."""
        context = self._stream.codec_context
        ratio = float(self._stream.sample_aspect_ratio or context.sample_aspect_ratio or 1)
        if not 1 / _MAX_STRETCH <= ratio <= _MAX_STRETCH:
            ratio = 1.0
        wider, narrower = max(ratio, 1.0), min(ratio, 1.0)
        width, height = round(frame.width * wider), round(frame.height / narrower)
        if width * height > self._max_pixels:
            width, height = round(frame.width * narrower), round(frame.height / wider)
        return max(width, 1), max(height, 1)

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
    with path.open("rb", buffering=0) as file, reading(file, max_pixels, max_duration_s) as reader:
        yield reader


@contextmanager
def reading(file: BinaryIO, max_pixels: int, max_duration_s: float) -> Iterator[VideoReader]:
    """The same for an open file."""
    with open_container(file) as container:
        reader = VideoReader(file, container, max_pixels, max_duration_s)
        try:
            yield reader
        finally:
            reader.close()


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
    """A view."""
    across, down = matrix[0], matrix[3]
    if _lies_down(matrix):
        pixels = pixels.transpose(1, 0, 2)  # (W, H, 3)
        across, down = matrix[2], matrix[1]
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
