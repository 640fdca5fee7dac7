import json
from typing import Any

import pytest
import safetensors.torch
import torch

from engines.animatediff.denoise import Denoise as AnimateDiffDenoise
from engines.animatediff.spec import AnimateDiffSpec
from engines.checkpoints import checkpoint_file
from engines.checkpoints.checkpoint_file import UnusableCheckpoint, pack, unpack
from engines.controlnext.spec import ControlNeXtLatents
from engines.pipeline import Pipeline
from engines.spec import Checkpoint, Latents
from tests.engines.animatediff.media import keyframes

PRINT = "a" * 64
VALUES = torch.randn(1, 4, 3, 8, 8)
STATE = torch.Generator().manual_seed(3).get_state()
CHECKPOINT = Checkpoint(2, 4, VALUES.double(), STATE)
LATENTS = Latents(VALUES, 2**63)
DRIVEN = ControlNeXtLatents(VALUES.transpose(1, 2), 7, 2, 12)


def same(one: Any, other: Any) -> bool:
    assert type(one) is type(other)
    pairs = [(getattr(one, name), getattr(other, name)) for name in vars(one)]
    return all(torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("value", [CHECKPOINT, LATENTS, DRIVEN], ids=lambda value: type(value).__name__)
def test_what_is_packed_comes_back_to_the_last_bit(value: Any):
    kind = Checkpoint if isinstance(value, Checkpoint) else Latents
    read = unpack(pack(value, PRINT), kind, PRINT)
    assert same(read, value)


def test_a_file_of_the_other_kind_is_not_what_was_asked_for():
    assert unpack(pack(CHECKPOINT, PRINT), Latents, PRINT) is None
    assert unpack(pack(DRIVEN, PRINT), Checkpoint, PRINT) is None


def test_another_fingerprint_is_refused():
    with pytest.raises(UnusableCheckpoint, match="other conditioning"):
        unpack(pack(CHECKPOINT, PRINT), Checkpoint, "b" * 64)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    data = pack(CHECKPOINT, PRINT)
    monkeypatch.setattr(checkpoint_file, "FORMAT", checkpoint_file.FORMAT + 1)
    with pytest.raises(UnusableCheckpoint, match="format"):
        unpack(data, Checkpoint, PRINT)


def test_no_half_file_is_read():
    data = pack(LATENTS, PRINT)
    for length in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1):
        with pytest.raises(UnusableCheckpoint):
            unpack(data[:length], Latents, PRINT)


def test_no_damaged_file_is_read():
    data = pack(LATENTS, PRINT)
    for position in range(0, len(data), 41):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        try:
            read = unpack(bytes(damaged), Latents, PRINT)
        except UnusableCheckpoint:
            continue
        assert read is None or same(read, LATENTS), f"byte {position}"  # the changed byte may be padding in the header


FOREIGN: list[dict[str, str] | None] = [
    None,
    {},
    {"about": "{}"},
    {"about": "[]"},
    {"about": json.dumps({"kind": "Clip", "format": 1})},
]


@pytest.mark.parametrize("metadata", FOREIGN)
def test_no_foreign_file_is_read(metadata: dict[str, str] | None):
    with pytest.raises(UnusableCheckpoint):
        unpack(safetensors.torch.save({"values": VALUES}, metadata), Latents, PRINT)


def test_animatediff_goes_on_in_another_process_life_with_the_bits_of_an_undisturbed_run(pipeline: Pipeline):
    asked = pipeline.preprocess.encode(AnimateDiffSpec(3, 3, 2.0, "a red ball", "blur", "rgb", keyframes(0, 8)))
    files: list[bytes] = []
    whole = pipeline.denoise.sample(asked, on_step=lambda checkpoint: files.append(pack(checkpoint, PRINT)))
    another = AnimateDiffDenoise(pipeline.denoise.config)  # type: ignore[attr-defined]
    for step, file in enumerate(files, start=1):
        latents = another.sample(asked, resume=unpack(file, Checkpoint, PRINT))
        assert torch.equal(latents.values, whole.values), f"resumed at step {step}"
    finished = unpack(pack(latents, PRINT), Latents, PRINT)
    assert pipeline.decode.decode(finished).mp4 == pipeline.decode.decode(whole).mp4
