from pathlib import Path

import pytest

from engines.controlnext.demo_pose import write_demo_pose
from engines.controlnext.pose.dwpose import DWPose


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "DWPose"
    write_demo_pose(folder)
    return folder


@pytest.fixture(scope="session")
def dwpose(nets: Path) -> DWPose:
    return DWPose(nets, threads=1)
