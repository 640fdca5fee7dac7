import io
from itertools import product
from pathlib import Path

import av
import numpy as np
import onnx
import pytest
from PIL import Image

from engines.controlnext.config import DETECTOR_FILE, POSE_FILE
from engines.controlnext.demo_pose import (
    CODES,
    DRIVER,
    FRAMES_PER_DANCE,
    REFERENCE,
    RING,
    Puppet,
    puppet_frame,
    puppet_image,
    puppet_joints,
    write_demo_pose,
    write_puppet_clip,
)
from engines.controlnext.pose import detector
from engines.controlnext.pose.dwpose import DWPose
from engines.controlnext.pose.session import OnnxNet

COCO_IN_OPENPOSE = [0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]


def misses(dwpose: DWPose, frame: np.ndarray, puppet: Puppet, time: float) -> int:
    """How many joints are not found within 2 % of the height."""
    height, width = frame.shape[:2]
    pose = dwpose(frame)
    assert pose.persons == 1
    found = pose.body[0, COCO_IN_OPENPOSE] * (width, height)
    off = np.linalg.norm(found - puppet_joints(puppet, time, height, width), axis=1) > 0.02 * height
    return int((off | ~pose.visible[0, COCO_IN_OPENPOSE]).sum())


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (512, 384), (256, 384)])
def test_nine_of_ten_joints_survive_h264(dwpose: DWPose, tmp_path: Path, size: tuple[int, int]):
    frames = FRAMES_PER_DANCE
    write_puppet_clip(tmp_path / "clip.mp4", frames, *size, fps=8)
    with av.open(tmp_path / "clip.mp4") as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == frames
    assert decoded[0].shape == (*size, 3)
    shown = range(0, frames, 3)
    assert sum(misses(dwpose, decoded[i], DRIVER, i / frames) for i in shown) <= 0.1 * 17 * len(shown)


@pytest.mark.parametrize("size", [(64, 48), (64, 64), (384, 256), (512, 512)])
def test_every_joint_of_the_reference_is_found(dwpose: DWPose, size: tuple[int, int]):
    with Image.open(io.BytesIO(puppet_image(*size, time=0.3))) as image:
        assert misses(dwpose, np.array(image), REFERENCE, 0.3) == 0


def test_the_box_holds_every_joint(nets: Path):
    net = OnnxNet(nets / DETECTOR_FILE, (1, 3, 640, 640), [(1, 8400, 85)], threads=1)
    for time in (0.0, 0.25, 0.6):
        frame = puppet_frame(DRIVER, time, 300, 400)
        square, scale = detector.letterbox(frame)
        boxes = detector.find_people(net(square)[0], scale)
        assert len(boxes) == 1
        joints = puppet_joints(DRIVER, time, 300, 400)
        assert (boxes[0, :2] < joints.min(axis=0)).all()
        assert (boxes[0, 2:] > joints.max(axis=0)).all()
        assert np.prod(boxes[0, 2:] - boxes[0, :2]) < 2 * np.prod(np.ptp(joints, axis=0))


def pictures_of_nobody() -> dict[str, np.ndarray]:
    y, x = np.mgrid[0:256, 0:256].astype(np.uint8)
    rng = np.random.default_rng(0)
    pictures = {f"noise {n}": rng.integers(0, 256, (n, n, 3), dtype=np.uint8) for n in (128, 256, 512)}
    pictures |= {f"grey {level}": np.full((256, 256, 3), level, np.uint8) for level in (0, 128, 255)}
    for channels in product({"x": x, "y": y, "128": x * 0 + 128}.items(), repeat=3):
        pictures[f"gradient {'/'.join(name for name, _ in channels)}"] = np.stack([values for _, values in channels], axis=-1)
    return pictures


def test_noise_and_gradients_show_nobody(dwpose: DWPose, nets: Path):
    net = OnnxNet(nets / DETECTOR_FILE, (1, 3, 640, 640), [(1, 8400, 85)], threads=1)
    for name, picture in pictures_of_nobody().items():
        square, scale = detector.letterbox(picture)
        assert not len(detector.find_people(net(square)[0], scale)), name
        assert not dwpose(picture).visible.any(), name


def test_faces_and_hands_are_absent(dwpose: DWPose):
    pose = dwpose(puppet_frame(DRIVER, 0.0, 256, 256))
    assert not pose.face_scores.any()
    assert not pose.hand_scores.any()


def test_a_joint_without_its_disc_is_absent_and_the_others_stay(dwpose: DWPose):
    frame = puppet_frame(DRIVER, 0.0, 384, 384)
    x, y = puppet_joints(DRIVER, 0.0, 384, 384)[9].round().astype(int)  # the left wrist
    frame[y - 20 : y + 20, x - 20 : x + 20] = DRIVER.wall
    visible = dwpose(frame).visible[0]
    assert np.flatnonzero(~visible).tolist() == [7]


def test_the_files_are_the_same_every_time_and_valid(nets: Path, tmp_path: Path):
    write_demo_pose(tmp_path)
    for name in (DETECTOR_FILE, POSE_FILE):
        assert (tmp_path / name).read_bytes() == (nets / name).read_bytes()
        model = onnx.load(tmp_path / name)
        onnx.checker.check_model(model, full_check=True)
        assert model.ir_version <= 10
        assert [opset.version for opset in model.opset_import] == [17]


def test_clip_and_image_are_the_same_every_time_and_differ_from_each_other(tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        write_puppet_clip(tmp_path / name, 6, 128, 128, fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert puppet_image(128, 96) == puppet_image(128, 96)
    assert np.abs(puppet_joints(DRIVER, 0, 128, 96) - puppet_joints(REFERENCE, 0, 128, 96)).max() > 5


def test_the_dance_begins_anew_at_every_whole_number():
    np.testing.assert_allclose(puppet_joints(DRIVER, 0.2, 100, 100), puppet_joints(DRIVER, 3.2, 100, 100), atol=1e-9)
    assert np.abs(puppet_joints(DRIVER, 0.2, 100, 100) - puppet_joints(DRIVER, 0.7, 100, 100)).max() > 5


@pytest.mark.parametrize("puppet", [DRIVER, REFERENCE])
@pytest.mark.parametrize("size", [(256, 256), (512, 384), (576, 1024), (1024, 576)])
def test_every_disc_stays_in_the_frame_and_apart_from_the_others(puppet: Puppet, size: tuple[int, int]):
    unit = puppet.size * min(size[0], 1.2 * size[1])
    for time in np.linspace(0, 1, 48):
        joints = puppet_joints(puppet, float(time), *size)
        assert (joints > puppet.disc * unit).all()
        assert (joints < np.array(size[::-1]) - puppet.disc * unit).all()
        apart = np.linalg.norm(joints[:, None] - joints[None], axis=-1) + np.eye(17) * 1e9
        assert apart.min() > 2 * puppet.disc * unit


def test_no_colour_is_taken_for_another():
    others = [RING, *(getattr(p, part) for p in (DRIVER, REFERENCE) for part in ("shirt", "trousers", "skin", "wall", "ground"))]
    codes = np.array(CODES, float)
    assert len(set(CODES)) == 17
    assert min(np.linalg.norm(codes - other, axis=1).min() for other in others) > 105
    assert (np.linalg.norm(codes[:, None] - codes[None], axis=-1) + np.eye(17) * 1e9).min() > 105
