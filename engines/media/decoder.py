"""Decodes callers' files in child processes: a file that breaks its decoder fails alone, and the next one gets a new child.

A child is reused between files, because one takes a third of a second to start. It is trusted with nothing: what it answers is
checked for its size and taken for pixels, or for one of our own errors.
"""

import atexit
import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines import errors
from engines.errors import ImageLoadError, ModelError, RunnerDisconnected, VideoLoadError
from engines.media.messages import Closed, fill, receive, send
from engines.media.shared_frames import KEPT_BYTES, SLOTS, Memory, sealed, size_for
from engines.spec import ShouldStop
from engines.stopping import check

logger = logging.getLogger(__name__)

START_S, ANSWER_S = 60.0, 600.0
"""How long a child may take to start, and how long between two answers, in seconds of wall time."""
POLL_S = 0.1
"""How often a call that waits for its child asks whether to stop, in seconds."""
KEPT = 4
"""How many children may be idle: as many as there are calls at once in a replica. Each takes 60 MB; see also `ALLOCATION`."""
MOST_FILES = 1000
"""After so many files a child is replaced, with whatever its libraries have leaked."""
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL")
"""What a child gets of our environment. The rest may hold passwords."""
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
"""For glibc, see mallopt(3): a child keeps up to 256 MB that a picture took, for the next one. By default it gives memory back
to the kernel and takes it again page by page, 27 ms for a picture of 3000x2000. The most pixels that are allowed take 200 MB."""

_ROOT = Path(__file__).parents[2]
_CODE = "from engines.media.child import main; main()"


@dataclass(frozen=True)
class Limits:
    """Of a child. memory_bytes: address space for decoding. cpu_s: CPU seconds for a picture, or between two frames."""

    memory_bytes: int = 3 << 30
    cpu_s: int = 60


class Died(Exception):
    """The child ended before it had answered. The text says why, for the caller."""


class Child:
    """One child process. busy: it has a request whose answer has not ended."""

    def __init__(self, limits: Limits):
        self.limits, self.busy, self.files = limits, False, 0
        self._ready = False
        self._memory: Memory | None = None
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(POLL_S)
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        places = filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))
        environment |= ALLOCATION | {"PYTHONPATH": os.pathsep.join(places)}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # no thread may start later
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, str(theirs.fileno()), str(limits.memory_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        self._deadline = time.monotonic() + START_S
        self.pid = self._process.pid

    def started(self) -> "Child":
        """Returns itself once it can decode. Raises `RunnerDisconnected`."""
        if not self._ready:
            try:
                confined = self.answer(None)[0].get("confined")
            except Died as exc:
                raise RunnerDisconnected from exc
            if confined != "seccomp":
                _warn_once(str(confined))
            self._ready = True
        return self

    def ask(self, request: dict[str, Any], data: bytes = b"", file: int | None = None) -> None:
        """Sends a request, with bytes or an open file. Raises `Died`."""
        self.busy = True
        self._allow()
        try:
            self._socket.settimeout(ANSWER_S)
            send(self._socket, request, data)
            if file is not None:
                socket.send_fds(self._socket, [b"f"], [file])
        except OSError as exc:
            raise self._death() from exc
        finally:
            self._socket.settimeout(POLL_S)

    def answer(self, should_stop: ShouldStop | None) -> tuple[dict[str, Any], int]:
        """The next message, see `receive`. Raises the child's `ModelError`, `Died`, and `Cancelled`."""
        try:
            fields, size = receive(self._socket, lambda: self._waiting(should_stop))
        except Closed as exc:
            raise self._death() from exc
        if "died" in fields:
            if fields["died"] != "memory":
                logger.error("decoding failed: %s", fields.get("traceback"), extra={"action": "decoder_bug"})
                raise Died("its decoder failed")
            raise Died(f"it needs more than {self.limits.memory_bytes >> 20} MB of memory")
        if "error" in fields:
            error = _model_error(fields)
            self.busy = False
            raise error
        self._allow()
        return fields, size

    def pixels(self, size: int, shape: tuple[int, int, int], should_stop: ShouldStop | None) -> NDArray[np.uint8]:
        """The bytes after a message, which must be as many as the shape has. Raises `Died` and `Cancelled`."""
        if size != math.prod(shape):
            raise Died("its decoder failed")
        pixels = np.empty(shape, np.uint8)
        try:
            fill(self._socket, pixels.data.cast("B"), lambda: self._waiting(should_stop))
        except Closed as exc:
            raise self._death() from exc
        return pixels

    def ask_for_frames(self, stride: int, count: int, height: int, width: int) -> NDArray[np.uint8]:
        """Asks for the frames of its video, which have this size in pixels. Returns (SLOTS, height, width, 3), read-only: where
        they will be, in turn. Each stays until `release_frame`. Raises `Died`.
        """
        request = {"stride": stride, "count": count}
        needed = size_for(height, width)
        memory = self._memory
        if memory is None or needed > memory.size:
            size = max(needed, KEPT_BYTES)
            with sealed(size) as descriptor:
                memory = Memory(descriptor, size, writable=False)
                self.ask(request | {"memory": size}, file=descriptor)
            self._memory = memory if size == KEPT_BYTES else self._memory
        else:
            self.ask(request)
        return memory.slots(height, width)

    def release_frame(self) -> None:
        """Lets it use the slot of the oldest frame that it has given. Raises `Died`."""
        try:
            self._socket.sendall(b"f")
        except OSError as exc:
            raise self._death() from exc

    @property
    def alive(self) -> bool:
        """Whether it can be given a file."""
        return self._process.poll() is None and self.files < MOST_FILES

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _waiting(self, should_stop: ShouldStop | None) -> None:
        check(should_stop)
        if time.monotonic() > self._deadline:
            raise Died(f"it took longer than {ANSWER_S:.0f} s")

    def _allow(self) -> None:
        """Gives it the CPU seconds and the time until its next answer. It cannot set its own limit."""
        self._deadline = time.monotonic() + ANSWER_S
        if sys.platform == "linux":
            with suppress(OSError):  # it is dead, and its next answer will say so
                used_s = time.clock_gettime(~self.pid << 3 | 2)  # the clock of another process, clock_getcpuclockid(3)
                _, hard = resource.prlimit(self.pid, resource.RLIMIT_CPU)
                soft = math.ceil(used_s) + self.limits.cpu_s
                soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
                resource.prlimit(self.pid, resource.RLIMIT_CPU, (soft, hard))

    def _death(self) -> Died:
        self._process.kill()  # it may have closed its socket only
        status = self._process.wait()
        if status == -signal.SIGXCPU:
            return Died(f"it took more than {self.limits.cpu_s} s of CPU time")
        logger.error("a decoder died", extra={"action": "decoder_died", "status": status})
        return Died("its decoder crashed")


class Decoder:
    """Children for any number of threads: each call has one to itself."""

    def __init__(self, limits: Limits = Limits()):
        self.limits = limits
        self._idle: list[Child] = []
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Starts a child for the first file, without waiting for it."""
        with self._lock:
            if not self._idle:
                self._idle.append(Child(self.limits))

    def picture(
        self,
        kind: Literal["stretched", "scribble", "cover"],
        data: bytes,
        height: int,
        width: int,
        max_pixels: int,
        *,
        should_stop: ShouldStop | None = None,
        **options: int,
    ) -> NDArray[np.uint8]:
        """(height, width, 3), RGB: what the function `kind` in `picture.py` makes of an image file.

        Raises what that raises, `ImageLoadError` if the child dies of the file, and `Cancelled`.
        """
        request = {"do": "picture", "kind": kind, "height": height, "width": width, "max_pixels": max_pixels, **options}
        with _blamed(ImageLoadError, "image"), self._child() as child:
            child.ask(request, data)
            _, size = child.answer(should_stop)
            pixels = child.pixels(size, (height, width, 3), should_stop)
            child.busy = False
        return pixels

    @contextmanager
    def video(
        self, path: Path, max_pixels: int, max_duration_s: float, should_stop: ShouldStop | None = None
    ) -> Iterator["DecodedVideo"]:
        """See `video_reader.open_video`. Raises what that raises, `VideoLoadError` if the child dies of the file, `Cancelled`."""
        with self._child() as child:
            with _blamed(VideoLoadError, "video"):
                with path.open("rb") as file:
                    child.ask({"do": "video", "max_pixels": max_pixels, "max_duration_s": max_duration_s}, file=file.fileno())
                fields, _ = child.answer(should_stop)
                video = DecodedVideo(child, fields, max_pixels, should_stop)
            try:
                yield video
            finally:
                video.closed = True

    def close(self) -> None:
        """Ends the children that are idle."""
        with self._lock:
            while self._idle:
                self._idle.pop().kill()

    @contextmanager
    def _child(self) -> Iterator[Child]:
        """A child, kept afterwards unless its last answer has not ended: then it died, or nobody wants the rest."""
        child = self._take()
        try:
            yield child
        finally:
            with self._lock:
                kept = not child.busy and child.alive and len(self._idle) < KEPT
                if kept:
                    self._idle.append(child)
            if not kept:
                child.kill()

    def _take(self) -> Child:
        child = None
        with self._lock:
            while self._idle and child is None:
                child = self._idle.pop()
                if not child.alive:  # it was killed meanwhile, not by a file
                    child.kill()
                    child = None
        child = child or Child(self.limits)
        child.files += 1
        try:
            return child.started()
        except BaseException:
            child.kill()
            raise


class DecodedVideo:
    """One video, read once, forwards, in a child. height, width: of the frames as displayed, in pixels."""

    def __init__(self, child: Child, fields: dict[str, Any], max_pixels: int, should_stop: ShouldStop | None):
        self._child, self._should_stop = child, should_stop
        self._notes: tuple[str, ...] = ()
        self._left = self._given = 0
        self.closed = False
        try:
            self.height, self.width = int(fields["height"]), int(fields["width"])
            self._declared = None if fields["declared"] is None else int(fields["declared"])
        except (KeyError, TypeError, ValueError) as exc:
            raise Died("its decoder failed") from exc
        if min(self.height, self.width) < 1 or self.height * self.width > max_pixels:
            raise Died("its decoder failed")

    def frames(self, stride: int, count: int) -> Iterator[NDArray[np.uint8]]:
        """See `VideoReader.frames`. The child decodes the next frame while one is looked at.

        A frame is read-only, and is there until the next one is asked for: its memory is used again.
        """
        with _blamed(VideoLoadError, "video"):
            slots = self._child.ask_for_frames(stride, count, self.height, self.width)
        self._left = count
        while self._next():
            yield slots[(self._given - 1) % SLOTS]

    def at_most(self, stride: int, count: int) -> int:
        """How many frames `frames` will give according to the file's header, or count if it does not say. For progress only."""
        return min(count, -(-self._declared // stride)) if self._declared else count

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know about the frames, once all that were asked for were given. Raises what `frames` raises."""
        if self._child.busy and not self._left:
            self._next()
        return self._notes

    def _next(self) -> bool:
        """Waits for the next frame. False after the last one."""
        if self.closed:
            raise ValueError("The video is closed.")
        with _blamed(VideoLoadError, "video"):
            if self._given:
                self._child.release_frame()
            fields, _ = self._child.answer(self._should_stop)
            if "notes" in fields:
                self._notes = tuple(map(str, fields["notes"]))
                self._child.busy = False
                return False
            if not self._left:
                raise Died("its decoder failed")
            self._left -= 1
            self._given += 1
            return True


@contextmanager
def _blamed(error: type[ModelError], what: str) -> Iterator[None]:
    try:
        yield
    except Died as exc:
        raise error(f"The {what} could not be decoded: {exc}.") from exc


def _model_error(fields: dict[str, Any]) -> ModelError:
    kind = getattr(errors, str(fields["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, ModelError)):
        raise Died("its decoder failed")
    ctx = fields.get("ctx")
    return kind(str(fields.get("message", "")), (), ctx if isinstance(ctx, dict) else {})


def _warn_once(confined: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        missing = "from files" if confined else "from the network and from files"
        logger.warning("the system does not keep decoders %s", missing, extra={"action": "decoder_unconfined"})


_warned = False

DECODER = Decoder()
"""This process's. Its children end with it: their sockets close."""
atexit.register(DECODER.close)
