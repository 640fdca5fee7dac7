import io

import av
import numpy as np

from engines.media.video import encode_h264


def clip(num_frames: int = 16, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames of one plain colour each, all different."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[:] = np.linspace(0, 255, num_frames, dtype=np.uint8)[:, None, None, None]
    frames[..., 0] = 200
    return frames


def test_the_file_holds_every_frame_with_its_size_rate_and_colours():
    frames = clip()
    mp4, count = encode_h264(iter(np.split(frames, 4)), 64, 96, fps=8)
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert count == len(decoded) == 16
    for seen, given in zip(decoded, frames, strict=True):
        assert np.abs(seen.astype(int) - given).max() <= 6


def test_the_index_is_in_front():
    mp4, _ = encode_h264(iter([clip()]), 64, 96, fps=8)
    assert mp4.index(b"moov") < mp4.index(b"mdat")


def test_the_same_frames_give_the_same_bytes_however_they_are_chunked():
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    files = {encode_h264(iter(np.split(noise, chunks)), 64, 64, fps=8)[0] for chunks in (1, 2, 4, 8, 16) for _ in range(4)}
    assert len(files) == 1
