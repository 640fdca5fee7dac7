"""Writes a run's folder from a manifest. Nothing is written unless all rows can be rendered, or the rest is to be left out."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO

from deployments.batch.manifest import Manifest, ManifestFailed, Problem, Source
from deployments.batch.run_folder import ROWS, NoRun, Row, Run, RunFolder
from engines.errors import ReelrayError
from engines.temporary import temporary_folder

UPLOADS = 8
"""Files copied into the run's folder at a time."""


class RowsRefused(ManifestFailed):
    """Some rows cannot be rendered. problems: all of them."""

    def __init__(self, problems: tuple[Problem, ...]):
        super().__init__(f"{len(problems)} rows cannot be rendered, so nothing was begun")
        self.problems = problems


class OtherManifest(ReelrayError):
    """The folder holds another run."""


@dataclass(frozen=True)
class Prepared:
    """problems: of the rows that were left out. resumed: the folder held this run already."""

    run: Run
    problems: tuple[Problem, ...]
    resumed: bool


def prepare(folder: RunFolder, manifest: Manifest, run: Run, *, skip_invalid: bool = False, changed: bool = False) -> Prepared:
    """run: without its rows and digest. changed: takes a manifest that differs from that of the folder's run; rows that are the
    same in both keep their seeds and their videos.

    Raises `ManifestFailed`, `RowsRefused`, and `OtherManifest` for a manifest that has changed.
    """
    earlier = _earlier(folder)
    seeds = {row.id: (row.digest, row.input["seed"]) for row in folder.rows()} if earlier else {}
    problems: list[Problem] = []
    digest, count = hashlib.sha256(f"{manifest.endpoint.id}\n".encode()), 0
    with temporary_folder() as place:
        draft = place / ROWS
        with draft.open("wb") as file:
            for row in _sound(manifest, problems):
                _write(file, _with_earlier_seed(row, seeds))
                digest.update(row.digest.encode())
                count += 1
        if problems and not skip_invalid:
            raise RowsRefused(tuple(problems))
        if not count:
            raise ManifestFailed(f"{manifest.url} has no rows that can be rendered")
        run = replace(run, rows=count, digest=digest.hexdigest())
        if earlier and earlier.digest != run.digest and not changed:
            raise OtherManifest(
                f"{folder.url} holds a run of {earlier.rows} rows of another manifest, or with other options. Give another --out,"
                " or --changed-manifest to render what differs."
            )
        _copy(folder, manifest.files)
        folder.upload(draft, ROWS)
        folder.write_run(run)  # last: it makes the folder a run
    return Prepared(run, tuple(problems), resumed=earlier is not None and earlier.digest == run.digest)


def _earlier(folder: RunFolder) -> Run | None:
    try:
        return folder.run()
    except NoRun:
        return None


def _sound(manifest: Manifest, problems: list[Problem]) -> Iterator[Row]:
    for row in manifest.rows():
        if isinstance(row, Row):
            yield row
        else:
            problems.append(row)


def _with_earlier_seed(row: Row, seeds: dict[str, tuple[str, int]]) -> Row:
    """A row without a seed of its own has drawn one, which must stay the same when the run is resumed."""
    digest, seed = seeds.get(row.id, ("", 0))
    return replace(row, input=row.input | {"seed": seed}) if digest == row.digest else row


def _write(file: BinaryIO, row: Row) -> None:
    file.write(json.dumps(asdict(row)).encode() + b"\n")


def _copy(folder: RunFolder, files: dict[str, Source]) -> None:
    """Copies what the rows name, unless it is there: its name is that of its content."""
    present = folder.names_below("inputs")

    def copy(name: str, source: Source) -> None:
        with source.fs.open(source.path, "rb") as file:
            folder.write(name, file.read())

    missing = {name: source for name, source in files.items() if name not in present}
    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(copy, missing, missing.values()))
