from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engines.controlnext.demo_pose import DRIVER, REFERENCE, puppet_frame
from engines.controlnext.pose import detector
from engines.controlnext.pose.align import fit
from engines.controlnext.pose.draw import draw
from engines.controlnext.pose.dwpose import MAX_PEOPLE, DWPose
from engines.controlnext.pose.skeleton import ALIGNED


@pytest.mark.parametrize("size", [(2, 2), (2, 700), (700, 2), (3, 5), (641, 643)])
def test_frames_of_any_size_give_at_least_one_person(dwpose: DWPose, size: tuple[int, int]):
    pose = dwpose(np.full((*size, 3), 90, np.uint8))
    assert pose.persons == 1
    assert not pose.visible.any()


def test_where_nobody_is_detected_the_whole_frame_is_the_box(dwpose: DWPose, monkeypatch: pytest.MonkeyPatch):
    frame = puppet_frame(DRIVER, 0.2, 256, 256)
    found = dwpose(frame)
    monkeypatch.setattr(detector, "MIN_SCORE", 2.0)
    whole = dwpose(frame)
    assert whole.visible.all()
    np.testing.assert_allclose(whole.body, found.body, atol=0.01)


def test_two_boxes_are_two_people(dwpose: DWPose, monkeypatch: pytest.MonkeyPatch):
    frame = np.concatenate([puppet_frame(DRIVER, 0.2, 256, 256), puppet_frame(DRIVER, 0.7, 256, 256)], axis=1)
    boxes = np.array([(0.0, 0, 256, 256), (256.0, 0, 512, 256)])
    monkeypatch.setattr(detector, "find_people", lambda cells, scale: boxes)
    pose = dwpose(frame)
    assert pose.persons == 2
    assert pose.body[0, :, 0].max() < 0.5 < pose.body[1, :, 0].min()


def test_of_a_crowd_the_best_are_taken(dwpose: DWPose, monkeypatch: pytest.MonkeyPatch):
    boxes = np.array([(float(i), 0, i + 50, 60) for i in range(MAX_PEOPLE + 30)])
    monkeypatch.setattr(detector, "find_people", lambda cells, scale: boxes)
    assert dwpose(puppet_frame(DRIVER, 0.2, 64, 128)).persons == MAX_PEOPLE


def test_threads_share_the_nets(dwpose: DWPose):
    frames = [puppet_frame(DRIVER, i / 6, 192, 192) for i in range(6)]
    alone = [dwpose(frame) for frame in frames]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(dwpose, frames))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.body, other.body)


def test_a_frame_that_is_a_view_gives_the_same_pose(dwpose: DWPose):
    frame = puppet_frame(DRIVER, 0.1, 256, 256)
    mirrored = np.ascontiguousarray(frame[:, ::-1])[:, ::-1]
    channels_first = np.ascontiguousarray(frame.transpose(2, 0, 1)).transpose(1, 2, 0)
    for view in (mirrored, channels_first):
        np.testing.assert_array_equal(dwpose(view).body, dwpose(frame).body)


def test_a_driving_puppet_is_brought_onto_the_reference_and_drawn(dwpose: DWPose):
    reference = dwpose(puppet_frame(REFERENCE, 0.0, 320, 256))
    driving = [dwpose(puppet_frame(DRIVER, i / 4, 256, 384)) for i in range(4)]
    alignment = fit(reference, driving, (320, 256), (256, 384))
    moved = np.concatenate([alignment.apply(pose).body for pose in driving])[:, list(ALIGNED)]
    still = reference.body[0, list(ALIGNED)]
    np.testing.assert_allclose(moved.mean(axis=(0, 1)), still.mean(axis=0), atol=1e-6)
    assert np.ptp(moved[..., 1].mean(axis=0)) == pytest.approx(np.ptp(still[:, 1]), rel=0.1)
    assert draw(alignment.apply(driving[0]), 320, 256).any()
