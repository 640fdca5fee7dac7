"""Manifests and runs for the tests of batch rendering."""

import json
from pathlib import Path
from typing import Any

from deployments.batch.manifest import Manifest, Variation
from deployments.batch.prepare import Prepared, prepare
from deployments.batch.run_folder import Pool, Run, RunFolder, settings_for
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings

CLIP = ENDPOINTS["fal-ai/animatediff-sparsectrl-lcm"]
SMALL = {"num_inference_steps": 1, "seed": 7}
"""A clip that takes little time."""


def manifest_of(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes a manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(folder: RunFolder, manifest: str, settings: Settings, run: dict[str, Any] | None = None, **options: Any) -> Prepared:
    """A run of the small endpoint, ready to be worked off."""
    pools = {stage: Pool(1, 1, 0.0) for stage in ("preprocess", "denoise", "decode")}
    made = Run(CLIP.id, 0, "", settings_for(CLIP, settings, here=True), pools, **(run or {}))
    return prepare(folder, Manifest(manifest, CLIP, Variation()), made, **options)
