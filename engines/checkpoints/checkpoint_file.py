"""A job's latents as bytes, between two steps or after the last: safetensors with JSON beside the tensors, and no code.

It is read back strictly. A job whose file is refused starts over, so every doubtful file is refused: an incomplete or damaged
one, one of another version, and one that was made from other conditioning, by other weights or in another arithmetic.
"""

import json
from dataclasses import fields
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from engines.checkpoints.fingerprint import fingerprint_of
from engines.controlnext.spec import ControlNeXtLatents
from engines.spec import Checkpoint, Latents

FORMAT = 2
"""Increase it whenever the stored values, or the arithmetic that they came from, change."""

KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Checkpoint, Latents, ControlNeXtLatents)}

T = TypeVar("T", bound=Checkpoint | Latents)


class UnusableCheckpoint(Exception):
    """The file is not what was asked for; its message says why, for the operator."""


def pack(value: Checkpoint | Latents, fingerprint: str) -> bytes:
    """The value as a file. fingerprint: of everything that the value depends on."""
    held = {field.name: getattr(value, field.name) for field in fields(value)}
    tensors = {name: item.contiguous() for name, item in held.items() if isinstance(item, Tensor)}
    about = {
        "format": FORMAT,
        "kind": type(value).__name__,
        "fingerprint": fingerprint,
        "content": fingerprint_of(value),
        "scalars": {name: item for name, item in held.items() if name not in tensors},
    }
    return safetensors.torch.save(tensors, {"about": json.dumps(about)})


def unpack(data: bytes, kind: type[T], fingerprint: str) -> T | None:
    """The value of a file that holds one of `kind` or of a class derived from it; None if it holds another of `KINDS`.

    Raises `UnusableCheckpoint` for a file that is damaged, has another format or has another fingerprint.
    """
    try:
        about = _about(data)
        made = KINDS[about["kind"]]
        if about["format"] != FORMAT:
            raise UnusableCheckpoint(f"its format is {about['format']}, and this version reads {FORMAT}")
        if not issubclass(made, kind):
            return None
        if about["fingerprint"] != fingerprint:
            raise UnusableCheckpoint("it was made from other conditioning, by other weights or in another arithmetic")
        held: dict[str, Any] = safetensors.torch.load(data) | about["scalars"]
        value: T = made(**held)
        whole = fingerprint_of(value) == about["content"]
    except (SafetensorError, ValueError, KeyError, TypeError) as exc:
        raise UnusableCheckpoint("it is damaged or not ours") from exc
    if not whole:
        raise UnusableCheckpoint("it is damaged")
    return value


def _about(data: bytes) -> dict[str, Any]:
    """Our part of the header: 8 bytes of its length, little-endian, then JSON (the safetensors format)."""
    length = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["about"])
    if not isinstance(about, dict):
        raise TypeError
    return about
