import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.local_render import render_locally
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings
from engines.spec import Progress
from tests.fakes import CLIP, ENDPOINT


def test_the_progress_of_every_stage_is_told_and_the_files_are_gone_afterwards(
    tmp_path: Path, demo_settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    told: list[str] = []
    files: list[bytes] = []

    class Conditioned:
        notes = ("the prompt was cut",)

    class Stages:
        def encode(self, spec: Any, *, on_progress: Any) -> Conditioned:
            files.extend(path.read_bytes() for path in tmp_path.glob("*/*"))
            on_progress(Progress("pose", 1, 1))
            return Conditioned()

        def sample(self, conditioning: Any, *, on_progress: Any) -> None:
            on_progress(Progress("step", 0, 4, Progress("window", 1, 2)))

        def decode(self, latents: Any, *, on_progress: Any) -> Any:
            on_progress(Progress("frame", 1, 1))
            return CLIP

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("engines.pipeline.build_stage", lambda *_: Stages())
    job = {"prompt": "a", "keyframe_0_image_url": "data:;base64,aGk=", "keyframe_0_index": 0}
    clip = render_locally(
        ENDPOINTS[ENDPOINT], json.dumps(job).encode(), demo_settings, lambda note: told.append(f"{note.level} {note.message}")
    )
    assert clip is CLIP
    assert files == [b"hi"]
    assert told == [
        "INFO preprocess: pose 1/1",
        "WARN the prompt was cut",
        "INFO denoise: step 0/4, window 1/2",
        "INFO decode: frame 1/1",
    ]
    assert list(tmp_path.iterdir()) == []
