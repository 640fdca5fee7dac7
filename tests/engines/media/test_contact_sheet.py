from pathlib import Path

import numpy as np
from PIL import Image

from engines.media.contact_sheet import write_contact_sheet
from engines.media.video import encode_h264


def test_a_sheet_shows_the_frames_row_by_row(tmp_path: Path):
    levels = np.arange(10, dtype=np.uint8) * 25
    frames = np.broadcast_to(levels[:, None, None, None], (10, 48, 64, 3))
    (tmp_path / "video.mp4").write_bytes(encode_h264([np.ascontiguousarray(frames)], 48, 64, 8)[0])
    write_contact_sheet(tmp_path / "video.mp4", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert sheet.shape == (2 * 96 + 4, 8 * 132 - 4)
    shown = [sheet[row * 100 + 48, column * 132 + 64] for row in (0, 1) for column in range(8)][:10]
    np.testing.assert_allclose(shown, levels, atol=6)
    assert sheet[148, 2 * 132 + 64] == 255  # no eleventh frame
