import io
import itertools
import os
import re
import resource
import struct
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from engines.errors import ImageTooLarge, ModelError, UnsupportedVideoFormat, VideoLoadError, VideoTooLong
from engines.media import video_container
from engines.media.video_reader import VideoReader, open_video
from tests.engines.media.clips import (
    KINDS,
    PLAYLISTS,
    STEP,
    audio_only,
    avi_of,
    grey_clip,
    huge,
    jpeg,
    packets_of,
    patched,
    refer_to,
    write,
)


def read(path: Path, stride: int = 1, count: int = 1000, max_duration_s: float = 60) -> list[np.ndarray]:
    with open_video(path, 10_000, max_duration_s) as video:
        frames = list(video.frames(stride, count))
        assert all(frame.shape == (video.height, video.width, 3) and frame.dtype == np.uint8 for frame in frames)
    return frames


def indices(frames: list[np.ndarray]) -> list[int]:
    """The indices of these frames in a grey clip."""
    return [round(float(frame.mean()) / STEP) for frame in frames]


@pytest.mark.parametrize("name", KINDS)
def test_every_served_container_and_codec_gives_its_frames_in_order_of_display(tmp_path: Path, name: str):
    path = write(tmp_path / name, **KINDS[name])
    frames = read(path, stride=3, count=12)
    assert frames[0].shape[:2] == KINDS[name].get("size", (48, 64))
    assert indices(frames) == list(range(0, 36, 3))
    assert indices(read(path)) == list(range(50))


@pytest.mark.parametrize(
    ("stride", "count", "expected"),
    [
        (1, 1, [0]),
        (8, 1, [0]),
        (7, 4, [0, 7, 14, 21]),
        (7, 8, [0, 7, 14, 21, 28, 35, 42, 49]),
        (16, 23, [0, 16, 32, 48]),
    ],
)
def test_a_stride_over_the_end_gives_fewer_frames(tmp_path: Path, stride: int, count: int, expected: list[int]):
    assert indices(read(write(tmp_path / "clip.mp4"), stride, count)) == expected


def given(path: Path, stride: int = 1, count: int = 1000) -> tuple[list[int], tuple[str, ...]]:
    """The frames' indices in a grey clip, and what is said of them."""
    with open_video(path, 10_000, 60) as video:
        return indices(list(video.frames(stride, count))), video.notes


UNEVEN = ("the video's frames are unevenly spaced in time: they are taken by time, not by count",)


@pytest.mark.parametrize(
    "times",
    [
        [*range(0, 40, 2), *range(40, 100, 6)],  # 20 frames, then 10 at a third of the rate
        [*range(0, 60, 6), *range(60, 100, 2)],
        [index * 2 + (20 if index > 10 else 0) for index in range(30)],  # a pause
        [index // 2 * 4 + index % 2 for index in range(30)],
    ],
)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "live.webm"])
def test_unevenly_spaced_frames_are_taken_by_time(tmp_path: Path, times: list[int], name: str):
    seen, notes = given(write(tmp_path / name, grey_clip(30, 48, 64), times, **KINDS.get(name, {})), stride=2)
    assert notes == UNEVEN
    mean = (times[-1] - times[0]) / 29
    for k, index in enumerate(seen):  # the frame shown then, within the precision of the container's clock
        assert times[index] <= 2 * k * mean + 0.1
        assert index == 29 or times[index + 1] > 2 * k * mean - 0.1
    assert len(seen) == 15


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "live.webm"])
def test_times_that_are_uneven_by_less_than_a_third_are_counted(tmp_path: Path, name: str):
    times = [index * 5 + index % 2 for index in range(30)]  # every second frame is a fifth late
    path = write(tmp_path / name, grey_clip(30, 48, 64), times, **KINDS.get(name, {}))
    assert given(path, 5) == ([0, 5, 10, 15, 20, 25], ())


@pytest.mark.parametrize(
    ("ratio", "size"),
    [("64/45", (48, 91)), ("45/64", (68, 64)), ("1/1", (48, 64)), ("100/1", (48, 64)), ("4/1", (12, 64))],
)
def test_frames_have_display_proportions(tmp_path: Path, ratio: str, size: tuple[int, int]):
    path = write(tmp_path / "clip.mp4", options={"x264-params": f"sar={ratio}"})
    assert read(path, count=1)[0].shape[:2] == size  # 4/1 would be 192x48 wide, and the limit is 10,000 pixels


def test_display_proportions_are_turned_with_the_frame(tmp_path: Path):
    path = write(tmp_path / "clip.mp4", options={"x264-params": "sar=2/1"})
    one = (1 << 16).to_bytes(4)
    upright = one + bytes(12) + one + bytes(12) + (1 << 30).to_bytes(4)
    turned = bytes(4) + one + bytes(4) + (-1 << 16).to_bytes(4, signed=True) + bytes(16) + (1 << 30).to_bytes(4)
    assert read(patched(path, upright, turned, after=b"tkhd"), count=1)[0].shape[:2] == (128, 48)


def test_colours_arrive_as_they_were_sent(tmp_path: Path):
    colours = np.zeros((48, 64, 3), np.uint8)
    colours[:, :32], colours[:, 32:] = (220, 30, 40), (20, 60, 200)
    pixels = read(write(tmp_path / "clip.mp4", [colours]))[0].astype(int)
    assert np.abs(pixels[:, 8] - colours[:, 8]).max() <= 5
    assert np.abs(pixels[:, 56] - colours[:, 56]).max() <= 5


def corners(pixels: np.ndarray) -> str:
    """The four quarters by name, row by row."""
    height, width = pixels.shape[:2]
    names = np.array(list("dabc"))
    return "".join(names[round(float(pixels[y, x].mean()) / 60) % 4] for y in (5, height - 5) for x in (5, width - 5))


@pytest.mark.parametrize(
    ("matrix", "expected", "size"),
    [
        ((1, 0, 0, 1), "abcd", (48, 64)),
        ((0, 1, -1, 0), "cadb", (64, 48)),  # a quarter turn clockwise, as from a phone held upright
        ((-1, 0, 0, -1), "dcba", (48, 64)),
        ((0, -1, 1, 0), "bdac", (64, 48)),
        ((-1, 0, 0, 1), "badc", (48, 64)),  # mirrored, as from a front camera
        ((1, 0, 0, -1), "cdab", (48, 64)),
        ((0, 1, 1, 0), "acbd", (64, 48)),
        ((0, -1, -1, 0), "dbca", (64, 48)),
    ],
)
def test_the_display_matrix_turns_and_mirrors(tmp_path: Path, matrix: tuple[int, ...], expected: str, size: tuple[int, int]):
    quarters = np.zeros((48, 64, 3), np.uint8)
    for level, (y, x) in zip((60, 120, 180, 240), ((0, 0), (0, 32), (24, 0), (24, 32)), strict=True):
        quarters[y : y + 24, x : x + 32] = level
    path = write(tmp_path / "clip.mp4", [quarters] * 3)

    def fixed_point(a: int, b: int, c: int, d: int) -> bytes:
        numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        return b"".join(number.to_bytes(4, signed=True) for number in numbers)

    patched(path, fixed_point(1, 0, 0, 1), fixed_point(*matrix), after=b"tkhd")
    frames = read(path)
    assert [frame.shape[:2] for frame in frames] == [size] * 3
    assert {corners(frame) for frame in frames} == {expected}


def test_motion_jpeg_is_turned_by_its_exif_tag(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(avi_of(tmp_path / "clip.avi", "mjpeg", [jpeg(48, 64, exif=exif)] * 2))[0].shape == (64, 48, 3)


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path: Path):
    path = avi_of(tmp_path / "clip.avi", "mjpeg", [jpeg(48, 64), jpeg(24, 32), jpeg(60, 80)])
    assert [frame.shape for frame in read(path)] == [(48, 64, 3)] * 3


@pytest.mark.parametrize("size", [(104, 104), (400, 400)], ids=["just above", "above what the decoder takes"])
def test_a_stream_that_grows_over_the_limit_is_too_large_where_it_does(tmp_path: Path, size: tuple[int, int]):
    path = avi_of(tmp_path / "clip.avi", "mjpeg", [jpeg(48, 64), jpeg(48, 64), jpeg(*size)])
    with open_video(path, 10_000, 60) as video:
        frames = video.frames(1, 3)
        assert next(frames).shape == next(frames).shape == (48, 64, 3)
        with pytest.raises(ImageTooLarge) as error:
            next(frames)
    assert error.value.ctx == {"max_height": 100, "max_width": 100}


@pytest.mark.parametrize(("codec", "muxer"), [("libx264", "h264"), ("mpeg4", "m4v")])
def test_a_stream_that_grows_in_band_is_too_large(tmp_path: Path, codec: str, muxer: str):
    parts = []
    for size in ((48, 64), (800, 800)):
        frames = grey_clip(3, *size)
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=muxer) as output:
            stream = output.add_stream(codec, rate=25, options={"bf": "0", "g": "2"})
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for pixels in frames:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            output.mux(stream.encode())
        parts += packets_of(buffer.getvalue())
    path = avi_of(tmp_path / "clip.avi", "h264" if codec == "libx264" else codec, parts)
    assert len(read(path, 1, 3)) == 3
    with pytest.raises(ImageTooLarge):
        read(path, 1, 6)


@pytest.mark.parametrize("kind", ["mp4", "h264", "mpeg4", "webm", "avi", "gif"])
def test_a_header_that_promises_too_many_pixels_costs_no_memory(tmp_path: Path, kind: str):
    path = huge(tmp_path, kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageTooLarge) as error:
        read(path)
    assert error.value.ctx == {"max_height": 100, "max_width": 100}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB; one such frame has gigabytes


def test_an_index_of_samples_that_do_not_exist_costs_little_memory(tmp_path: Path):
    path = write(tmp_path / "clip.mp4", **KINDS["fragmented.mp4"])
    data = bytearray(path.read_bytes())
    run = data.index(b"trun") + 4
    data[run : run + 8] = struct.pack(">II", 0, 64_000_000)  # no fields per sample; 24 bytes each in FFmpeg's index
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VideoLoadError):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; 1.5 million without the bound


@pytest.mark.parametrize("num_streams", [16, 17])
def test_streams_without_end_are_refused(tmp_path: Path, num_streams: int):
    path = tmp_path / "clip.mov"
    with av.open(path, "w") as output:
        for _ in range(num_streams):
            stream = output.add_stream("mjpeg", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for stream in output.streams:
            output.mux([*stream.encode(av.VideoFrame(64, 48, "yuvj420p")), *stream.encode()])
    if num_streams == 16:
        assert len(read(path)) == 1
    else:
        with pytest.raises(VideoLoadError):
            read(path)


def test_a_video_beyond_the_cap_is_too_long(tmp_path: Path):
    for name in ("clip.mp4", "clip.mkv", "clip.avi"):
        path = write(tmp_path / name, codec="mpeg4")
        with pytest.raises(VideoTooLong) as error:
            read(path, max_duration_s=1.5)
        assert error.value.ctx == {"max_duration": 1.5, "provided_duration": 2.0}
        assert len(read(path, max_duration_s=2)) == 50


def test_a_recording_without_a_duration_is_served(tmp_path: Path):
    assert len(read(write(tmp_path / "clip.webm", **KINDS["live.webm"]), max_duration_s=0.1)) == 50


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".ffconcat", ".sdp"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_is_refused_and_opens_no_other_file(tmp_path: Path, kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr(video_container, "_open_nothing_else", lambda url, *_: opened.append(url))
    other = write(tmp_path / "other.mp4")
    text = PLAYLISTS[kind].format(other=other).encode()
    (tmp_path / f"clip{suffix}").write_bytes(text)
    with pytest.raises(UnsupportedVideoFormat) as error:
        read(tmp_path / f"clip{suffix}")
    assert error.value.ctx == {"supported_formats": ["AVI", "GIF", "MKV", "MOV", "MP4", "WEBM"]}
    for disguise in (b"\0\0\0\x14ftypisom\0\0\0\0isom", b"\x1a\x45\xdf\xa3", b"RIFF\0\0\0\0AVI ", b"GIF89a"):
        (tmp_path / f"clip{suffix}").write_bytes(disguise + text)
        with pytest.raises(ModelError):
            read(tmp_path / f"clip{suffix}")
    assert opened == []


def test_a_quicktime_reference_to_another_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []

    def refuse(url: str, *_: object) -> None:
        opened.append(url)
        raise PermissionError

    monkeypatch.setattr(video_container, "_open_nothing_else", refuse)
    path, other = write(tmp_path / "clip.mov"), write(tmp_path / "other.mov")
    refer_to(path, other)
    with pytest.raises(VideoLoadError):
        read(path)
    assert opened == []
    with path.open("rb") as file, pytest.raises(PermissionError):  # shows that the file does refer to the other one
        av.open(file, "r", "mov", {"enable_drefs": "1"}, io_open=refuse)
    assert opened == [str(other)]


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"just a text", b"<html></html>", jpeg(9, 9), b"\x89PNG\r\n\x1a\n" + bytes(30), b"BM" + bytes(60), bytes(999)]
    + [b"\0\0\0\x1cftyp" + brand + bytes(20) for brand in (b"avif", b"heic", b"mif1")],
)
def test_what_is_no_video_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "clip.mp4").write_bytes(data)
    with pytest.raises(UnsupportedVideoFormat) as error:
        read(tmp_path / "clip.mp4")
    assert "MP4" in error.value.ctx["supported_formats"]


@pytest.mark.parametrize("with_cover", [False, True])
def test_sound_alone_is_refused_even_with_a_cover_picture(tmp_path: Path, with_cover: bool):
    with pytest.raises(UnsupportedVideoFormat, match="no video stream"):
        read(audio_only(tmp_path / "clip.mp4", with_cover))


def test_a_codec_off_the_list_is_refused(tmp_path: Path):
    with pytest.raises(UnsupportedVideoFormat, match=r"ffv1 is not served. Served are AV1, GIF, H.264, HEVC"):
        read(write(tmp_path / "clip.mkv", codec="ffv1"))


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4", "clip.gif"])
def test_a_video_without_frames_is_an_error(tmp_path: Path, name: str):
    path = tmp_path / name
    if name == "clip.gif":
        path.write_bytes(b"GIF89a\x40\0\x30\0\0\0\0;")
    else:
        with av.open(path, "w", options={"movflags": "empty_moov"} if name == "clip.mp4" else {}) as output:
            stream = output.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            output.start_encoding()
    with pytest.raises(VideoLoadError):
        read(path)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("live.webm", "loop.gif", "fragmented.mp4")])
def test_a_file_that_ends_early_is_an_error_unless_its_frames_were_not_needed(tmp_path: Path, name: str):
    noise = np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), np.uint8)
    path = write(tmp_path / name, noise, **{**KINDS[name], "size": (48, 64)})
    data = path.read_bytes()
    for part in (0.02, 0.3, 0.6):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(VideoLoadError):
            read(path)
    if b"moov" not in data or data.index(b"moov") < data.index(b"mdat"):  # the index came first
        assert len(read(path, 2, 5)) == 5


def zeroed(path: Path, packets: range) -> Path:
    """The file with these packets' bytes zeroed."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        parts = [bytes(packet) for packet in container.demux(container.streams.video[0]) if packet.size]
    for part in (parts[i] for i in packets):
        start = data.index(part)
        data[start : start + len(part)] = bytes(len(part))
    path.write_bytes(data)
    return path


# AV1's and GIF's decoders do not tell, and HEVC's leaves out much of noise that leans on a lost frame
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("av1.mp4", "loop.gif", "ten_bit.mp4")])
@pytest.mark.parametrize("lost", [range(21, 22), range(30, 35)])
def test_a_few_damaged_packets_cost_their_frames_only(tmp_path: Path, name: str, lost: range):
    noise = np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), np.uint8)  # no two packets are alike
    path = zeroed(write(tmp_path / name, noise, **{**KINDS[name], "size": (48, 64)}), lost)
    with open_video(path, 10_000, 60) as video:
        assert len(list(video.frames(1, 100))) == 50, "time goes on"
        (note,) = video.notes
    counted = re.match(r"the video is damaged: (\d+) of 50 frames could not be decoded", note)
    assert counted
    assert len(lost) <= int(counted[1]) <= 12  # or more, of those that lean on them


@pytest.mark.parametrize("lost", [range(20, 40), range(50)])
def test_a_video_of_which_more_than_a_quarter_is_damaged_is_refused(tmp_path: Path, lost: range):
    with pytest.raises(VideoLoadError, match="damaged"):
        read(zeroed(write(tmp_path / "clip.mov", codec="prores_ks", pix_fmt="yuv422p10le"), lost))


def test_damage_behind_the_frames_that_are_used_does_not_count(tmp_path: Path):
    path = zeroed(write(tmp_path / "clip.mov", codec="prores_ks", pix_fmt="yuv422p10le"), range(10, 50))
    assert given(path, 2, 5) == ([0, 2, 4, 6, 8], ())


@pytest.mark.parametrize("kind", ["avi", "mp4", "mkv"])
def test_a_header_that_promises_more_than_the_file_holds_is_believed_no_further(tmp_path: Path, kind: str):
    if kind == "avi":
        path = write(tmp_path / "clip.avi", codec="mjpeg", pix_fmt="yuvj420p")
        data = path.read_bytes().replace(struct.pack("<I", 50), struct.pack("<I", 300))  # avih's and strh's
    elif kind == "mp4":
        path = write(tmp_path / "clip.mp4")
        data = path.read_bytes()
        start = data.index(b"mdhd")
        data = data[: start + 20] + struct.pack(">I", 10 * int.from_bytes(data[start + 20 : start + 24])) + data[start + 24 :]
    else:
        path = write(tmp_path / "clip.mkv")
        data = path.read_bytes()
        start = data.index(b"\x44\x89\x88") + 3
        data = data[:start] + struct.pack(">d", 20_000) + data[start + 8 :]
    path.write_bytes(data)
    assert given(path) == (list(range(50)), ())


def test_a_file_that_lacks_little_of_its_end_is_used(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), np.uint8)
    for name in ("clip.mkv", "clip.mp4", "clip.avi"):
        kind = {"codec": "mjpeg", "pix_fmt": "yuvj420p"} if name == "clip.avi" else {}
        path = write(tmp_path / name, noise, container={"movflags": "faststart"} if name == "clip.mp4" else {}, **kind)
        path.write_bytes(path.read_bytes()[: -path.stat().st_size * 18 // 100])
        with open_video(path, 10_000, 60) as video:
            assert 75 <= len(list(video.frames(1, 200))) < 90, name
            assert any("cut off: only 82% of the file" in note for note in video.notes), name


@pytest.mark.parametrize("name", ["live.webm", "loop.gif", "fragmented.mp4"])
def test_a_file_that_declares_no_end_ends_where_it_ends(tmp_path: Path, name: str):
    path = write(tmp_path / name, **KINDS[name])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.7)])
    with suppress(VideoLoadError):  # cut within a frame
        seen = indices(read(path))
        assert seen[:15] == list(range(15))
        assert seen == sorted(seen)  # of the last group some frames are missing
        assert len(seen) < 50


def test_sound_that_lasts_longer_than_the_picture_is_no_early_end(tmp_path: Path):
    path = tmp_path / "clip.mkv"
    with av.open(path, "w") as output:
        picture, sound = output.add_stream("libx264", rate=25), output.add_stream("aac", rate=48_000, layout="mono")
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        for pixels in grey_clip(25, 48, 64):
            output.mux(picture.encode(av.VideoFrame.from_ndarray(pixels)))
        output.mux(picture.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 240_000), np.float32), format="fltp", layout="mono")
        silence.rate = 48_000
        output.mux([*sound.encode(silence), *sound.encode()])
    assert len(read(path)) == 25


def test_names_that_are_not_unicode_are_no_error(tmp_path: Path):
    path = tmp_path / "clip.mkv"
    with av.open(path, "w") as output:
        output.metadata["title"] = "a title"
        stream = output.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.metadata["title"] = "a stream"
        output.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        output.mux(stream.encode())
    patched(patched(path, b"a title", b"\xff\xfe\xc3(\x80\x80\x80"), b"a stream", b"\xff" * 8)
    assert len(read(path)) == 1


def test_damage_is_our_error_and_leaves_no_file_open_and_no_word_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(7)
    names = ["bframes.mp4", "fragmented.mp4", "ten_bit.mp4", "odd.webm", "divx.avi", "camera.avi", "loop.gif"]
    files = [write(tmp_path / name, **KINDS[name]) for name in names]
    originals = [path.read_bytes() for path in files]
    read(files[0])  # opens what stays open for the whole process
    open_before, failures = len(os.listdir("/proc/self/fd")), 0
    capfd.readouterr()
    for turn in range(140):
        path, data = files[turn % len(files)], bytearray(originals[turn % len(files)])
        for place in rng.integers(0, len(data), 1 + turn // 14):
            data[place : place + 4] = rng.bytes(4)
        path.write_bytes(data[: None if turn % 3 else int(rng.integers(len(data)))])
        try:
            read(path, max_duration_s=1e9)
        except ModelError:
            failures += 1
    assert failures > 50
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert capfd.readouterr() == ("", "")


def test_an_offset_before_the_file_is_damage(tmp_path: Path):
    path = write(tmp_path / "clip.mp4")
    data = path.read_bytes()
    patched(path, data[data.index(b"mdat") - 4 : data.index(b"mdat") + 4], b"\0\0\0\1mdat")
    data = path.read_bytes()
    path.write_bytes(data.replace(data[data.index(b"mdat") + 4 :][:8], b"\xff" * 8, 1))
    with pytest.raises(VideoLoadError):
        read(path)


def test_a_failing_disk_is_not_the_files_fault(tmp_path: Path):
    class FailingFile(io.FileIO):
        def read(self, size: int = -1, /) -> bytes:
            if self.tell() > 0:
                raise OSError(5, "Input/output error")
            return super().read(size)

    class FailingPath(type(Path())):
        def open(self, *_: object, **__: object) -> FailingFile:
            return FailingFile(self)

    with pytest.raises(OSError, match="Input/output error"):
        read(FailingPath(write(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), np.uint8))))


def test_frames_asked_of_a_closed_video_are_refused(tmp_path: Path):
    with open_video(write(tmp_path / "clip.mp4"), 10_000, 60) as video:
        frames = video.frames(1, 50)
        next(frames)
    with pytest.raises(ValueError, match="closed"):
        list(frames)


def test_the_callers_own_errors_pass_through(tmp_path: Path):
    def use() -> None:
        with open_video(write(tmp_path / "clip.mp4"), 10_000, 60) as video:
            for _ in video.frames(1, 50):
                raise av.error.InvalidDataError(1, "the caller's")

    with pytest.raises(av.error.InvalidDataError, match="the caller's"):
        use()


def without_reorder_depth(sps: bytes) -> bytes:
    """An H.264 sequence parameter set as some encoders write it: ITU-T H.264, E.1.1, bitstream_restriction_flag 0."""
    bits = "".join(f"{byte:08b}" for byte in sps.replace(b"\0\0\3", b"\0\0")).rstrip("0")[:-1]

    def golomb(number: int) -> str:
        return f"{number + 1:b}".rjust(2 * (number + 1).bit_length() - 1, "0")

    for vector, reorder, depth in itertools.product(range(6, 17), range(1, 17), range(1, 17)):
        tail = "1111" + golomb(vector) * 2 + golomb(reorder) + golomb(depth)
        if bits.endswith(tail):
            bits = bits.removesuffix(tail) + "01"
            break
    raw = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))
    return raw.replace(b"\0\0\1", b"\0\0\3\1").replace(b"\0\0\0", b"\0\0\3\0").ljust(len(sps), b"\0")


def test_a_stream_that_does_not_state_its_reorder_depth_loses_no_frame(tmp_path: Path):
    path = write(tmp_path / "clip.mkv", options={"x264-params": "b-pyramid=strict:b-adapt=0:bframes=8"})
    data = path.read_bytes()
    start = data.index(b"\x67\x64")
    sps = data[start : start + int.from_bytes(data[start - 2 : start])]
    changed = without_reorder_depth(sps)
    assert changed != sps
    assert indices(read(patched(path, sps, changed))) == list(range(50))


class CountedFile(io.FileIO):
    """Counts the bytes that were read."""

    total = 0

    def read(self, size: int = -1, /) -> bytes:
        data = super().read(size)
        CountedFile.total += len(data)
        return data


class CountedPath(type(Path())):
    def open(self, *_: object, **__: object) -> CountedFile:
        CountedFile.total = 0
        return CountedFile(self)


@pytest.fixture(scope="session")
def ten_seconds() -> bytes:
    """H.264 with B-frames, 250 frames of noise, 64x64."""
    noise = np.random.default_rng(0).integers(0, 256, (250, 64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25, options={"bf": "3", "g": "50", "preset": "ultrafast", "crf": "30"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for pixels in noise:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        output.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["faststart.mp4", "index_at_end.mp4", "clip.mkv"])
def test_of_ten_minutes_only_what_max_frame_num_24_needs_is_read_and_decoded(tmp_path: Path, ten_seconds: bytes, name: str):
    path = CountedPath(tmp_path / name)
    options = {"movflags": "faststart"} if name == "faststart.mp4" else {}
    with av.open(io.BytesIO(ten_seconds)) as source, av.open(tmp_path / name, "w", options=options) as output:
        given = source.streams.video[0]
        stream = output.add_stream_from_template(given)
        packets = [packet for packet in source.demux(given) if packet.size]
        ticks = int(10 / given.time_base)
        times = [(packet.pts, packet.dts) for packet in packets]
        for round_ in range(60):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                packet.stream, packet.time_base = stream, given.time_base
                packet.pts, packet.dts = pts + round_ * ticks, dts + round_ * ticks
                output.mux(packet)
    size = path.stat().st_size
    with open_video(path, 10_000, 600) as video:
        assert sum(1 for _ in video.frames(stride=2, count=23)) == 23  # and the reference's pose is the 24th
        packets_read = video.packets
    assert 45 <= packets_read <= 45 + 3  # frames 0 to 44, and what the B-frames lean on
    # Measured with FFmpeg 8.1, of 27.4 MB: 278 kB with the index in front, 311 kB with it at the end, 98 kB for Matroska;
    # 250 kB of that are the mp4's index of 15000 frames.
    assert size > 20e6
    assert CountedFile.total < 0.02 * size


def test_nothing_is_decoded_behind_the_last_frame(tmp_path: Path):
    path = write(tmp_path / "clip.avi", codec="mpeg4", options={"bf": "0"})
    with open_video(path, 10_000, 60) as video:
        assert isinstance(video, VideoReader)
        assert [video.packets for _ in video.frames(4, 5)] == [1, 5, 9, 13, 17]
        assert video.packets == 17
