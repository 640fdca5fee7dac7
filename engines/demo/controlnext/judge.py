"""Says what a puppet clip shows: where its joints are, found by the hand-made pose nets, and which colours it has."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from engines.controlnext.demo_pose import L_EAR, L_HIP, L_KNEE, L_SHOULDER, Floats, Puppet, write_demo_pose
from engines.controlnext.pose.dwpose import DWPose
from engines.controlnext.pose.keypoints import to_openpose
from engines.controlnext.pose.skeleton import VISIBLE

Frames = NDArray[np.uint8]

PARTS = ("shirt", "trousers", "skin", "wall", "ground")
_SAME = 70.0  # how near a colour must be, as a distance in RGB; the puppets' colours are 128 apart


@dataclass(frozen=True)
class PuppetVerdict:
    """error: mean distance of the joints that were found, in heights of the frame. found: the share that was.

    colours: the share of body parts and backgrounds, over all frames, that have the puppet's colour.
    """

    error: float
    found: float
    colours: float


class PuppetJudge:
    """Holds the pose nets."""

    def __init__(self) -> None:
        with TemporaryDirectory() as folder:
            write_demo_pose(Path(folder))
            self._dwpose = DWPose(Path(folder), threads=1)

    def __call__(self, frames: Frames, joints: Floats, puppet: Puppet) -> PuppetVerdict:
        """frames: (F, H, W, 3). joints: (F, 17, 2), in pixels: where they should be. puppet: whose colours there should be."""
        offs, found = [], []
        for frame, points in zip(frames, joints, strict=True):
            wanted = to_openpose(points)
            pose = self._dwpose(frame)
            seen = pose.body_scores[0] > VISIBLE
            size = np.array((frame.shape[1], frame.shape[0]))
            offs.append(np.linalg.norm(pose.body[0] * size - wanted, axis=1)[seen] / frame.shape[0])
            found.append(seen.mean())
        every = np.concatenate(offs)
        right = [colours_right(frame, points, puppet) for frame, points in zip(frames, joints, strict=True)]
        return PuppetVerdict(float(every.mean()) if len(every) else 1.0, float(np.mean(found)), float(np.mean(right)))


def colours_right(frame: Frames, joints: Floats, puppet: Puppet) -> float:
    """The share of `PARTS` whose colour is the puppet's where its joints should be. joints: (17, 2)."""
    height, width = frame.shape[:2]
    ears, shoulders, hips = (joints[[left, left + 1]].mean(axis=0) for left in (L_EAR, L_SHOULDER, L_HIP))
    knee, hip = joints[L_KNEE], joints[L_HIP]
    edge = round(0.03 * width)
    places = {
        "shirt": (shoulders + hips) / 2,
        "trousers": (knee + hip) / 2,
        "skin": ears * 0.55 + shoulders * 0.45,
        "wall": np.array((edge, edge)),
        "ground": np.array((edge, height - 1 - edge)),
    }
    return float(np.mean([_near(frame, places[part], getattr(puppet, part)) for part in PARTS]))


def _near(frame: Frames, place: Floats, colour: tuple[int, int, int]) -> bool:
    """Whether the 3x3 pixels around a place have this colour on average."""
    x, y = np.clip(np.rint(place).astype(int), 1, np.array(frame.shape[1::-1]) - 2)
    patch = frame[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(axis=0)
    return bool(np.linalg.norm(patch - colour) < _SAME)
