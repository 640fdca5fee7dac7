"""Sample sheets and loss curves as PNG files, drawn with Pillow alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_GAP = 2
_WIDTH, _HEIGHT = 720, 360
_INKS = ("black", "firebrick", "steelblue", "seagreen", "darkorange", "purple")


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
            sheet.paste(
                Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (i * (width + _GAP), top + text)
            )
    sheet.save(path)


def write_curve(path: Path, lines: str) -> None:
    """lines: JSON objects with a "step" and values, one a line. Values above zero are drawn on a logarithmic axis."""
    rows = [json.loads(line) for line in lines.splitlines()]
    names = sorted({name for row in rows for name in row if name != "step"})
    points = {
        name: [(row["step"], math.log10(row[name])) for row in rows if math.isfinite(row.get(name, math.nan)) and row[name] > 0]
        for name in names
    }
    heights = [y for line in points.values() for _, y in line]
    last, low, high = rows[-1]["step"], min(heights), max(heights) + 1e-9
    sheet = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for power in range(math.ceil(low), math.floor(high) + 1):
        y = (high - power) / (high - low) * _HEIGHT
        draw.line([(0, y), (_WIDTH, y)], fill="lightgrey")
        draw.text((2, y), f"1e{power}", fill="grey")
    for i, (name, line) in enumerate(points.items()):
        ink = _INKS[i % len(_INKS)]
        draw.line([(x / last * _WIDTH, (high - y) / (high - low) * _HEIGHT) for x, y in line], fill=ink)
        draw.text((_WIDTH - 110, 4 + 12 * i), name, fill=ink)
    draw.text((_WIDTH - 110, _HEIGHT - 14), f"{last} steps", fill="grey")
    sheet.save(path)
