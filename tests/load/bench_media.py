"""What it costs a job that its files are decoded in a child process, not in the replica's own.

Both ways decode the same files in turn, so that the machine's other work falls on both. The child is warm: it has decoded a file
before. A job of AnimateDiff has three keyframes, at most as large as the third line's; one of ControlNeXt a reference image and
24 frames of its driving video. The last line is the whole preprocessing of such a job with the demo weights: there a child
decodes the next frame while the replica looks for people in this one.

On a machine that does other work as well, CPU time says more than the time that passes.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from PIL import Image

import engines.media.image as image_module
from engines.controlnext import preprocess
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.demo_pose import puppet_image, write_puppet_clip
from engines.controlnext.demo_weights import write_demo_weights
from engines.controlnext.spec import ControlNeXtSpec
from engines.media import picture
from engines.media.decoder import DECODER, Decoder
from engines.media.video_reader import open_video
from tests.load.report import Report, table

TARGET_MS = 20
ROUNDS = 12
STARTS = 5
MAX_PIXELS = 50_000_000


def noise(height: int, width: int) -> np.ndarray:
    """Smooth noise, which costs a decoder what a photo costs it."""
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(height: int, width: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(height, width)).save(buffer, kind)
    return buffer.getvalue()


def clip(path: Path, height: int, width: int) -> Path:
    pixels = noise(height, width)
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(48):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(pixels, 4 * index, axis=1), format="rgb24")))
        output.mux(stream.encode())
    return path


def keyframes(data: bytes) -> tuple[Callable[[], Any], Callable[[Decoder], Any]]:
    def here() -> None:
        for _ in range(3):
            picture.stretched(data, 512, 512, MAX_PIXELS)

    def there(decoder: Decoder) -> None:
        for _ in range(3):
            decoder.picture("stretched", data, 512, 512, MAX_PIXELS)

    return here, there


def reference_and_video(data: bytes, path: Path) -> tuple[Callable[[], Any], Callable[[Decoder], Any]]:
    def here() -> None:
        picture.cover(data, 1024, 576, MAX_PIXELS, 64)
        with open_video(path, MAX_PIXELS, 60) as video:
            assert sum(1 for _ in video.frames(2, 24)) == 24

    def there(decoder: Decoder) -> None:
        decoder.picture("cover", data, 1024, 576, MAX_PIXELS, min_side=64)
        with decoder.video(path, MAX_PIXELS, 60) as video:
            assert sum(1 for _ in video.frames(2, 24)) == 24

    return here, there


class InReplica:
    """A decoder without children."""

    def picture(self, kind: str, data: bytes, height: int, width: int, max_pixels: int, **options: Any) -> Any:
        options.pop("should_stop", None)
        return getattr(picture, kind)(data, height, width, max_pixels, **options)

    @contextmanager
    def video(self, path: Path, max_pixels: int, max_duration_s: float, should_stop: Any = None) -> Iterator[Any]:
        with open_video(path, max_pixels, max_duration_s) as video:
            video.at_most = lambda stride, count: count  # type: ignore[attr-defined]
            yield video


def preprocessing(folder: Path, data: bytes, path: Path) -> tuple[Callable[[], Any], Callable[[Decoder], Any]]:
    image = folder / "person.png"
    image.write_bytes(data)
    weights = write_demo_weights(folder / "controlnext")
    stage = preprocess.Preprocess(ControlNeXtConfig(weights=weights))
    spec = ControlNeXtSpec(1, 1, 1.0, image, path, max_frame_num=25, height=512, width=320)

    def encode(decoder: Any) -> None:
        kept = DECODER
        try:
            preprocess.DECODER = image_module.DECODER = decoder  # type: ignore[attr-defined]
            stage.encode(spec)
        finally:
            preprocess.DECODER = image_module.DECODER = kept  # type: ignore[attr-defined]

    return lambda: encode(InReplica()), encode


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cpu_seconds(decoder: Decoder, call: Callable[[], Any]) -> float:
    """Of this process and its one child."""

    def used() -> float:
        (child,) = decoder._idle
        return time.process_time() + time.clock_gettime(~child.pid << 3 | 2)

    began = used()
    call()
    return used() - began


def main() -> None:
    """Prints and keeps the figures."""
    report = Report("media", "Media in a child process", "`python -m tests.load.bench_media` (`make bench-media`)")
    report.add(" ".join(str(__doc__).split()))
    report.add(f"Target: at most {TARGET_MS} ms a job.")
    columns = ("in the replica, ms", "in a child, ms", "CPU in the replica, ms", "CPU of both, ms", "more CPU, ms")
    rows = table(f"The fastest of {ROUNDS} rounds each way", "job", *columns)
    with TemporaryDirectory() as folder:
        small, large = clip(Path(folder) / "small.mp4", 576, 320), clip(Path(folder) / "large.mp4", 1920, 1080)
        jobs = {
            "3 PNG keyframes, 512x512": keyframes(encoded(512, 512, "PNG")),
            "3 JPEG keyframes, 3000x2000": keyframes(encoded(2000, 3000, "JPEG")),
            "3 JPEG keyframes, 8000x6000": keyframes(encoded(6000, 8000, "JPEG")),
            "JPEG 768x1024, 24 frames of 320x576": reference_and_video(encoded(1024, 768, "JPEG"), small),
            "JPEG 3000x2000, 24 frames of 1080x1920": reference_and_video(encoded(2000, 3000, "JPEG"), large),
        }
        dance = Path(folder) / "dance.mp4"
        write_puppet_clip(dance, 48, 576, 320, 30)
        jobs["preprocessing, 24 frames of 320x576"] = preprocessing(Path(folder), puppet_image(512, 320), dance)
        decoder = Decoder()
        for name, (here, there) in jobs.items():
            there(decoder)
            taken = [
                (seconds(here), seconds(apart), cpu_seconds(decoder, here), cpu_seconds(decoder, apart))
                for apart in [partial(there, decoder)] * ROUNDS
            ]
            wall, wall_apart, cpu, cpu_apart = (1000 * min(side) for side in zip(*taken, strict=True))
            cells = (wall, wall_apart, cpu, cpu_apart)
            rows.add_row(name, *(f"{cell:.1f}" for cell in cells), f"{cpu_apart - cpu:+.1f}")
        decoder.close()
    report.add(rows)
    first = statistics.median(seconds(lambda: started(encoded(512, 512, "PNG"))) for _ in range(STARTS))
    report.add(f"The first file of a new child, e.g. after one that died, waits {1000 * first:.0f} ms in all.")
    report.save()


def started(data: bytes) -> None:
    decoder = Decoder()
    decoder.picture("stretched", data, 512, 512, MAX_PIXELS)
    decoder.close()


if __name__ == "__main__":
    main()
