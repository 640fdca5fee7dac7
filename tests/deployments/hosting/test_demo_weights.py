from pathlib import Path

import pytest

from deployments.hosting.demo_weights import write_missing_weights
from deployments.settings import Settings
from engines.demo import shipped


def test_a_fresh_home_gets_the_trained_weights_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path / "package")
    for model in ("animatediff", "controlnext"):
        (tmp_path / "package" / model / "part").mkdir(parents=True)
        (tmp_path / "package" / model / "part" / "model.safetensors").write_text(f"trained {model}")
    settings = Settings(home=tmp_path / "home")
    own = settings.demo_weights / "controlnext"
    own.mkdir(parents=True)
    write_missing_weights(settings)
    assert (settings.demo_weights / "animatediff" / "part" / "model.safetensors").read_text() == "trained animatediff"
    assert not list(own.iterdir())
