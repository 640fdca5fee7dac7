"""Built plans on disk: found by everything that shaped them, built once however many ask, and never loaded unchecked.

A plan is executable, so a folder that others may write to is refused. A file appears under its name whole or not at all, and
begins with its key and a digest of the rest. Plans are never changed: another driver, checkpoint or profile is another key.
What builders measured lies beside them, the latest in place of the one before: losing it costs a build time and nothing else.
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
"""Of the files here; part of the key, so another one finds nothing of ours."""

REFITTABLE = "refittable"
"""In place of the weights' hash for a plan whose weights are put in after it is loaded."""

_MAGIC = b"reelray plan\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_LONGEST_KEY = 1_000_000


@dataclass(frozen=True)
class Gpu:
    """What a plan is built for. capability: as (9, 0). driver_major: a plan's kernels are not promised to the next one."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    driver_major: int


@dataclass(frozen=True)
class Key:
    """What an entry is found by."""

    suffix: ClassVar[str]

    @property
    def text(self) -> str:
        """The key, readable; equal keys have equal text and no others."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def digest(self) -> str:
        """The name of its entry."""
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
        """Where the measurements of this plan's build belong."""
        return TimingKey(self.library, self.version, self.gpu.name, self.gpu.capability, self.gpu.multiprocessors)


@dataclass(frozen=True)
class TimingKey(Key):
    """What kernels' times depend on, in the words of `PlanKey` and `Gpu`. Another driver runs the same kernels."""

    suffix: ClassVar[str] = "timings"

    library: str
    version: str
    gpu: str
    capability: tuple[int, int]
    multiprocessors: int
    format: int = FORMAT


@dataclass(frozen=True)
class Entry:
    """A file in the cache's folder that is named as a plan. key: None where it is damaged or of another format."""

    path: Path
    size_bytes: int
    key: PlanKey | None

    @property
    def digest(self) -> str:
        """Of its key, in its name."""
        return self.path.stem


class PlanCache:
    """folder: made if absent, for its owner alone. Raises `EngineError` for one that others can write to."""

    def __init__(self, folder: Path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self._check_owned()

    def load(self, key: PlanKey) -> bytes | None:
        """The plan of `key`; None if there is none, or if what lies there is not whole or is another's.

        Raises `EngineError` if somebody else could have written it.
        """
        return self._read(key)

    def get(self, key: PlanKey, build: Callable[[], bytes]) -> bytes:
        """The plan of `key`, built now if need be. Of several processes that ask at once one builds and the others wait."""
        if (plan := self.load(key)) is not None:
            return plan
        with self._lock(key):
            if (plan := self.load(key)) is None:
                plan = build()
                self._store(key, plan)
        return plan

    def entries(self) -> list[Entry]:
        """Every plan that lies here, read to its end and checked. Raises `EngineError` if others could have written one."""
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
        """What a build of `key` measured; b"" if there is none that can be used, for whatever reason."""
        try:
            return self._read(key) or b""
        except (EngineError, OSError) as exc:
            logger.warning("timings cannot be read", extra={"action": "timings_unread", "error": str(exc)})
            return b""

    def keep_timings(self, key: TimingKey, timings: bytes) -> None:
        """For the next build. Of two that end at once the later one's stay; that they cannot be written stops nothing."""
        try:
            self._store(key, timings)
        except OSError as exc:
            logger.warning("timings cannot be kept", extra={"action": "timings_unwritten", "error": str(exc)})

    def _read(self, key: Key) -> bytes | None:
        self._check_owned()
        path = self._path(key)
        try:
            # opened once, so that what is checked is what is read; not through a link to somewhere else
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
        descriptor, draft = tempfile.mkstemp(dir=self.folder, prefix=f"{key.digest}.", suffix=".draft")  # for its owner alone
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
            os.fsync(folder)  # the name
        finally:
            os.close(folder)

    @contextmanager
    def _lock(self, key: PlanKey) -> Iterator[None]:
        """Held by one process; the kernel frees it when that dies. Its file stays: removing it would make two locks of one."""
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
        for parent in self.folder.parents:  # whoever may rename a parent can put another folder in its place
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
