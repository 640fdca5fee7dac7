"""Sample sheets and loss curves as PNG files, drawn with Pillow alone."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_GAP = 2
_CURVE = 640, 320


def write_sheet(path: Path, rows: Sequence[Tensor], captions: Sequence[str] = (), zoom: int = 1) -> None:
    """rows: each (N, 3, H, W) in [0, 1], one below the other. captions: written above the rows."""
    text = 14 if captions else 0
    height, width = (zoom * size for size in rows[0].shape[2:])
    sheet = Image.new("RGB", (max(len(row) for row in rows) * (width + _GAP), len(rows) * (height + text + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, row in enumerate(rows):
        top = j * (height + text + _GAP)
        if captions:
            draw.text((2, top + 1), captions[j], fill="black")
        for i, image in enumerate((row.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()):
            sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (i * (width + _GAP), top + text))
    sheet.save(path)
