"""From a manifest to rows: JSONL, CSV or Parquet, with overrides and sweeps. Every fault is found before anything is rendered."""

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
from pydantic import ValidationError

from deployments.batch.run_folder import Row
from deployments.schemas.endpoint import Endpoint
from deployments.schemas.failures import shortened, validation_failure
from deployments.schemas.inputs import KEPT
from engines.errors import ReelrayError

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,119}")
_PLAIN = re.compile(r"[A-Za-z0-9_.]{1,16}")
_RANGE = re.compile(r"(-?\d{1,15})\.\.(-?\d{1,15})")
MAX_SWEEP = 1_000_000
"""Values of one field."""
_PLACEHOLDER = "https://file.of.the.run"
"""Stands for a file of the run while a row is validated."""


class ManifestFailed(ReelrayError):
    """The manifest cannot be read."""


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be rendered. number: of the row in the manifest, from 1."""

    number: int
    message: str


@dataclass(frozen=True)
class Variation:
    """overrides: field -> its value in every row. sweeps: field -> values; each row is rendered with each combination of them.
    All as text, whose types are the endpoint's."""

    overrides: Mapping[str, str] = field(default_factory=dict)
    sweeps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parsed(cls, overrides: Iterable[str], sweeps: Iterable[str]) -> "Variation":
        """From field=value, field=a,b,c and field=0..9. Raises `ManifestFailed`."""
        return cls(dict(map(_pair, overrides)), {name: _values(values) for name, values in map(_pair, sweeps)})


@dataclass(frozen=True)
class Source:
    """A file that rows name. fs: of fsspec. path: in it."""

    fs: Any
    path: str


@dataclass
class Manifest:
    """url: a path or an fsspec URL that ends in .jsonl, .csv or .parquet.

    files: filled by `rows`: name in the run's folder -> the file to copy there.
    """

    url: str
    endpoint: Endpoint
    variation: Variation = Variation()
    files: dict[str, Source] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fs, self._path = fsspec.url_to_fs(self.url)

    def rows(self) -> Iterator[Row | Problem]:
        """The rows in order, read as they are asked for. Raises `ManifestFailed` if the manifest itself cannot be read."""
        fields = self.endpoint.input.model_fields
        if unknown := [name for name in (*self.variation.overrides, *self.variation.sweeps) if name not in fields]:
            raise ManifestFailed(f"{self.endpoint.id} has no {', '.join(unknown)}; it has {', '.join(fields)}")
        seen: dict[str, int] = {}
        for number, given in self._read():
            if isinstance(given, str):
                yield Problem(number, given)
                continue
            for row in self._varied(number, given):
                if isinstance(row, Row) and row.id in seen:
                    row = Problem(number, f"id: {row.id} is an id of row {seen[row.id]} as well")
                elif isinstance(row, Row):
                    seen[row.id] = number
                yield row

    def _varied(self, number: int, given: dict[str, Any]) -> Iterator[Row | Problem]:
        given = {name: value for name, value in given.items() if value is not None}
        row_id = str(given.pop("id", f"{number:06}"))
        names = list(self.variation.sweeps)
        for values in itertools.product(*self.variation.sweeps.values()):
            text = {**self.variation.overrides, **dict(zip(names, values, strict=True))}
            suffix = "".join(f"-{name}-{self._label(name, value)}" for name, value in zip(names, values, strict=True))
            yield self._row(row_id + suffix, number, given | self.endpoint.input.of_query(text))

    def _label(self, name: str, value: str) -> str:
        """What a swept value is called in a row's id: itself or, e.g. for a prompt, its number."""
        return value if _PLAIN.fullmatch(value) else str(self.variation.sweeps[name].index(value) + 1)

    def _row(self, row_id: str, number: int, given: dict[str, Any]) -> Row | Problem:
        if not _ID.fullmatch(row_id):
            rule = "up to 120 letters, digits, dots, hyphens and underscores, the first no dot and no hyphen"
            return Problem(number, f"id: {shortened(row_id)!r} cannot name a file; an id has {rule}")
        try:
            files = {name: self._file(name, value) for name, value in given.items() if _names_file(name, value)}
            placed = given | dict.fromkeys(files, _PLACEHOLDER)
            parsed = self.endpoint.input.parse(json.dumps(placed).encode(), refuse_unknown=True)
        except _NoFile as exc:
            return Problem(number, str(exc))
        except ValidationError as exc:
            return Problem(number, validation_failure(exc).error.replace("body.", ""))
        kept = {name: KEPT + file for name, file in files.items()}
        digest = hashlib.sha256(json.dumps([row_id, given | kept], sort_keys=True).encode()).hexdigest()
        job_input = parsed.input.resolved().model_copy(update=kept)
        return Row(row_id, number, digest, job_input.model_dump(mode="json", exclude_none=True))

    def _file(self, name: str, path: str) -> str:
        """The name that a file gets in the run's folder: that of its content. Many rows may name the same file."""
        if path not in self._names:
            try:
                source = self._beside(path)
                digest = hashlib.sha256()
                with source.fs.open(source.path, "rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
            except Exception as exc:  # each kind of file system has errors of its own
                raise _NoFile(f"{name}: {shortened(path)} cannot be read: {_reason(exc)}") from exc
            kept = f"inputs/{digest.hexdigest()[:32]}/data"
            self._names[path], self.files[kept] = kept, source
        return self._names[path]

    def _beside(self, path: str) -> Source:
        if "://" in path or path.startswith("/"):
            return Source(*fsspec.url_to_fs(path))
        folder, slash, _ = self._path.rpartition("/")
        return Source(self.fs, folder + slash + path)

    def _read(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """(number, fields) of each row; for one that is none, what is wrong with it."""
        kind = self._path.rpartition(".")[2].lower()
        readers = {"jsonl": _json_lines, "ndjson": _json_lines, "csv": self._csv, "parquet": _parquet}
        if kind not in readers:
            raise ManifestFailed(f"{self.url} is not known to be a manifest: its name must end in .jsonl, .csv or .parquet")
        with _reading(self.url), self.fs.open(self._path, "rb") as file:
            yield from readers[kind](file)

    def _csv(self, file: Any) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """An empty cell is a field that is not given; the types are those of the endpoint."""
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            for number, cells in enumerate(csv.DictReader(text), 1):
                if None in cells:
                    yield number, "it has more cells than the header"
                else:
                    yield number, self.endpoint.input.of_query({name: cell for name, cell in cells.items() if cell})


def _json_lines(file: Any) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as exc:
            given = f"it is not JSON: {exc}"
        yield number, given if isinstance(given, dict | str) and not line.lstrip().startswith(b'"') else "it is no JSON object"


def _parquet(file: Any) -> Iterator[tuple[int, dict[str, Any] | str]]:
    from pyarrow.parquet import ParquetFile

    number = 0
    for batch in ParquetFile(file).iter_batches(batch_size=1000):
        for given in batch.to_pylist():
            number += 1
            yield number, given


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Turns what a file system or a format raises into `ManifestFailed`."""
    try:
        yield
    except ManifestFailed:
        raise
    except Exception as exc:
        raise ManifestFailed(f"{url} cannot be read: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    return "there is no such file" if isinstance(exc, FileNotFoundError) else f"{type(exc).__name__}: {exc}"


class _NoFile(Exception):
    pass


def _names_file(name: str, value: Any) -> bool:
    """Whether a value is a path or an fsspec URL, which no stage fetches."""
    fetched = isinstance(value, str) and value.lower().startswith(("http://", "https://", "data:", KEPT))
    return name.endswith("_url") and isinstance(value, str) and bool(value.strip()) and not fetched


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ManifestFailed(f"{shortened(text)!r} is not field=value")
    return name, value


def _values(text: str) -> tuple[str, ...]:
    if (span := _RANGE.fullmatch(text)) is None:
        return tuple(text.split(","))
    first, last = map(int, span.groups())
    if not 0 <= last - first < MAX_SWEEP:
        raise ManifestFailed(f"{text} must go up, and have at most {MAX_SWEEP:,} values")
    return tuple(map(str, range(first, last + 1)))
