"""Imports go one way: kernels <- engines <- deployments, and between the rooms of `deployments` as `ROOMS` permits.

The light rooms load neither torch nor ray, so that the ingress and the command line start in a second.
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"kernels", "engines", "deployments", "tests"}
HEAVY = frozenset({"torch", "ray", "diffusers", "transformers"})

FORBIDDEN = {
    "kernels": {"engines", "deployments", "tests", "ray", "fastapi", "pydantic", "diffusers", "transformers"},
    "engines": {"deployments", "tests", "ray", "fastapi", "pydantic", "httpx", "asyncpg"},
    "deployments": {"tests", "kernels", "diffusers", "transformers"},
    "deployments/jobs": {"fastapi"},
}
"""Folder -> the top-level packages that no file in it may import."""

ERRORS = "engines.errors"
SPEC = "engines.spec"
SETTINGS = "deployments.settings"


@dataclass(frozen=True)
class Room:
    """A folder of `deployments`, or a file directly in it.

    may: our modules that its files may import besides its own, each with everything below it; `*` matches any text.
    light: it loads neither torch nor ray, except for the modules in `heavy`, which may also import all of `engines`.
    """

    may: tuple[str, ...]
    light: bool = False
    heavy: tuple[str, ...] = ()


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"deployments.{name}" for name in names)


TOLD = rooms("metrics", "tracing")
"""What a process tells its operator."""

ROOMS = {
    "schemas": Room((ERRORS, SPEC, "engines.*config", "engines.*.spec", "engines.*demand"), light=True),
    "jobs": Room((*rooms("schemas", "metrics"), ERRORS), light=True),
    "files": Room((*rooms("schemas"), SETTINGS, ERRORS, "engines.temporary"), light=True, heavy=("checkpoints",)),
    "webhooks": Room((*rooms("jobs", "files.download", "schemas"), *TOLD, ERRORS), light=True),
    "ingress": Room((*rooms("schemas", "jobs", "files", "webhooks"), *TOLD, SETTINGS, ERRORS), light=True),
    "playground": Room(()),
    "stages": Room((*rooms("files", "schemas"), *TOLD, SETTINGS, "engines")),
    "dispatch": Room((*rooms("jobs", "stages", "files", "schemas"), *TOLD, ERRORS, SPEC)),
    "batch": Room((*rooms("stages", "jobs", "files", "schemas"), "engines")),
    "hosting": Room(
        (
            *rooms("schemas", "jobs", "files", "webhooks", "ingress", "playground", "stages", "dispatch", "batch"),
            *TOLD,
            SETTINGS,
            "engines",
        )
    ),
    "cli": Room(
        (
            *rooms("schemas", "jobs", "files", "webhooks", "ingress", "playground", "stages", "dispatch", "batch", "hosting"),
            SETTINGS,
            "engines",
        )
    ),
    "settings.py": Room((*rooms("schemas"), ERRORS, "engines.*config"), light=True),
    "metrics.py": Room((), light=True),
    "tracing.py": Room((), light=True),
    "app.py": Room(("deployments", "engines")),
}
"""The table of rooms in the house style, section 2. Every file may know `engines.errors`, which imports nothing."""

USES_RAY = ("app.py", "stages/handles.py", "hosting/local_cluster.py", "hosting/ray_metrics.py", "batch/ray_data.py")
"""The only files below `deployments` that may import ray."""

ALSO_LIGHT = (
    "deployments.hosting.gateway",
    "deployments.cli.main",
    "deployments.dispatch.dispatcher",
    "engines.spec",
    "engines.registry",
    "engines.media.child",
    "engines.animatediff.config",
    "engines.animatediff.spec",
)
"""Modules outside the light rooms that must not load torch or ray either."""

A_FAULT = {
    "kernels": "engines.errors",
    "engines": "deployments.schemas.endpoint",
    "deployments/schemas": "deployments.jobs.job",
    "deployments/jobs": "deployments.settings",
    "deployments/files": "deployments.jobs.store",
    "deployments/webhooks": "deployments.files.file_store",
    "deployments/ingress": "deployments.stages.protocol",
    "deployments/stages": "deployments.dispatch.dispatcher",
    "deployments/dispatch": "deployments.ingress.app",
    "deployments/hosting": "deployments.cli.main",
    "deployments/cli": "deployments.app",
    "deployments/playground": "deployments.schemas.endpoint",
    "deployments/batch": "deployments.ingress.app",
}
"""Folder -> an import that it must not have."""


@cache
def imports(source: str) -> frozenset[str]:
    """Everything that a source imports, as "package.module" or "package.module.name", at any place in the file."""
    return frozenset(_imports(ast.parse(source)))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def is_within(name: str, module: str) -> bool:
    """Whether `name` is `module`, which may have wildcards, or lies below it."""
    return fnmatchcase(f"{name}.", f"{module}.*")


def permitted(path: Path, room: str) -> tuple[str, ...]:
    """Our modules that a file may import. path: relative to `deployments`."""
    table = ROOMS[room]
    own = () if room.endswith(".py") else rooms(room)
    return (*table.may, *own, *(("engines",) if path.stem in table.heavy else ()))


def faults(root: Path) -> dict[str, set[str]]:
    """File -> its imports that are not allowed, in the three packages below `root`."""
    found: dict[str, set[str]] = {}
    for layer in ("kernels", "engines", "deployments"):
        for file in sorted((root / layer).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            imported = imports(file.read_text())
            bad = {
                each
                for folder, tops in FORBIDDEN.items()
                if name.startswith(f"{folder}/")
                for each in imported
                if each.partition(".")[0] in tops
            }
            if layer == "deployments":
                bad |= room_faults(file.relative_to(root / layer), imported)
            if bad:
                found[name] = bad
    return found


def room_faults(path: Path, imported: frozenset[str]) -> set[str]:
    """Those of a file's imports that its room may not have. path: below `deployments`."""
    room = path.parts[0]
    if room == "__init__.py":
        return set(imported)
    if room not in ROOMS:
        return {f"{room} is no room"}
    may = permitted(path, room)
    bad = {each for each in imported if is_within(each, "deployments") or is_within(each, "engines")}
    bad -= {each for each in bad if any(is_within(each, module) for module in may)}
    if path.as_posix() not in USES_RAY:
        bad |= {each for each in imported if is_within(each, "ray")}
    if ROOMS[room].light and path.stem not in ROOMS[room].heavy:
        bad |= {each for each in imported if is_within(each, "torch")}
    return bad


def modules(room: str) -> list[str]:
    """Every module of a room that must be light."""
    folder = ROOT / "deployments" / room
    files = [folder] if folder.suffix else sorted(folder.rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.stem not in ROOMS[room].heavy]
    return [name.removesuffix(".__init__") for name in names]


def loaded_by(*names: str, heavy: frozenset[str] = HEAVY) -> str:
    """Imports these modules in turn in a new process. Returns the first that loads something of `heavy`, and what it loads."""
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    if heavy := {heavy!r} & set(sys.modules):
        print(name, "loads", *sorted(heavy))
        break
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the three packages, with the rooms that do not exist yet added."""
    root = tmp_path_factory.mktemp("copy")
    for layer in ("kernels", "engines", "deployments"):
        shutil.copytree(ROOT / layer, root / layer, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in A_FAULT:
        (root / folder).mkdir(exist_ok=True)
    return root


def test_every_import_is_allowed():
    assert not faults(ROOT)


@pytest.mark.parametrize("folder", A_FAULT)
@pytest.mark.parametrize("statement", ["import {module}", "def late() -> None:\n    from {package} import {name}\n"])
def test_a_forbidden_import_is_found_in_every_room(copy: Path, folder: str, statement: str):
    module = A_FAULT[folder]
    package, _, name = module.rpartition(".")
    file = copy / folder / "added.py"
    file.write_text(statement.format(module=module, package=package, name=name))
    try:
        assert faults(copy) == {f"{folder}/added.py": {module}}
    finally:
        file.unlink()


def test_every_room_has_its_forbidden_import():
    assert {folder for folder in A_FAULT if "/" in folder} == {f"deployments/{room}" for room in ROOMS if "." not in room}


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("import ray.serve as r", "engines/added.py"),
        ("def f():\n    from ray import serve", "deployments/stages/added.py"),
        ("if 0:\n    import deployments.files.checkpoints", "deployments/webhooks/added.py"),
        ("from engines.checkpoints.fingerprint import fingerprint_of", "deployments/files/added.py"),
        ("from importlib import import_module\nimport_module('engines.errors')", "kernels/added.py"),
        ("from fastapi import FastAPI", "deployments/jobs/added.py"),
        ("from torch import nn", "deployments/jobs/added.py"),
        ("def f():\n    import torch", "deployments/files/added.py"),
        ("from tests import fakes", "deployments/cli/added.py"),
        ("from diffusers import UNet2DModel", "deployments/stages/added.py"),
        ("from deployments import app", "deployments/hosting/added.py"),
        ("", "deployments/added.py"),
        ("", "deployments/utils/added.py"),
    ],
)
def test_other_forbidden_imports_and_places_are_found(copy: Path, source: str, file: str):
    added = copy / file
    is_new = not added.parent.exists()
    added.parent.mkdir(exist_ok=True)
    added.write_text(source)
    try:
        assert list(faults(copy)) == [file]
    finally:
        shutil.rmtree(added.parent) if is_new else added.unlink()


def test_no_import_is_relative():
    with pytest.raises(AssertionError, match="absolute"):
        imports("from . import spec")


def test_the_light_rooms_load_neither_torch_nor_ray():
    light = [room for room, table in ROOMS.items() if table.light and (ROOT / "deployments" / room).exists()]
    assert (
        loaded_by(*(module for room in light for module in modules(room)), *ALSO_LIGHT, heavy=HEAVY | {"opentelemetry.sdk"}) == ""
    )


def test_replicas_that_hold_no_model_load_ray_alone():
    assert loaded_by("deployments.app") == "deployments.app loads ray"


def test_every_init_file_of_ours_is_empty():
    files = [file for layer in ("engines", "deployments", "tests") for file in (ROOT / layer).rglob("__init__.py")]
    assert not [file for file in files if file.read_text()]


def test_every_folder_of_python_files_is_a_package():
    folders = {file.parent for layer in OURS for file in (ROOT / layer).rglob("*.py") if "node_modules" not in file.parts}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_the_kernels_package_runs_nothing_when_another_library_probes_for_it():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.Expr) for node in body)


def test_no_other_package_stands_at_the_top():
    found = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert found == OURS
