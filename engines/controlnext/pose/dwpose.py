"""DWPose: a detector for people, then a net for 133 points of each. Section 2B.3 of `video-models.md`; arXiv 2307.15880."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.controlnext.config import DETECTOR_FILE, POSE_FILE
from engines.controlnext.pose import detector, keypoints
from engines.controlnext.pose.keypoints import BINS_PER_PIXEL, HEIGHT, POINTS, WIDTH, Crop
from engines.controlnext.pose.session import OnnxNet
from engines.controlnext.pose.skeleton import Pose

MAX_PEOPLE = 20
"""Limit of people in a frame: a picture may show thousands, and each costs a pass of the pose net."""


class DWPose:
    """Both nets, loaded once. Several threads may call it at once.

    folder: holds `yolox_l.onnx` and `dw-ll_ucoco_384.onnx`. device: "cpu", "cuda" or "cuda:1"; the CPU is used if ONNX
    Runtime was built without CUDA. threads: of one call on the CPU; None is one per core.
    Raises `WeightsError` if a file is absent, is not an ONNX model, or has other inputs and outputs than the published one.
    """

    def __init__(self, folder: Path, device: str = "cpu", threads: int | None = None):
        side, bins = detector.SIDE, (POINTS, BINS_PER_PIXEL * WIDTH, BINS_PER_PIXEL * HEIGHT)
        self._detector = OnnxNet(
            folder / DETECTOR_FILE, (1, 3, side, side), [(1, detector.CELLS, detector.VALUES)], device, threads
        )
        self._pose = OnnxNet(
            folder / POSE_FILE, (1, 3, HEIGHT, WIDTH), [(1, bins[0], bins[1]), (1, bins[0], bins[2])], device, threads
        )

    def __call__(self, frame: NDArray[np.uint8]) -> Pose:
        """The people of one frame, at least one: if nobody is detected, the whole frame is used as a person's box.

        If there are more than `MAX_PEOPLE`, only the best detections are kept.

        frame: (H, W, 3), uint8, RGB, of any size from 2x2; may be a view.
        """
        assert frame.dtype == np.uint8, "frames are 8-bit"
        assert frame.ndim == 3, "frames are (H, W, 3)"
        assert frame.shape[2] == 3, "frames are RGB"
        frame = np.ascontiguousarray(frame)  # OpenCV refuses some views
        height, width = frame.shape[:2]
        square, scale = detector.letterbox(frame)
        boxes = detector.find_people(self._detector(square)[0], scale)
        boxes = boxes[:MAX_PEOPLE] if len(boxes) else np.array([[0.0, 0.0, width, height]])
        points = np.empty((len(boxes), POINTS, 2))
        scores = np.empty((len(boxes), POINTS))
        for i, box in enumerate(boxes):  # one by one, so that the number of people does not change a person's bits
            crop = Crop.around(box)
            in_crop, scores[i] = keypoints.decode_simcc(*self._pose(crop.cut(frame)))
            points[i] = crop.to_frame(in_crop)
        return keypoints.to_pose(points, scores, height, width)
