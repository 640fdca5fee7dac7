"""The child processes that decode: what they give, what becomes of a file that kills one, and what they can still do."""

import fcntl
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from engines.errors import Cancelled, ImageLoadError, ImageTooLarge, ModelError, RunnerDisconnected, VideoLoadError, VideoTooLong
from engines.media import decoder as decoder_module
from engines.media import messages
from engines.media.decoder import Child, Decoder, Limits
from engines.media.shared_frames import sealed
from engines.media.video_reader import open_video
from tests.engines.media.clips import KINDS, grey_clip, write
from tests.patience import PATIENCE_S

LIMITS = (10_000, 60)
"""Pixels and seconds of a video."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Decoder]:
    decoder = Decoder()
    yield decoder
    decoder.close()


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    """One of the test's own, whose children it may kill."""
    decoder = Decoder()
    yield decoder
    decoder.close()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write(tmp_path / "clip.mp4")


def png(height: int = 8, width: int = 8, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), "white").save(buffer, "PNG")
    return buffer.getvalue()


def levels(decoder: Decoder, data: bytes) -> np.ndarray:
    return decoder.picture("stretched", data, 4, 6, 10_000)


def pid(decoder: Decoder) -> int:
    (child,) = decoder._idle
    return child.pid


@pytest.mark.parametrize("name", KINDS)
def test_a_child_gives_the_frames_that_this_process_would_read(shared: Decoder, tmp_path: Path, name: str):
    path = write(tmp_path / name, **KINDS[name])
    with open_video(path, *LIMITS) as here, shared.video(path, *LIMITS) as there:
        assert (there.height, there.width) == (here.height, here.width)
        assert there.at_most(1, 1000) == (here.declared_frames or 1000)
        mine, its = list(here.frames(2, 1000)), [frame.copy() for frame in there.frames(2, 1000)]
        assert there.notes == here.notes
    assert len(its) == len(mine) > 20
    assert all(np.array_equal(one, other) for one, other in zip(mine, its, strict=True))


def test_a_child_is_used_for_file_after_file_whatever_they_hold(decoder: Decoder, clip: Path):
    levels(decoder, png())
    first = pid(decoder)
    for data in (b"text", png()[:40], png(1000, 1000)):
        with pytest.raises(ModelError):
            levels(decoder, data)
    with pytest.raises(VideoTooLong) as error, decoder.video(clip, 10_000, 1.0):
        pass
    assert error.value.ctx == {"max_duration": 1.0, "provided_duration": 2.0}
    with decoder.video(clip, *LIMITS) as video:
        frames = video.frames(1, 3)
        assert len([next(frames) for _ in range(3)]) == 3
        assert video.notes == ()
    assert (levels(decoder, png()) == 255).all()
    assert pid(decoder) == first


@pytest.mark.skipif(sys.platform != "linux", reason="/proc counts the faults; other allocators keep memory in other ways")
def test_a_picture_is_decoded_in_the_memory_of_the_one_before(decoder: Decoder):
    def faults() -> int:
        return int(Path(f"/proc/{pid(decoder)}/stat").read_text().rpartition(")")[2].split()[7])

    data, taken = png(2000, 3000), []
    decoder.picture("cover", data, 64, 64, 6_000_000, min_side=1)
    for _ in range(2):
        before = faults()
        decoder.picture("cover", data, 64, 64, 6_000_000, min_side=1)
        taken.append(faults() - before)
    assert min(taken) < 500  # of 2 microseconds each; 10,000 where the memory is given back meanwhile


def test_several_files_at_once_have_a_child_each(decoder: Decoder, clip: Path):
    with decoder.video(clip, *LIMITS) as one, decoder.video(clip, *LIMITS) as other:
        for frame, same in zip(one.frames(1, 50), other.frames(1, 50), strict=True):
            time.sleep(0.003)  # while the children decode on
            assert np.array_equal(frame, same)
    assert len(decoder._idle) == 2


def test_a_frame_stays_while_it_is_looked_at_and_its_memory_is_used_again(decoder: Decoder, clip: Path, tmp_path: Path):
    large = write(tmp_path / "large.mp4", grey_clip(4, 1600, 1760), size=(1600, 1760))
    for path in (clip, large, clip):
        with open_video(path, 10_000_000, 60) as here, decoder.video(path, 10_000_000, 60) as there:
            places = set[int]()
            for mine, its in zip(here.frames(1, 50), there.frames(1, 50), strict=True):
                time.sleep(0.003)  # the child goes on meanwhile
                assert np.array_equal(mine, its)
                assert not its.flags.writeable
                places.add(its.ctypes.data)
        assert len(places) == 2
    mapped = Path(f"/proc/{pid(decoder)}/maps").read_text()
    assert mapped.count("memfd:frames") == 1  # what one video's large frames needed is given back


@pytest.mark.skipif(sys.platform != "linux", reason="no seals: not verified that a child cannot shrink the memory")
@pytest.mark.parametrize("size", [0, 8192])
def test_memory_of_frames_keeps_its_size_whoever_has_it(size: int):
    """A replica that read beyond its end would die of SIGBUS."""
    with sealed(4096) as descriptor:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_child_that_dies_fails_its_file_and_the_next_file_gets_another(decoder: Decoder, clip: Path, caplog):
    def use(number: int) -> None:
        with decoder.video(clip, *LIMITS) as video:
            for frame in video.frames(1, 50):
                assert frame.shape == (48, 64, 3)
                os.kill(video._child.pid, number)

    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL):
        caplog.clear()
        with pytest.raises(VideoLoadError, match="could not be decoded: its decoder crashed") as error:
            use(number)
        assert (error.value.status, error.value.loc) == (422, ()), number
        assert decoder._idle == [], number
        assert {record.action for record in caplog.records} == {"decoder_died"}, number
        assert (levels(decoder, png()) == 255).all(), number


def test_a_child_that_is_killed_between_files_costs_no_file(decoder: Decoder):
    levels(decoder, png())
    killed = pid(decoder)
    os.kill(killed, signal.SIGKILL)
    os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)  # waits for its end and leaves it to its decoder
    assert (levels(decoder, png()) == 255).all()
    assert pid(decoder) != killed


def test_a_picture_beyond_the_memory_of_a_child_is_refused(decoder: Decoder):
    small = Decoder(Limits(memory_bytes=64 << 20))
    with pytest.raises(ImageLoadError, match="needs more than 64 MB of memory"):
        small.picture("stretched", png(6000, 6000, "L"), 8, 8, 50_000_000)
    assert small.picture("stretched", png(), 8, 8, 50_000_000).shape == (8, 8, 3)
    small.close()


def scans_without_end(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: ten bytes each, for a pass over all of its pixels."""
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last : last + 10] * scans + data[-2:]


@pytest.mark.skipif(sys.platform != "linux", reason="no prlimit: not verified that a child's CPU time is limited")
def test_a_picture_that_takes_too_much_cpu_time_is_refused():
    quick = Decoder(Limits(cpu_s=1))
    began = time.monotonic()
    with pytest.raises(ImageLoadError, match="took more than 1 s of CPU time"):
        quick.picture("stretched", scans_without_end(2000), 8, 8, 50_000_000)
    assert time.monotonic() - began < PATIENCE_S
    for _ in range(3):  # the limit is for each file
        assert quick.picture("stretched", png(), 8, 8, 50_000_000).shape == (8, 8, 3)
    quick.close()


def test_a_call_that_is_stopped_kills_its_child_before_that_has_answered(decoder: Decoder):
    decoder.prepare()
    levels(decoder, png())
    child, asked = pid(decoder), list[float]()
    os.kill(child, signal.SIGSTOP)  # so that it cannot answer before the second question

    def should_stop() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 1

    with pytest.raises(Cancelled):
        decoder.picture("stretched", png(), 4, 6, 10_000, should_stop=should_stop)
    assert not psutil.pid_exists(child)
    assert time.monotonic() - asked[-1] < PATIENCE_S


def test_a_video_that_is_left_early_leaves_no_process(decoder: Decoder, clip: Path):
    with decoder.video(clip, *LIMITS) as video:
        frames = video.frames(1, 50)
        next(frames)
        child = video._child.pid
    assert not psutil.pid_exists(child)
    with pytest.raises(ValueError, match="closed"):
        next(frames)


def test_a_child_ends_with_its_replica(tmp_path: Path):
    code = (
        "import os, signal\nfrom engines.media.decoder import Decoder\n"
        "decoder = Decoder()\ndecoder.picture('stretched', open(0, 'rb').read(), 8, 8, 10_000)\n"
        "print(decoder._idle[0].pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=png(), capture_output=True, check=False)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(PATIENCE_S)


def test_a_decoder_that_cannot_start_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoder_module, "_CODE", "raise SystemExit(1)")
    with pytest.raises(RunnerDisconnected) as error:
        levels(Decoder(), png())
    assert error.value.retryable


PROBES = {
    "a file is read": "open('/etc/passwd').read()",
    "a file is written": "open('/tmp/reelray-probe', 'w').write('x')",
    "a folder is listed": "os.listdir('/')",
    "a TCP socket": "socket.socket()",
    "a UDP socket": "socket.socket(type=socket.SOCK_DGRAM)",
    "a Unix socket": "socket.socket(socket.AF_UNIX)",
    "a program": "os.execv('/bin/true', ['true'])",
    "a process": "os.fork()",
    "a thread": "threading.Thread(target=print).start()",
    "a signal to the replica": "os.kill(os.getppid(), 0)",
    "its own limit": "resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "its handler of the limit": "signal.signal(signal.SIGXCPU, signal.SIG_IGN)",
    "the replica's memory": "libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0) == -1 and fail()",
    "a debugger": "libc.ptrace(16, os.getppid(), 0, 0) == -1 and fail()",
    "a link": "os.symlink('/etc/passwd', '/tmp/reelray-probe')",
    "a shared memory": "os.memfd_create('x')",
}
PROBE = """
import ctypes, os, resource, signal, socket, sys, threading
from engines.media.confinement import confine
libc = ctypes.CDLL(None, use_errno=True)
def fail(): raise PermissionError
WORDS = ("ermission", "not permitted", "not allowed", "start new thread")
print(confine(1 << 28))
for line in sys.argv[1:]:
    try:
        exec(line)
        print("done")
    except (OSError, RuntimeError, ValueError) as exc:
        print("refused" if any(word in repr(exc) for word in WORDS) else exc)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no seccomp: not verified what a decoder cannot do")
def test_a_confined_process_can_do_nothing_but_compute_and_answer():
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *PROBES.values()], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    confined, *outcomes = done.stdout.splitlines()
    assert confined == "seccomp"
    assert dict(zip(PROBES, outcomes, strict=True)) == dict.fromkeys(PROBES, "refused")
    assert not Path("/tmp/reelray-probe").exists()


def test_a_system_that_confines_nothing_is_told_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(decoder_module, "_warned", False)
    monkeypatch.setattr(
        decoder_module,
        "_CODE",
        "from engines.media import confinement\nconfinement._MACHINES.clear()\n" + decoder_module._CODE,
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            levels(decoder, png())
            decoder.close()
    (record,) = caplog.records
    assert record.action == "decoder_unconfined"


def test_nothing_of_our_environment_reaches_a_child(shared: Decoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REELRAY_TEST_SECRET", "hush")
    other = Decoder()
    levels(other, png())
    assert b"hush" not in Path(f"/proc/{pid(other)}/environ").read_bytes()
    other.close()


FORGERIES = {
    "more bytes than asked for": [({}, 10**9)],
    "fewer bytes": [({}, 3)],
    "an error that is none of ours": [({"error": "SystemExit", "message": "x"}, 0)],
    "an error of the service": [({"error": "Unauthorized", "message": "x"}, 0)],
    "no JSON": b"\0\0\0\4" + bytes(8) + b"\xff\xff\xff\xff",
    "JSON of another kind": b"\0\0\0\2" + bytes(8) + b"[]",
    "JSON without end": b"\xff\xff\xff\xff" + bytes(8),
    "nested JSON": b"\0\0\x40\0" + bytes(8) + b"[" * 0x4000,
    "nothing": b"",
}


def test_what_a_child_forges_is_its_death():
    """A child that a file has taken over may say anything."""
    child = Child(Limits())
    child.started()
    child.kill()

    def forge(other: socket.socket, forged: bytes | list[tuple[dict[str, str], int]]) -> None:
        with other, suppress(OSError):
            if isinstance(forged, bytes):
                other.sendall(forged)
            else:
                for fields, size in forged:
                    other.sendall(messages._HEAD.pack(len(str(fields)), size) + str(fields).replace("'", '"').encode())

    def died() -> bool:
        try:
            _, size = child.answer(None)
            child.pixels(size, (4, 6, 3), None)
        except decoder_module.Died:
            return True
        return False

    survived = []
    for name, forged in FORGERIES.items():
        child._socket, other = socket.socketpair()
        threading.Thread(target=forge, args=(other, forged)).start()
        with child._socket:
            if not died():
                survived.append(name)
    assert survived == []


@pytest.mark.parametrize("count", [3, 10**6])
def test_a_child_that_gives_frames_without_end_is_given_up(count: int):
    """It heeds neither how many were asked for nor which the replica is done with."""
    child = Child(Limits())
    child.started()
    child.kill()
    child._socket, other = socket.socketpair()
    child._socket.settimeout(0.05)

    def flood() -> None:
        with suppress(OSError):
            while True:
                messages.send(other, {})

    threading.Thread(target=flood).start()
    video = decoder_module.DecodedVideo(child, {"height": 2, "width": 2, "declared": None}, 10_000, None)
    with child._socket, other, pytest.raises(VideoLoadError, match="could not be decoded"):
        for _ in video.frames(1, count):
            pass


def test_a_video_may_not_claim_more_pixels_than_allowed(shared: Decoder):
    with pytest.raises(decoder_module.Died):
        decoder_module.DecodedVideo(None, {"height": 10**6, "width": 10**6, "declared": None}, 10_000, None)  # type: ignore[arg-type]


def test_a_huge_picture_is_refused_before_it_is_decoded(shared: Decoder):
    with pytest.raises(ImageTooLarge) as error:
        levels(shared, png(200, 200))
    assert error.value.ctx == {"max_height": 100, "max_width": 100}
