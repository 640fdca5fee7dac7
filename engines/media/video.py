"""Frames to an H.264 file, encoded as they come so that memory does not grow with their number."""

from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

from engines.temporary import temporary_folder

Frames = Iterator[NDArray[np.uint8]]
"""Consecutive chunks of frames, each (n, H, W, 3), RGB."""

X264_OPTIONS = {"crf": "18", "x264-params": "threads=4:mbtree=0"}
"""Constant quality 18, visually lossless, and the same bytes from the same frames.

With x264's macroblock tree, 120 encodes of one 64x64 clip gave 11 different files, and without it one. The tree's assembly reads
uninitialised memory: without assembly all files were the same. The number of threads changes the file, so it is fixed.
"""

_BT709 = 1
"""Code of BT.709 for primaries, transfer and matrix in H.264, ITU-T H.264 annex E."""


def encode_h264(frames: Frames, height: int, width: int, fps: int) -> tuple[bytes, int]:
    """An mp4 with its index in front (faststart), yuv420p, BT.709; and the number of frames. height, width: even.

    Frames are converted to yuv420p here, so that the encoder does not convert them its own way. The file is written to
    a temporary folder, because moving the index to the front needs to read it back.
    """
    count = 0
    to_yuv = VideoReformatter()  # a frame's own `reformat` makes one for each frame, with threads
    with temporary_folder() as folder:
        path = folder / "video.mp4"
        with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=fps, options=X264_OPTIONS)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = ColorRange.MPEG
            for chunk in frames:
                for pixels in chunk:
                    rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    yuv = to_yuv.reformat(
                        rgb, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
                    )
                    container.mux(stream.encode(yuv))
                    count += 1
            container.mux(stream.encode())
        return path.read_bytes(), count
