"""What the demo checkpoints share: they are written completely or not at all, random but seeded, without dead branches."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

SEED = 0


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a draft that becomes `folder` when it is complete. Does nothing if the folder exists."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            write(draft)
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def copy_once(source: Path, folder: Path) -> None:
    """A copy of a checkpoint, completely or not at all, unless `folder` exists."""

    def copy(draft: Path) -> None:
        shutil.copytree(source, draft, dirs_exist_ok=True)

    write_once(folder, copy)


def live(module: Any) -> Any:
    """Fills parameters that start at zero with noise: else whole branches would give zero, and tests of them prove nothing."""
    for parameter in module.parameters():
        if not parameter.data.any():
            nn.init.normal_(parameter, std=0.05)
    return module


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a config file in the hub's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
