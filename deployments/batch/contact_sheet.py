"""One picture of all clips' first frames, because people would rather look than read."""

import io
import math
from collections.abc import Iterator

import av
from PIL import Image, ImageDraw

from deployments.batch.records import Ended, frame_of
from deployments.batch.run_folder import RunFolder

FRAME_PX = 192
"""The longer side of a frame on the sheet, for few clips."""
MAX_SIDE_PX = 8000
"""Of the sheet: with thousands of clips the frames get smaller."""
LABEL_PX = 12


def first_frame(mp4: bytes) -> bytes:
    """The first frame of a video that we made, as a JPEG small enough for the sheet."""
    with av.open(io.BytesIO(mp4), "r") as container:
        picture = Image.fromarray(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    picture.thumbnail((FRAME_PX, FRAME_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_contact_sheet(folder: RunFolder) -> None:
    """Writes contact_sheet.jpg: the rows that are done, in order, each with its id below it."""
    ended = Ended(folder)
    ids = [row.id for row in folder.rows() if ended.status(row) == "done"]
    if not ids:
        return
    columns = math.ceil(math.sqrt(len(ids)))
    cell = min(FRAME_PX, MAX_SIDE_PX // columns - LABEL_PX)
    sheet = Image.new("RGB", (columns * cell, math.ceil(len(ids) / columns) * (cell + LABEL_PX)), "#111")
    draw = ImageDraw.Draw(sheet)
    for place, (row_id, frame) in enumerate(_frames(folder, ids)):
        left, top = place % columns * cell, place // columns * (cell + LABEL_PX)
        frame.thumbnail((cell, cell))
        sheet.paste(frame, (left + (cell - frame.width) // 2, top + (cell - frame.height) // 2))
        if cell >= 60:  # smaller ones have no room for text
            draw.text((left + 2, top + cell), row_id[-(cell // 6) :], fill="#ccc")
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    folder.write("contact_sheet.jpg", buffer.getvalue())


def _frames(folder: RunFolder, ids: list[str]) -> Iterator[tuple[str, Image.Image]]:
    for row_id in ids:
        data = folder.read(frame_of(row_id))
        yield row_id, Image.open(io.BytesIO(data)) if data else Image.new("RGB", (1, 1))
