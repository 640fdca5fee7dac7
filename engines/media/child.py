"""The process that decodes what callers send, file after file, so that a decoder's memory bug is not a replica's.

It is given each file as bytes or as an open descriptor, and can open none. It has no part of the replica's memory, environment
or weights. `decoder.py` is the other end of its socket.
"""

import io
import os
import socket
import sys
import traceback
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from engines.errors import ModelError
from engines.media import picture
from engines.media.confinement import confine
from engines.media.messages import Closed, fill, receive, send
from engines.media.shared_frames import KEPT_BYTES, SLOTS, Memory
from engines.media.video_reader import reading

MAX_PIXELS = 1000
"""Of the files in `warm_up`."""

_PICTURES = (("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG", "RGB"), ("GIF", "P"), ("TIFF", "I"), ("WEBP", "RGBA"), ("BMP", "1"))


def main() -> None:
    """Serves the socket in argument 1 until it is closed. Argument 2: bytes of memory for decoding."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    warm_up()
    send(connection, {"confined": confine(int(sys.argv[2]))})
    try:
        while _answer(connection):
            pass
    except (Closed, OSError):  # the replica is gone, or no longer wants the answer
        pass
    os._exit(0)  # nothing is left to do, and the usual way would look for files


def warm_up() -> None:
    """Loads what the libraries load at their first use: later no file can be opened."""
    Image.init()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"sRGB", b"test")
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, mode in _PICTURES:
        buffer = io.BytesIO()
        options: dict[str, Any] = {"icc_profile": profile, "exif": exif} if kind == "JPEG" else {}
        Image.new(mode, (9, 8)).save(buffer, kind, **options)
        picture.scribble(buffer.getvalue(), 4, 4, MAX_PIXELS)
        picture.cover(buffer.getvalue(), 4, 4, MAX_PIXELS, 1)
    for kind, codec in (("mp4", "mpeg4"), ("matroska", "mjpeg")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", kind) as output:
            stream: Any = output.add_stream(codec, rate=25)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p" if codec == "mpeg4" else "yuvj420p"
            output.mux([*stream.encode(av.VideoFrame(16, 16, stream.pix_fmt)), *stream.encode()])
        buffer.seek(0)
        with reading(buffer, MAX_PIXELS, 60) as video:
            next(video.frames(1, 1))


def _answer(connection: socket.socket) -> bool:
    """Answers one request. False if this process should not be used again."""
    request, size = receive(connection)
    try:
        if request.pop("do") == "video":
            with os.fdopen(_descriptor(connection), "rb", buffering=0) as file:
                _video(connection, file, request["max_pixels"], request["max_duration_s"])
        else:
            data = bytearray(size)
            fill(connection, memoryview(data))
            _picture(connection, bytes(data), **request)
    except ModelError as exc:
        send(connection, {"error": type(exc).__name__, "message": exc.message, "ctx": exc.ctx})
    except MemoryError:
        send(connection, {"died": "memory"})
        return False
    except (Closed, ConnectionError):
        raise
    except Exception:
        send(connection, {"died": "bug", "traceback": traceback.format_exc()[-4000:]})
        return False
    return True


def _picture(connection: socket.socket, data: bytes, kind: str, **options: int) -> None:
    pixels = getattr(picture, kind)(data, **options)
    send(connection, {}, np.ascontiguousarray(pixels).data.cast("B"))


def _video(connection: socket.socket, file: Any, max_pixels: int, max_duration_s: float) -> None:
    with reading(file, max_pixels, max_duration_s) as video:
        send(connection, {"height": video.height, "width": video.width, "declared": video.declared_frames})
        asked, _ = receive(connection)
        slots = _Slots(connection, asked.get("memory"), video.height, video.width)
        try:
            for _ in video.frames(asked["stride"], asked["count"], slots.free):
                send(connection, {})
        finally:
            slots.wait_for_all()
        send(connection, {"notes": video.notes})


class _Slots:
    """Where frames are put for the replica, which says of each when it is done with it."""

    kept: Memory | None = None

    def __init__(self, connection: socket.socket, size: int | None, height: int, width: int):
        """size: of new memory, which comes with the request, in bytes. None: the memory that was kept is used."""
        memory = self.kept
        if size is not None:
            descriptor = _descriptor(connection)
            memory = Memory(descriptor, size, writable=True)
            os.close(descriptor)
            if size == KEPT_BYTES:
                _Slots.kept = memory
        assert memory is not None
        self._connection, self._slots = connection, memory.slots(height, width)
        self._given = self._returned = 0

    def free(self) -> NDArray[np.uint8]:
        """(height, width, 3): for the next frame."""
        if self._given - self._returned == SLOTS:
            self._wait(1)
        self._given += 1
        return self._slots[(self._given - 1) % SLOTS]

    def wait_for_all(self) -> None:
        self._wait(self._given - self._returned)

    def _wait(self, frames: int) -> None:
        fill(self._connection, memoryview(bytearray(frames)))
        self._returned += frames


def _descriptor(connection: socket.socket) -> int:
    _, (descriptor, *_), _, _ = socket.recv_fds(connection, 1, 1)
    return descriptor


if __name__ == "__main__":
    main()
