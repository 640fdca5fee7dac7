"""The driver's version, read from a small C library with NVML's interface. The real NVML needs a driver and is not tested."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engines.backends.trt.gpu import driver_major
from engines.errors import EngineError

NVML = """
#include <string.h>
int nvmlInit_v2(void) {{ return {init}; }}
int nvmlShutdown(void) {{ return 0; }}
int nvmlSystemGetDriverVersion(char *version, unsigned int length) {{ strncpy(version, "{version}", length); return {told}; }}
"""


def nvml(folder: Path, version: str = "580.95.05", init: int = 0, told: int = 0) -> str:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler: not verified that the driver's version is read")
    (folder / "nvml.c").write_text(NVML.format(version=version, init=init, told=told))
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "nvml.c")], check=True)
    return str(library)


def test_the_drivers_branch_is_the_first_part_of_its_version(tmp_path: Path):
    assert driver_major(nvml(tmp_path)) == 580


@pytest.mark.parametrize(
    ("fault", "words"),
    [({"init": 9}, "cannot be initialised"), ({"told": 1}, "does not tell"), ({"version": "rolling"}, "does not tell")],
    ids=["no driver", "refused", "no number"],
)
def test_an_nvml_that_gives_no_version_is_our_error(tmp_path: Path, fault: dict[str, Any], words: str):
    with pytest.raises(EngineError, match=words):
        driver_major(nvml(tmp_path, **fault))


def test_a_machine_without_a_driver_is_our_error(tmp_path: Path):
    with pytest.raises(EngineError, match="cannot be asked"):
        driver_major(str(tmp_path / "absent.so"))
    with pytest.raises(EngineError, match="cannot be asked"):
        driver_major("libc.so.6")
