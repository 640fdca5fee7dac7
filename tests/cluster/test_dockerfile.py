"""Checks the Dockerfile's text against the rest of the repository; it is not built here."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())
PINS = dict(line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line)


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction; continued lines are joined, comments left out."""
    lines = [line for line in Path("cluster/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def last(name: str) -> list[str]:
    words = json.loads(of(name)[-1])
    assert isinstance(words, list)
    return words


def installed() -> str:
    (line,) = [line for line in of("RUN") if "pip install" in line]
    return line


def test_its_python_is_one_that_we_support():
    (image,) = of("FROM")
    found = re.match(r"python:(\d+)\.(\d+)-slim", image)
    assert found
    assert (int(found[1]), int(found[2])) >= (3, 11)
    assert PROJECT["project"]["requires-python"] == ">=3.11"


def test_it_installs_kernels_and_tensorrt_at_the_pinned_versions():
    extras = re.search(r"'\.\[(.+)\]'", installed())
    assert extras
    named = set(extras[1].split(","))
    assert {"gpu", "tensorrt"} <= named <= set(PROJECT["project"]["optional-dependencies"])
    assert "--constraint constraints.txt" in installed()


def test_the_parts_of_tensorrt_are_pinned_to_one_version_that_we_support():
    parts = ("tensorrt", "tensorrt_cu13", "tensorrt_cu13_bindings", "tensorrt_cu13_libs")
    (version,) = {PINS[part] for part in parts}
    (needed,) = re.findall(r"tensorrt>=(\d+)\.(\d+)", " ".join(PROJECT["project"]["optional-dependencies"]["tensorrt"]))
    assert tuple(map(int, version.split(".")[:2])) >= tuple(map(int, needed))


def test_everything_that_it_copies_is_there_and_every_package_is_copied():
    copied = [source for rest in of("COPY") for source in rest.split()[:-1]]
    assert all(Path(source).exists() for source in copied)
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(copied)
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= set(copied)


def test_it_runs_our_command_as_nobody_special():
    (user,) = of("USER")
    assert user not in ("root", "0")
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert last("ENTRYPOINT") == list(PROJECT["project"]["scripts"])


def test_it_serves_a_configuration_that_it_has_at_the_port_that_it_names():
    command, option, name = last("CMD")
    assert (command, option) == ("serve", "--config")
    (copied,) = [rest.split() for rest in of("COPY") if "cluster/" in rest]
    assert set(copied) == {"./", *map(str, Path("cluster").glob("serve_config.*.yaml"))}
    assert f"cluster/{name}" in copied
    options = yaml.safe_load(Path("cluster", name).read_text())["http_options"]
    assert (options["host"], [str(options["port"])]) == ("0.0.0.0", of("EXPOSE"))


@pytest.mark.parametrize("path", ["/health"])
def test_its_health_check_asks_a_route_that_there_is(path: str):
    (check,) = of("HEALTHCHECK")
    (port,) = of("EXPOSE")
    assert f"http://127.0.0.1:{port}{path}'" in check
    assert f'@router.get("{path}")' in Path("deployments/ingress/routes/service_routes.py").read_text()
