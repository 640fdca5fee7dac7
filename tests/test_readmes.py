"""What the READMEs name exists: files, links, modules, targets of make, and commands with their options."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from deployments.cli.main import app

READMES = [Path("README.md"), *(Path(room, "README.md") for room in ("deployments", "engines", "kernels", "cluster"))]
SUFFIXES = r"\.(py|md|yaml|toml|sql|json|txt|css|js|html)"
CALLERS_OWN = {"job.json"}
"""Files of whoever reads it."""


def code(text: str) -> list[str]:
    """What stands between backticks, and every line of the blocks."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`\n]+)`", rest), *(line.strip() for block in blocks for line in block.splitlines())]


def paths(text: str) -> Iterator[str]:
    """Those of ours: `<name>` in one stands for any name."""
    rooms = {path.name for path in Path().iterdir() if path.is_dir()}
    for word in code(text):
        named = re.fullmatch(rf"[\w.<>*-]+(/[\w.<>*-]+)*({SUFFIXES}|/)", word) or word.partition("/")[0] in rooms
        if named and " " not in word and word not in CALLERS_OWN:
            yield re.sub(r"<\w+>", "*", word)


def is_there(path: str, beside: Path) -> bool:
    """A name without a folder may be that of a file in any folder of the packages."""
    found = any(any(folder.glob(path)) for folder in (Path(), beside))
    return found or ("/" not in path and any(any(readme.parent.rglob(path)) for readme in READMES[1:]))


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_file_that_it_names_is_there(readme: Path):
    text = readme.read_text()
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    assert [link for link in links if not (readme.parent / link).exists()] == []
    assert [path for path in paths(text) if not is_there(path, readme.parent)] == []


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_module_and_target_that_it_names_is_there(readme: Path):
    text = "\n".join(code(readme.read_text()))
    assert [name for name in re.findall(r"python3? -m ([\w.]+)", text) if not find_spec(name)] == []
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_command_that_it_names_is_there_with_its_options(readme: Path):
    wrong = []
    for line in code(readme.read_text()):
        for words in re.findall(r"(?:^|\(| -- |&& )reelray ((?:[\w.<>\[\]/:=-]+ ?)+)", line):
            command: Any = typer.main.get_command(app)
            rest = words.split()
            while rest and rest[0] in getattr(command, "commands", {}):
                command = command.commands[rest.pop(0)]
            options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in options]
            if unknown or (hasattr(command, "commands") and rest[:1] != ["--help"]):
                wrong.append((words, unknown))
    assert wrong == []
