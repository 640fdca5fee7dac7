"""The real TensorRT bindings in their own process, over empty libraries. Only their names and Python code; no TensorRT runs."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

LIBRARIES = ["libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"]
SYMBOLS = [
    *(f"create{name}_INTERNAL" for name in ("InferBuilder", "InferRuntime", "InferRefitter", "NvOnnxParser")),
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "getBuilderPluginRegistry",
    "initLibNvInferPlugins",
]


def empty_libraries(folder: Path, unverified: str) -> Path:
    """Writes the libraries to `folder`. Skips the test where they cannot be built. unverified: named in the skip reason."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip(f"no C compiler: not verified that {unverified}")
    if find_spec("tensorrt_bindings") is None:
        pytest.skip(f"tensorrt-cu13-bindings is not installed: not verified that {unverified}")
    (folder / "empty.c").write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in LIBRARIES:
        command = [compiler, "-shared", "-fPIC", "-o", str(folder / name), str(folder / "empty.c"), f"-Wl,-soname,{name}"]
        subprocess.run(command, check=True)
    return folder


def with_bindings(libraries: Path, script: str, *arguments: str) -> str:
    """Runs a script of this folder. Returns what it prints."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(Path(__file__).parents[4])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
