"""The application as Serve builds it, without Ray."""

from pathlib import Path

import pytest

from deployments.app import build
from deployments.settings import Settings


def test_what_the_application_needs_is_written_while_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[tuple[str, Path]] = []
    monkeypatch.setattr("engines.registry.write_demo_weights", lambda model, folder: written.append((model, folder)))
    settings = Settings(home=tmp_path)
    build(settings)
    assert written == [
        ("animatediff-sparsectrl-lcm", settings.demo_weights / "animatediff"),
        ("controlnext", settings.demo_weights / "controlnext"),
    ]
    for _, folder in written:
        folder.mkdir(parents=True)
    build(settings)
    assert len(written) == 2, "what is there stays"
