from pathlib import Path

from rich.console import Console

from deployments.files.file_store import FileStore
from tests.chaos.cancels import unleash


async def test_cancels_at_any_moment_leak_nothing_and_end_each_job_once(database: str, tmp_path: Path):
    """A small run of `python -m tests.chaos.cancels`."""
    faults, figures = await unleash(database, FileStore(str(tmp_path)), jobs=150, seed=1)
    Console(width=120).print(figures)
    assert not faults, "\n".join(faults)
