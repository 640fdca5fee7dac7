"""A video's frames side by side in one picture, for the eye."""

from itertools import islice
from pathlib import Path

from PIL import Image

from engines.media.video_reader import open_video

_CELL = 128
"""Width of a frame in the sheet, in pixels."""
_GAP = 4
_COLUMNS = 8
_MAX_FRAMES = 32
_MAX_PIXELS, _MAX_S = 4_000_000, 3600.0


def write_contact_sheet(video: Path, sheet: Path) -> None:
    """Writes a PNG of a video's first 32 frames, row by row, each 128 pixels wide. Raises `VideoLoadError`."""
    with open_video(video, _MAX_PIXELS, _MAX_S) as reader:
        frames = [Image.fromarray(frame) for frame in islice(reader.frames(1, _MAX_FRAMES), _MAX_FRAMES)]
    height = round(_CELL * frames[0].height / frames[0].width)
    rows = -(-len(frames) // _COLUMNS)
    columns = min(len(frames), _COLUMNS)
    picture = Image.new("RGB", (columns * (_CELL + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for i, frame in enumerate(frames):
        place = (i % _COLUMNS * (_CELL + _GAP), i // _COLUMNS * (height + _GAP))
        picture.paste(frame.resize((_CELL, height), Image.Resampling.LANCZOS), place)
    picture.save(sheet, format="PNG", optimize=True)
