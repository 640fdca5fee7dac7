"""Which tests one worker of pytest-xdist runs in order: those that share something which is dear to start."""

import re

FIRST = ("e2e", "trt", "compilers", "inductor", "chaos", "uvicorn", "gateway", "serve", "interpreters")
"""Groups that take longest, in the order in which they begin. All others follow as they are collected. The two services on Ray
do not start at once, because a Ray that is not up within 30 s gives up; and the clients, which give up after 5 s, do not run
beside the first one's start."""
SLOW_FILES = (
    *("test_resume.py", "test_main.py", "test_gateway.py", "test_flops.py", "test_bench.py"),
    *("test_parity.py", "test_denoise.py", "test_decode.py", "test_savings.py", "test_prepared.py", "test_side_by_side.py"),
    *("controlnext/test_preprocess.py", "test_vae.py", "test_demo_pose.py", "test_hostile.py", "test_schema.py", "test_model.py"),
    "batch/test_command.py",
)
"""Files that render, start services, build nets or make up cases for a long time, though they need neither Ray nor a compiler."""


def group_of(nodeid: str) -> str:
    """Each service is started once, and so is a compiler; else a file is a group."""
    path, _, test = nodeid.partition("::")
    _, folder, *rest = path.split("/")
    hosting = re.search(r"[\[-](uvicorn|gateway|serve)[\]-]", test)
    if folder in ("e2e", "chaos"):
        return folder
    if folder == "wire" and hosting:
        return hosting[1]
    if folder == "kernels" and {"fit", "fits"} & set(test.partition("[")[0].split("_")):
        return "compilers"
    if folder == "kernels" and rest not in (["test_bench.py"], ["test_choice.py"]):
        return "interpreters"
    if path.endswith("/test_inductor.py"):
        return "inductor"
    return "trt" if "trt" in rest else path


def turn_of(nodeid: str) -> int:
    """When a test's group begins."""
    group = group_of(nodeid)
    return FIRST.index(group) if group in FIRST else len(FIRST)


def is_slow(nodeid: str) -> bool:
    """Whether `make test-fast` leaves it out."""
    path = nodeid.partition("::")[0]
    return group_of(nodeid) in FIRST or "/hosting/" in path or path.endswith(SLOW_FILES)
