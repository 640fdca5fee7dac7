"""Videos and pictures to read, made when a test asks for them."""

import io
import struct
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

STEP = 5
"""Difference in grey level between one frame of a clip and the next."""


KINDS: dict[str, dict[str, Any]] = {
    "bframes.mp4": {"options": {"bf": "3"}},
    "faststart.mp4": {"container": {"movflags": "faststart"}},
    "fragmented.mp4": {"options": {"g": "10"}, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "quicktime.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "ten_bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "full_chroma.mkv": {"pix_fmt": "yuv444p", "size": (47, 65)},
    "odd.webm": {"codec": "libvpx-vp9", "size": (47, 65), "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp8.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "live.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}, "container": {"live": "1"}},
    "av1.mp4": {"codec": "libsvtav1", "size": (64, 64), "options": {"preset": "12"}},
    "divx.avi": {"codec": "mpeg4", "options": {"bf": "2", "b": "4000000"}},
    "camera.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "loop.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


def grey_clip(num_frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    for index in range(num_frames):
        yield np.full((height, width, 3), index * STEP, np.uint8)


ENCODED: dict[str, bytes] = {}
"""What a clip is -> its file."""


def write(path: Path, frames=None, times=None, size=(48, 64), **kind):
    """Writes a clip, by default of 50 frames and two seconds. times: of the frames, in 25ths of a second.

    kind: as in `KINDS`. Equal clips are encoded once.
    """
    pictures = list(grey_clip(50, *size) if frames is None else frames)
    digest = sha256(b"".join(pixels.tobytes() for pixels in pictures)).hexdigest()
    key = repr((path.suffix, digest, times, size, kind))
    if key not in ENCODED:
        encode(path, pictures, times, size, **kind)
        ENCODED[key] = path.read_bytes()
    path.write_bytes(ENCODED[key])
    return path


def encode(path: Path, frames, times, size, codec="libx264", pix_fmt="yuv420p", options=None, container=None):
    height, width = size
    with av.open(path, "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.codec_context.thread_count = 1  # libvpx's threads wait for each other in a loop: up to 10 s of CPU for 30 frames
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts = times[index]
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def patched(path: Path, old: bytes, new: bytes, after: bytes = b"") -> Path:
    data = path.read_bytes()
    start = data.index(old, data.index(after))
    path.write_bytes(data[:start] + new + data[start + len(old) :])
    return path


def packets_of(data: bytes | Path) -> list[bytes]:
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else data, "r") as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def avi_of(path: Path, codec: str, packets: list[bytes], size: tuple[int, int] = (48, 64)) -> Path:
    """Writes packets to an AVI, which states the size once and accepts any packets."""
    with av.open(path, "w") as output:
        stream: Any = output.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, index, index, True
            output.mux(packet)
    return path


def jpeg(height: int, width: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (80, 80, 80)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def huge(tmp_path: Path, kind: str) -> Path:
    """A small file whose header says up to 100000 by 100000 pixels."""
    if kind == "mp4":
        path = write(tmp_path / "clip.mp4", **KINDS["ten_bit.mp4"])
        return patched(path, struct.pack(">HH", 64, 48), b"\xff\xff\xff\xff", after=b"hev1\0\0\0\0")
    if kind == "mpeg4":  # its demuxer does not report the size, so the decoder refuses
        return write(tmp_path / "clip.mp4", [np.zeros((1024, 1024, 3), np.uint8)], codec="mpeg4", size=(1024, 1024))
    if kind == "h264":  # FFmpeg takes the size from the stream, not from the header
        path = write(tmp_path / "clip.mp4", [np.zeros((1024, 1024, 3), np.uint8)], size=(1024, 1024))
        return patched(path, struct.pack(">HH", 1024, 1024), b"\xff\xff\xff\xff", after=b"avc1\0\0\0\0")
    if kind == "webm":
        return patched(
            write(tmp_path / "clip.webm", **KINDS["vp8.webm"]), b"\xb0\x81\x40\xba\x81\x30", b"\xb0\x81\xff\xba\x81\xff"
        )
    if kind == "avi":
        path = avi_of(tmp_path / "clip.avi", "mjpeg", [jpeg(48, 64)])
        return patched(path, struct.pack("<II", 64, 48), struct.pack("<II", 100_000, 100_000), after=b"strf")
    path = write(tmp_path / "clip.gif", **KINDS["loop.gif"])
    return patched(path, struct.pack("<HH", 64, 48), b"\xff\xff\xff\xff")


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{other}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{other}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><BaseURL>{other}</BaseURL></MPD>',
    "smil": '<smil><body><video src="{other}"/></body></smil>',
}


def refer_to(path: Path, other: Path) -> None:
    """Makes a QuickTime file refer to another file for its samples, by an alias record in place of dref's `url `."""
    name, absolute = other.name.encode(), str(other).encode().ljust(150, b"\0")
    record = bytes(14) + b"\4disk" + bytes(35) + bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16)
    record += struct.pack(">HH", 1, 1) + bytes(16) + struct.pack(">HH", 2, len(absolute)) + absolute + b"\xff\xff\0\0"
    entry = struct.pack(">I", 8 + len(record)) + b"alis" + record
    data = bytearray(path.read_bytes())
    start = data.index(b"dref") + 12
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = data.index(box) - 4
        data[at : at + 4] = struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + len(entry) - 12)
    data[start : start + 12] = entry
    path.write_bytes(data)


def audio_only(path: Path, with_cover: bool = False) -> Path:
    with av.open(path, "w") as output:
        stream = output.add_stream("aac", rate=48_000, layout="mono")
        cover = output.add_stream("mjpeg", rate=1) if with_cover else None
        if cover is not None:
            cover.height, cover.width, cover.pix_fmt, cover.disposition = 48, 64, "yuvj420p", Disposition.attached_pic
            packet = av.Packet(jpeg(48, 64))
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = cover, 0, 0, True
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.float32), format="fltp", layout="mono")
        silence.rate = 48_000
        sound = [*stream.encode(silence), *stream.encode()]
        output.mux([packet, *sound] if cover is not None else sound)
    return path
