"""The cache with a fake builder in place of TensorRT: the cached plans are arbitrary bytes, and no engine is run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from engines.backends.trt.cache import FORMAT, REFITTABLE, Gpu, PlanCache, PlanKey, TimingKey
from engines.errors import EngineError
from tests.engines.backends.trt.keys import KEY, PLAN
from tests.patience import PATIENCE_S

OTHERS = {
    "library": "tensorrt_rtx",
    "version": "11.3.0",
    "graph": "d" * 64,
    "weights": REFITTABLE,
    "precision": "bfloat16",
    "profiles": ("16x64x96",),
    "plugins": "e" * 64,
    "triton": "3.6.0",
    "flags": (),
    "format": FORMAT + 1,
}
OTHER_GPUS = {"name": "NVIDIA H100", "capability": (8, 9), "multiprocessors": 114, "driver_major": 570}


def never() -> bytes:
    raise AssertionError("built although the plan was cached")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "plans"


@pytest.fixture
def filled(folder: Path) -> PlanCache:
    cache = PlanCache(folder)
    assert cache.get(KEY, lambda: PLAN) == PLAN
    return cache


def entry(cache: PlanCache) -> Path:
    (path,) = cache.folder.glob("*.plan")
    return path


def test_a_plan_is_built_once_and_found_again_by_an_equal_key(filled: PlanCache):
    again = replace(KEY, gpu=replace(KEY.gpu))
    assert PlanCache(filled.folder).get(again, never) == PLAN


def test_every_component_is_tried():
    assert set(OTHERS) | {"gpu"} == {field.name for field in fields(PlanKey)}
    assert set(OTHER_GPUS) == {field.name for field in fields(Gpu)}


@pytest.mark.parametrize("part", [*OTHERS, *(f"gpu.{part}" for part in OTHER_GPUS)])
def test_another_value_of_any_component_is_another_plan(filled: PlanCache, part: str):
    if part in OTHERS:
        other = replace(KEY, **{part: OTHERS[part]})
    else:
        name = part.removeprefix("gpu.")
        other = replace(KEY, gpu=replace(KEY.gpu, **{name: OTHER_GPUS[name]}))
    assert other.digest != KEY.digest
    assert filled.load(other) is None
    assert filled.get(other, lambda: b"other") == b"other"
    assert filled.load(KEY) == PLAN


def test_another_division_or_order_of_a_list_is_another_key():
    assert replace(KEY, flags=("A", "B")).digest != replace(KEY, flags=("A,B",)).digest
    assert replace(KEY, profiles=("a", "b")).digest != replace(KEY, profiles=("b", "a")).digest


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:20],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: whole + b"x",
        lambda whole: whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        lambda whole: whole.replace(b"H200", b"H100"),
        lambda whole: PLAN,
    ],
    ids=["empty", "no body", "half", "short", "long", "one bit", "another GPU", "no header"],
)
def test_a_damaged_plan_is_never_loaded_and_built_anew(filled: PlanCache, damage: Callable[[bytes], bytes]):
    path = entry(filled)
    path.write_bytes(damage(path.read_bytes()))
    assert filled.load(KEY) is None
    assert filled.get(KEY, lambda: b"anew") == b"anew"
    assert filled.load(KEY) == b"anew"


def test_a_whole_plan_of_another_key_under_this_name_is_never_loaded(filled: PlanCache):
    own = entry(filled)
    other = replace(KEY, version="11.3.0")
    filled.get(other, lambda: b"other")
    stale = filled.folder / f"{other.digest}.plan"
    own.write_bytes(stale.read_bytes())
    assert filled.load(KEY) is None


def test_a_build_that_fails_leaves_nothing_and_the_next_one_builds(folder: Path):
    cache = PlanCache(folder)

    def failing() -> bytes:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        cache.get(KEY, failing)
    assert cache.load(KEY) is None
    assert cache.get(KEY, lambda: PLAN) == PLAN


def test_a_write_that_fails_leaves_no_draft(folder: Path, monkeypatch: pytest.MonkeyPatch):
    cache = PlanCache(folder)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.get(KEY, lambda: PLAN)
    assert not list(folder.glob("*.draft"))
    assert cache.load(KEY) is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(filled: PlanCache, mode: int):
    filled.folder.chmod(mode)
    for ask in (lambda: filled.load(KEY), lambda: filled.get(KEY, never), lambda: PlanCache(filled.folder)):
        with pytest.raises(EngineError, match="written by others"):
            ask()


def test_a_file_that_others_can_write_to_is_refused(filled: PlanCache):
    entry(filled).chmod(0o666)
    with pytest.raises(EngineError, match="written by others"):
        filled.load(KEY)


def test_a_folder_below_one_that_others_can_write_to_is_refused():
    with TemporaryDirectory(prefix="reelray-") as name:
        parent = Path(name) / "open"
        parent.mkdir()
        cache = PlanCache(parent / "plans")
        parent.chmod(0o777)
        with pytest.raises(EngineError, match="not ours alone"):
            cache.load(KEY)


@pytest.mark.skipif(os.getuid() != 0, reason="not verified for another user's folder: only root can change an owner")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_another_user_owns_is_refused(filled: PlanCache, what: str):
    os.chown(filled.folder if what == "folder" else entry(filled), 65534, 65534)
    with pytest.raises(EngineError, match="another user"):
        filled.load(KEY)


def test_a_link_to_a_plan_elsewhere_is_refused(filled: PlanCache, tmp_path: Path):
    shutil.move(entry(filled), tmp_path / "elsewhere")
    (filled.folder / f"{KEY.digest}.plan").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="cannot be opened"):
        filled.load(KEY)


def fake_builders(folder: Path, notes: Path, count: int, seconds: float = 0.5, mode: str = "") -> list[int]:
    """Starts `count` builders at once. Returns their exit codes."""
    command = [sys.executable, "-m", "tests.engines.backends.trt.fake_builder", str(folder), str(notes), str(seconds), mode]
    started = [subprocess.Popen(command) for _ in range(count)]
    return [process.wait(timeout=PATIENCE_S) for process in started]


def test_processes_that_build_at_once_build_once(folder: Path, tmp_path: Path):
    notes = tmp_path / "notes"
    assert fake_builders(folder, notes, 4, seconds=1.0) == [0] * 4
    assert len(notes.read_text().splitlines()) == 1
    assert PlanCache(folder).load(KEY) == PLAN


def test_a_builder_that_is_killed_holds_up_nobody(folder: Path, tmp_path: Path):
    notes = tmp_path / "notes"
    assert fake_builders(folder, notes, 1, seconds=0.0, mode="die") == [-9]
    assert PlanCache(folder).load(KEY) is None
    assert fake_builders(folder, notes, 2) == [0, 0]
    assert len(notes.read_text().splitlines()) == 2


def test_a_draft_that_was_cut_off_is_no_plan(folder: Path):
    cache = PlanCache(folder)
    (folder / f"{KEY.digest}.x.draft").write_bytes(b"half")
    assert cache.load(KEY) is None


def test_timings_are_kept_for_every_plan_of_this_library_on_such_a_gpu(filled: PlanCache):
    assert filled.timings(KEY.timings) == b""
    filled.keep_timings(KEY.timings, b"measured")
    other_plan = replace(KEY, graph="d" * 64, gpu=replace(KEY.gpu, driver_major=590))
    assert PlanCache(filled.folder).timings(other_plan.timings) == b"measured"
    filled.keep_timings(KEY.timings, b"more")
    assert filled.timings(KEY.timings) == b"more"
    assert filled.load(KEY) == PLAN


@pytest.mark.parametrize("part", [field.name for field in fields(TimingKey)])
def test_timings_of_anything_else_are_not_used(filled: PlanCache, part: str):
    filled.keep_timings(KEY.timings, b"measured")
    others = {**OTHERS, **OTHER_GPUS, "gpu": OTHER_GPUS["name"]}
    assert filled.timings(replace(KEY.timings, **{part: others[part]})) == b""


def test_damaged_or_foreign_timings_are_none_and_are_replaced(filled: PlanCache):
    filled.keep_timings(KEY.timings, b"measured")
    (path,) = filled.folder.glob("*.timings")
    path.write_bytes(path.read_bytes()[:-1])
    assert filled.timings(KEY.timings) == b""
    filled.keep_timings(KEY.timings, b"anew")
    assert filled.timings(KEY.timings) == b"anew"
    path.chmod(0o666)
    assert filled.timings(KEY.timings) == b""


def test_timings_that_cannot_be_written_stop_nothing(filled: PlanCache, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    filled.keep_timings(KEY.timings, b"measured")
    assert filled.timings(KEY.timings) == b""
    assert not list(filled.folder.glob("*.draft"))


def test_what_lies_in_the_cache_is_listed_with_its_key(filled: PlanCache):
    other = replace(KEY, gpu=Gpu("another", (8, 9), 128, 580), flags=())
    filled.get(other, lambda: b"another plan")
    filled.keep_timings(KEY.timings, b"measured")
    assert {(entry.digest, entry.key) for entry in filled.entries()} == {(KEY.digest, KEY), (other.digest, other)}
    assert all(entry.size_bytes == entry.path.stat().st_size for entry in filled.entries())


@pytest.mark.parametrize("content", [b"", b"reelray plan\n", b"no plan at all", "cut", "of another name"])
def test_a_damaged_plan_is_listed_as_such(filled: PlanCache, content: bytes | str):
    path = entry(filled)
    if content == "of another name":
        path = path.rename(path.with_name(f"{'0' * 64}.plan"))
    else:
        path.write_bytes(path.read_bytes()[:-1] if content == "cut" else bytes(content))  # type: ignore[arg-type]
    assert [(found.digest, found.key) for found in filled.entries()] == [(path.stem, None)]
