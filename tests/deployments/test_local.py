import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from deployments.local import render_locally
from deployments.schemas import ENDPOINTS
from deployments.settings import Settings
from engines.spec import Checkpoint, Progress
from tests.fakes import CLIP, ENDPOINT


def test_the_progress_of_every_stage_is_told_and_the_files_are_gone_afterwards(
    tmp_path: Path, demo_settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    told: list[Any] = []
    checkpoint: Any = Checkpoint(1, 1, None, None)  # type: ignore[arg-type]

    class Stages:
        def encode(self, spec: Any, *, on_progress: Any) -> None:
            told.append([path.read_bytes() for path in tmp_path.glob("*/*")])
            on_progress(Progress("pose", 1, 1))

        def sample(self, conditioning: Any, *, on_step: Any) -> None:
            on_step(checkpoint)

        def decode(self, latents: Any, *, on_progress: Any) -> Any:
            on_progress(Progress("frame", 1, 1))
            return CLIP

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("engines.pipeline.build_stage", lambda *_: Stages())
    job = {"prompt": "a", "keyframe_0_image_url": "data:;base64,aGk=", "keyframe_0_index": 0}
    clip = render_locally(ENDPOINTS[ENDPOINT], json.dumps(job).encode(), demo_settings, told.append, told.append)
    assert clip is CLIP
    assert told == [[b"hi"], Progress("pose", 1, 1), checkpoint, Progress("frame", 1, 1)]
    assert list(tmp_path.iterdir()) == []
