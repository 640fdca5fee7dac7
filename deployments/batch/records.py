"""What became of each row: a file a row, written before its video. So a killed run has lost nothing, and does no row again whose
video is there.

A record's name says what must be known to go on: records/<row's id>~<digest>~<status>.json.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from deployments.batch.run_folder import RECORDS, VIDEOS, Row, RunFolder
from deployments.schemas.failures import error_failure
from engines.errors import ReelrayError
from engines.spec import Clip

Status = Literal["done", "refused", "failed"]
"""refused: the row's input was at fault, so that it is not rendered again. failed: anything else."""

READERS = 16
"""Records read at a time: in a bucket each is a round trip."""
_DIGEST_CHARS = 16


@dataclass(frozen=True)
class Record:
    """url: of the video. seconds: of work in each stage. receipt: as in the metrics of the service. error: a line for people.

    warnings: what the log of a job would have said about it.
    """

    id: str
    row: int
    status: Status
    url: str | None = None
    seed: int | None = None
    num_frames: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    error_type: str | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def parsed(cls, fields: dict[str, Any]) -> "Record":
        """From what `asdict` made."""
        return cls(**{**fields, "warnings": tuple(fields["warnings"])})

    @classmethod
    def of_error(cls, row: Row, error: ReelrayError) -> "Record":
        """The record of a row that ended with an error."""
        failure = error_failure(error)
        return cls.of_failure(row, failure.status, failure.body, failure.error_type)

    @classmethod
    def of_failure(cls, row: Row, http_status: int, body: dict[str, Any], error_type: str | None) -> "Record":
        """The same from an answer of the service, in either of fal's two shapes."""
        detail = body.get("detail")
        status: Status = "failed" if http_status >= 500 else "refused"
        text = "; ".join(map(_told, detail)) if isinstance(detail, list) else str(detail)
        return cls(row.id, row.number, status, seed=row.input["seed"], error=text, error_type=error_type)


@dataclass(frozen=True)
class Found:
    """A record, as its name tells."""

    id: str
    digest: str
    status: str

    @property
    def name(self) -> str:
        """In the run's folder."""
        return f"{RECORDS}/{self.id}~{self.digest}~{self.status}.json"

    @classmethod
    def of(cls, row: Row, status: str) -> "Found":
        """The one of a row."""
        return cls(row.id, row.digest[:_DIGEST_CHARS], status)


def video_of(row_id: str) -> str:
    """The name of a row's video in the run's folder."""
    return f"{VIDEOS}/{row_id}.mp4"


def frame_of(row_id: str) -> str:
    """The name of a row's first frame, if there is to be a contact sheet."""
    return f"frames/{row_id}.jpg"


def write_record(folder: RunFolder, row: Row, record: Record) -> None:
    """Writes what became of a row without a video, or what will have become of it when its video is there."""
    folder.write(Found.of(row, record.status).name, json.dumps(asdict(record)).encode())


def publish(folder: RunFolder, row: Row, clip: Clip, seconds: dict[str, float], receipt: dict[str, Any]) -> Record:
    """Writes a row's record and then its video."""
    url = folder.url_of(video_of(row.id))
    record = Record(row.id, row.number, "done", url, clip.seed, clip.num_frames, seconds, receipt)
    write_record(folder, row, record)
    folder.write(video_of(row.id), clip.mp4)
    return record


class Ended:
    """The rows that have ended, as far as a run's folder tells now."""

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._videos = {name.removesuffix(".mp4") for name in folder.names(VIDEOS)}
        self._records: dict[str, list[Found]] = {}
        for name in folder.names(RECORDS):
            row_id, _, rest = name.removesuffix(".json").partition("~")
            digest, _, status = rest.partition("~")
            self._records.setdefault(row_id, []).append(Found(row_id, digest, status))

    def status(self, row: Row) -> Status | None:
        """How a row has ended; None: it is to be rendered, which it is again after a failure that was not its own fault."""
        found = self._records.get(row.id, ())
        if Found.of(row, "done") in found and row.id in self._videos:
            return "done"
        return "refused" if Found.of(row, "refused") in found else None

    def clear(self, row: Row) -> None:
        """Deletes what an earlier try, or an earlier manifest, has left of a row that is to be rendered."""
        if row.id in self._videos:
            self._folder.delete(video_of(row.id))
        for found in self._records.get(row.id, ()):
            self._folder.delete(found.name)

    def read(self, rows: Iterator[Row]) -> Iterator[Record]:
        """The records there are for the rows, in their order."""
        names = (found.name for row in rows for found in self._records.get(row.id, ()) if self._counts(row, found))
        with ThreadPoolExecutor(READERS) as pool:
            while some := list(islice(names, 1000)):
                for data in pool.map(self._folder.read, some):
                    if data is not None:
                        yield Record.parsed(json.loads(data))

    def _counts(self, row: Row, found: Found) -> bool:
        return found == Found.of(row, found.status) and (found.status != "done" or row.id in self._videos)


def write_results(folder: RunFolder, place: Path) -> None:
    """Writes results.jsonl and results.parquet: the records of all rows. place: a folder of this machine for the drafts."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("id", "status", "url", "error", "error_type", "receipt", "warnings")),
            *((name, pa.int64()) for name in ("row", "seed", "num_frames")),
            *((f"{stage}_s", pa.float64()) for stage in ("preprocess", "denoise", "decode")),
        ]
    )
    records = Ended(folder).read(folder.rows())
    lines, table = place / "results.jsonl", place / "results.parquet"
    with lines.open("w") as file, ParquetWriter(table, schema) as writer:
        while some := list(islice(records, 1000)):
            file.writelines(json.dumps(asdict(record)) + "\n" for record in some)
            writer.write_table(pa.Table.from_pylist([_flat(record) for record in some], schema))
    for made in (lines, table):
        folder.upload(made, made.name)


def _told(fault: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in fault["loc"] if part != "body")
    return f"{field}: {fault['msg']}" if field else str(fault["msg"])


def _flat(record: Record) -> dict[str, Any]:
    fields = asdict(record)
    seconds = fields.pop("seconds")
    texts = {"receipt": json.dumps(record.receipt), "warnings": "\n".join(record.warnings)}
    return fields | texts | {f"{stage}_s": s for stage, s in seconds.items()}
