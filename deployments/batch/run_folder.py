"""Where a run keeps all it knows: a folder at an fsspec URL, from which any process on any machine can go on with it.

run.json                the run itself, see `Run`
rows.jsonl              what is rendered, a `Row` a line
inputs/<hash>/data      the files that the rows name
videos/<id>.mp4         what was rendered
records/<id>.json       what became of a row, see `records.py`
progress.json           how far the run is
results.jsonl, results.parquet, contact_sheet.jpg   made at its end
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from deployments.files.file_store import durable_file, translated
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.settings import Settings
from engines.errors import ReelrayError

RUN, ROWS, PROGRESS = "run.json", "rows.jsonl", "progress.json"
VIDEOS, RECORDS, UPLOADED = "videos", "records", "uploaded"


class NoRun(ReelrayError):
    """There is no run in this folder."""


@dataclass(frozen=True)
class Row:
    """A clip to render. number: of its row in the manifest, from 1. digest: of what the manifest asks for, files included.

    input: as a job's row in the service's queue has it, with its seed; a file of the run's own is named as "kept:inputs/...".
    """

    id: str
    number: int
    digest: str
    input: dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """least, most: processes of a stage. gpus: of each, e.g. 0.5."""

    least: int
    most: int
    gpus: float


@dataclass(frozen=True)
class Run:
    """What is rendered and how; the rows are beside it.

    digest: of all rows. settings: those of the service that the stages need. service: the URL of a service whose replicas do the
    work; None: the run's own processes do. concurrency: how many rows the service has at a time. pools: the stages' processes.
    """

    endpoint: str
    rows: int
    digest: str
    settings: dict[str, Any]
    pools: dict[str, Pool]
    service: str | None = None
    concurrency: int = 8
    max_failures: int = 0
    contact_sheet: bool = False

    @property
    def described(self) -> Endpoint:
        """The endpoint."""
        return ENDPOINTS[self.endpoint]

    def loaded_settings(self) -> Settings:
        """The settings, on the machine that asks: a folder below `home` is its own."""
        return Settings.model_validate(self.settings)


def settings_for(endpoint: Endpoint, settings: Settings, *, here: bool) -> dict[str, Any]:
    """What a run needs of a service's settings, without its secrets. here: it stays on this machine, and so has its `home`."""
    return settings.model_dump(mode="json", include={endpoint.family, "fetch", "queue"} | ({"home"} if here else set()))


class RunFolder:
    """url: an fsspec URL or a local path. Every method raises `StorageFailed` if the storage does not answer."""

    def __init__(self, url: str):
        self.fs, self._root = fsspec.url_to_fs(url)
        self.url = self._root if self.is_local else url.rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Where a file is in the file system."""
        return f"{self._root}/{name}"

    def url_of(self, name: str) -> str:
        """What others call a file."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if there is none."""
        with translated():
            try:
                data: bytes = self.fs.cat_file(self.path(name))
            except FileNotFoundError:
                return None
        return data

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces it, so that nobody ever sees half of it."""
        with translated():
            if self.is_local:
                with durable_file(Path(self.path(name)), Path(self._root, "incomplete")) as file:
                    file.write(data)
            else:
                self.fs.pipe_file(self.path(name), data)

    def upload(self, local: Path, name: str) -> None:
        """The same, with the content of a file of this machine."""
        with translated():
            if self.is_local:
                with durable_file(Path(self.path(name)), Path(self._root, "incomplete")) as file, local.open("rb") as source:
                    while chunk := source.read(1 << 20):
                        file.write(chunk)
            else:
                self.fs.put_file(str(local), self.path(name))

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""
        with translated():
            if self.fs.exists(self.path(name)):
                self.fs.rm_file(self.path(name))

    def names(self, folder: str) -> set[str]:
        """The names of the files in one of its folders."""
        with translated():
            self.fs.invalidate_cache()
            try:
                return {path.rpartition("/")[2] for path in self.fs.ls(self.path(folder), detail=False)}
            except FileNotFoundError:
                return set()

    def names_below(self, folder: str) -> set[str]:
        """The names of all files below one of its folders, as they are given to `read`."""
        with translated():
            self.fs.invalidate_cache()
            return {path.removeprefix(self._root + "/") for path in self.fs.find(self.path(folder))}

    def run(self) -> Run:
        """The run. Raises `NoRun`."""
        data = self.read(RUN)
        if data is None:
            raise NoRun(f"There is no run in {self.url}: it has no {RUN}.")
        fields = json.loads(data)
        return Run(**{**fields, "pools": {stage: Pool(**pool) for stage, pool in fields["pools"].items()}})

    def write_run(self, run: Run) -> None:
        """Writes or replaces the run."""
        self.write(RUN, json.dumps(asdict(run), indent=2).encode())

    def rows(self) -> Iterator[Row]:
        """The rows, read as they are asked for."""
        with translated():
            file = self.fs.open(self.path(ROWS), "rb")
        with file:
            for line in file:
                yield Row(**json.loads(line))
