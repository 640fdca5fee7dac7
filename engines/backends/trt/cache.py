"""Built plans on disk. A plan's key is everything that shaped it. It is built once even if several processes ask, and is never
loaded unchecked.

A plan is executable, so a folder that others may write to is refused. A file appears under its name complete or not at all, and
begins with its key and a digest of the rest. Plans are never changed: another driver, checkpoint or profile is another key.
The builders' measurements are stored beside the plans, and newer ones replace older ones: losing them only slows a build.
"""

import fcntl
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from engines.errors import EngineError

logger = logging.getLogger(__name__)

FORMAT = 1
"""The files' format. It is part of the key, so a version with another format does not find these files."""

REFITTABLE = "refittable"
"""Replaces the weights' hash for a plan whose weights are set after it is loaded."""

_MAGIC = b"reelray plan\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_LONGEST_KEY = 1_000_000


@dataclass(frozen=True)
class Gpu:
    """What a plan is built for. capability: e.g. (9, 0). driver_major: a plan is not guaranteed to work with the next branch."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    driver_major: int


@dataclass(frozen=True)
class Key:
    """The key of a cache entry."""

    suffix: ClassVar[str]

    @property
    def text(self) -> str:
        """The key as readable text; only equal keys have equal text."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def digest(self) -> str:
        """The name of the key's entry."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class PlanKey(Key):
    """Everything that shapes a plan.

    library, version: "tensorrt" or "tensorrt_rtx". graph: hash of what the ONNX file is made from. weights: their hash, or
    `REFITTABLE`. precision: of the graph. profiles, flags: as text, in order. plugins: hash of our kernels' source; triton:
    its version.
    """

    suffix: ClassVar[str] = "plan"

    library: str
    version: str
    gpu: Gpu
    graph: str
    weights: str
    precision: str
    profiles: tuple[str, ...]
    plugins: str
    triton: str
    flags: tuple[str, ...]
    format: int = FORMAT

    @property
    def timings(self) -> "TimingKey":
        """The key under which this plan's build stores its measurements."""
        return TimingKey(self.library, self.version, self.gpu.name, self.gpu.capability, self.gpu.multiprocessors)


@dataclass(frozen=True)
class TimingKey(Key):
    """What kernels' times depend on; for the fields see `PlanKey` and `Gpu`. Kernels are the same under another driver."""

    suffix: ClassVar[str] = "timings"

    library: str
    version: str
    gpu: str
    capability: tuple[int, int]
    multiprocessors: int
    format: int = FORMAT


@dataclass(frozen=True)
class Entry:
    """A file in the cache's folder with a plan's name. key: None if the file is damaged or has another format."""

    path: Path
    size_bytes: int
    key: PlanKey | None

    @property
    def digest(self) -> str:
        """The digest of its key, from the file's name."""
        return self.path.stem


class PlanCache:
    """folder: created if absent, accessible to its owner only. Raises `EngineError` for one that others can write to."""

    def __init__(self, folder: Path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self._check_owned()

    def load(self, key: PlanKey) -> bytes | None:
        """The plan of `key`. None if there is none, or if the file is incomplete or has another key.

        Raises `EngineError` if somebody else could have written it.
        """
        return self._read(key)

    def get(self, key: PlanKey, build: Callable[[], bytes]) -> bytes:
        """The plan of `key`, built now if necessary. If several processes ask at once, one builds and the others wait."""
        if (plan := self.load(key)) is not None:
            return plan
        with self._lock(key):
            if (plan := self.load(key)) is None:
                plan = build()
                self._store(key, plan)
        return plan

    def entries(self) -> list[Entry]:
        """Every plan in the folder, read completely and checked. Raises `EngineError` if others could have written one."""
        found = []
        for path in sorted(self.folder.glob(f"*.{PlanKey.suffix}")):
            key = self._key_in(path)
            kept = key is not None and key.digest == path.stem and self.load(key) is not None
            found.append(Entry(path, path.stat().st_size, key if kept else None))
        return found

    def _key_in(self, path: Path) -> PlanKey | None:
        with path.open("rb") as file:
            head = file.read(len(_MAGIC) + _DIGEST_BYTES + 8)
            text = file.read(min(int.from_bytes(head[-8:], "big"), _LONGEST_KEY))
        try:
            held: dict[str, Any] = json.loads(text)
            held["gpu"] = Gpu(**held["gpu"] | {"capability": tuple(held["gpu"]["capability"])})
            parts: Any = {name: tuple(item) if isinstance(item, list) else item for name, item in held.items()}
            return PlanKey(**parts)
        except (ValueError, TypeError, KeyError):
            return None

    def timings(self, key: TimingKey) -> bytes:
        """The measurements of a build of `key`; b"" if there are none that can be used, for whatever reason."""
        try:
            return self._read(key) or b""
        except (EngineError, OSError) as exc:
            logger.warning("timings cannot be read", extra={"action": "timings_unread", "error": str(exc)})
            return b""

    def keep_timings(self, key: TimingKey, timings: bytes) -> None:
        """Stores timings for the next build. Of two builds that end at once the later one's stay. Only logs a failed write."""
        try:
            self._store(key, timings)
        except OSError as exc:
            logger.warning("timings cannot be kept", extra={"action": "timings_unwritten", "error": str(exc)})

    def _read(self, key: Key) -> bytes | None:
        self._check_owned()
        path = self._path(key)
        try:
            # opened once, so that the checked file is the one that is read; links are not followed
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise EngineError(f"{path} cannot be opened: {exc}") from exc
        with os.fdopen(descriptor, "rb") as file:
            _require_private(os.fstat(file.fileno()), path)
            content = file.read()
        kept = _unpacked(content, key)
        if kept is None:
            logger.warning("a file is not what it should be", extra={"action": f"{key.suffix}_refused", "path": str(path)})
        return kept

    def _store(self, key: Key, content: bytes) -> None:
        descriptor, draft = tempfile.mkstemp(dir=self.folder, prefix=f"{key.digest}.", suffix=".draft")  # for its owner only
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_packed(content, key))
                file.flush()
                os.fsync(file.fileno())
            os.rename(draft, self._path(key))
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(draft)
            raise
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the new name durable
        finally:
            os.close(folder)

    @contextmanager
    def _lock(self, key: PlanKey) -> Iterator[None]:
        """A lock that one process holds; the kernel releases it when that process dies.

        Its file stays: if it were removed, two processes could hold locks on two files of the same name.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.folder / f"{key.digest}.lock", flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key.digest}.{key.suffix}"

    def _check_owned(self) -> None:
        _require_private(self.folder.stat(), self.folder)
        for parent in self.folder.parents:  # a user who can rename a parent can replace the folder
            about = parent.stat()
            foreign = about.st_uid not in (0, os.getuid())
            open_to_others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not about.st_mode & stat.S_ISVTX
            if foreign or open_to_others:
                raise EngineError(f"{parent} is not ours alone, and a plan below it is executable")


def _require_private(about: os.stat_result, path: Path) -> None:
    if about.st_uid != os.getuid():
        raise EngineError(f"{path} belongs to another user, and a plan is executable")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(f"{path} can be written by others, and a plan is executable")


def _packed(kept: bytes, key: Key) -> bytes:
    text = key.text.encode()
    body = len(text).to_bytes(8, "big") + text + kept
    return _MAGIC + hashlib.sha256(body).digest() + body


def _unpacked(content: bytes, key: Key) -> bytes | None:
    body = content[len(_MAGIC) + _DIGEST_BYTES :]
    text = key.text.encode()
    head = len(text).to_bytes(8, "big") + text
    if content[: len(content) - len(body)] != _MAGIC + hashlib.sha256(body).digest() or not body.startswith(head):
        return None
    return body[len(head) :]
