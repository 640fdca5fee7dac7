import json
from pathlib import Path

import torch

from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.checkpoints.provenance import options_of, weights_of
from engines.checkpoints.source import Source
from engines.config import ModelConfig


def test_a_receipt_names_repos_by_revision_and_folders_by_what_is_in_them(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    hub = Source(repo="wangfuyun/AnimateLCM", revision="3d4d00fc", variant="fp16")
    here = Source(folder=tmp_path)
    config = AnimateDiffConfig(
        weights=AnimateDiffWeights(hub, hub, here, here, here, lora_scale=0.7), dtype="float16", device="cuda:1"
    )
    named = weights_of(config)
    assert named["base"] == {"repo": "wangfuyun/AnimateLCM", "revision": "3d4d00fc", "variant": "fp16"}
    assert (named["lora_scale"], "vae" in named) == (0.7, False)
    assert str(tmp_path) not in json.dumps(named)
    (tmp_path / "a.safetensors").write_bytes(b"weighty")
    assert weights_of(config)["lora"] != named["lora"]
    assert options_of(config) == {"dtype": "float16", "device": "cuda:1", "torch": torch.__version__}


def test_a_model_without_weights_has_none_to_name():
    assert weights_of(ModelConfig()) == {}
