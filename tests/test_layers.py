"""Imports go one way, kernels <- engines <- deployments, and the door opens without torch or ray."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"kernels", "engines", "deployments", "tests"}
FORBIDDEN = {
    "kernels": {"engines", "deployments", "tests", "ray", "fastapi", "pydantic", "diffusers", "transformers"},
    "engines": {"deployments", "tests", "ray", "fastapi", "pydantic", "httpx", "asyncpg"},
    "deployments": {"tests", "diffusers", "transformers"},
    "deployments/jobs": {"ray", "fastapi", "torch", "tests"},
}
NO_TORCH = [
    "deployments.ingress",
    "deployments.gateway",
    "deployments.cli",
    "deployments.dispatcher",
    "deployments.courier",
    "deployments.jobs.store",
    "engines.spec",
    "engines.registry",
    "engines.animatediff.config",
    "engines.animatediff.spec",
]


def imports(source: str) -> Iterator[str]:
    """The top-level names of everything a source imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield (node.module or "").partition(".")[0]


def backward(source: str, layer: str) -> set[str]:
    return set(imports(source)) & FORBIDDEN[layer]


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_no_import_goes_backward(layer: str):
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    faults = {str(path.relative_to(ROOT)): found for path in files if (found := backward(path.read_text(), layer))}
    assert not faults


@pytest.mark.parametrize(
    ("source", "layer"),
    [
        ("import deployments.fetch", "engines"),
        ("def f():\n    from engines import spec", "kernels"),
        ("if 0:\n    import ray.serve as r", "engines"),
        ("from torch import nn", "deployments/jobs"),
    ],
)
def test_a_backward_import_is_found_wherever_it_stands(source: str, layer: str):
    assert backward(source, layer)


def test_no_import_is_relative():
    with pytest.raises(AssertionError, match="absolute"):
        list(imports("from . import spec"))


@pytest.mark.parametrize("module", NO_TORCH)
def test_importing_loads_neither_torch_nor_ray(module: str):
    code = f"import sys, {module}; sys.exit(','.join({{'torch', 'ray', 'diffusers', 'transformers'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_kernels_package_runs_nothing_when_another_library_probes_for_it():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.Expr) for node in body)


def test_no_other_package_stands_at_the_top():
    found = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert found == OURS
